"""Post the result of a retraining to a web hook. A hook that fails does not fail the retraining."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import requests

from fracture.errors import UsageError

_TIMEOUT = 10.0  # seconds to connect, and then to receive an answer
_WAITS = (1.0, 5.0)  # seconds before the second and the third try


def check_url(url: str) -> None:
    """Check the address of a web hook. It is often a secret, so no message repeats it.

    Raises:
        UsageError: it is not an http or https URL.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(
            f"--notify, of {len(url)} characters, is not the address of a web hook: it must begin with https:// or "
            "http://, followed by the host, in ASCII and without blanks"
        )


def post_to_webhook(url: str, message: Mapping[str, Any], sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Post the message as JSON, in up to three tries.

    Args:
        url: often a secret; it is in no returned text and no log.

    Returns:
        Why the message was not accepted, or None if it was.
    """
    # A loop instead of urllib3's Retry, which logs the URL's path at each retry and reads refused answers to their end.
    host, body = urlsplit(url).hostname, json.dumps(message).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "fracture"}
    reason = ""
    for wait in (*_WAITS, None):
        try:
            with _silent_urllib3(), requests.post(url, body, headers=headers, timeout=_TIMEOUT, stream=True) as answer:
                if answer.ok:
                    return None
                reason = f"{host} answers {answer.status_code}"
                if answer.status_code < 500 and answer.status_code != 429:  # another try would get the same answer
                    return reason
        except (requests.RequestException, ValueError) as error:  # ValueError: urllib3's for an impossible host name
            reason = f"{host} does not answer{_describe_failure(error)}"
        if wait is not None:
            sleep(wait)
    return reason


@contextmanager
def _silent_urllib3() -> Iterator[None]:
    """Keep urllib3 from logging the URL, which it does at the level DEBUG."""
    logger = logging.getLogger("urllib3.connectionpool")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _describe_failure(error: Exception) -> str:
    """Return the cause of a failed request without the URL, which the text of requests' own exceptions contains."""
    outer = error.args[0] if error.args else None
    cause = getattr(outer, "reason", outer)  # of urllib3's MaxRetryError, whose text contains the URL too
    inner = cause.args[-1] if isinstance(cause, Exception) and cause.args else None
    if isinstance(inner, HTTPException):
        return f" as a web server does ({type(inner).__name__})"
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return f" ({str(cause).rpartition(': ')[2]})"  # urllib3 puts the connection before the reason
    return f" ({type(error).__name__})"
