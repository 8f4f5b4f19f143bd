"""Tells a web hook what came of a retraining. That nobody listens is no reason to fail."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fracture.errors import UsageError

_SECONDS = 10.0  # for an answer
_WAITS = (1.0, 5.0)  # seconds before the second and the third try


def check_url(url: str) -> None:
    """Raises UsageError unless it is one of http or https. It is often a secret, so that no message repeats it."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(
            f"--notify, of {len(url)} characters, is no address of a web hook: it must begin with https:// or http://, "
            "then the host, all in ASCII and without blanks"
        )


def notify(url: str, message: Mapping[str, Any], sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Posts the message as JSON; why nobody took it, or None. The URL, often a secret, is in no text."""
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"Content-Type": "application/json", "User-Agent": "fracture"}
    )
    why = ""
    for wait in (*_WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS):
                return None
        except urllib.error.HTTPError as error:
            why = f"{urlsplit(url).hostname} answers {error.code}"
            if error.code < 500 and error.code != 429:  # asking again will not help
                return why
        except OSError as error:
            why = f"{urlsplit(url).hostname} does not answer ({getattr(error, 'reason', error)})"
        except (http.client.HTTPException, ValueError) as error:
            why = f"{urlsplit(url).hostname} does not answer as a web server does ({type(error).__name__})"
        if wait is not None:
            sleep(wait)
    return why
