"""Tells a web hook what came of a retraining. That nobody listens is no reason to fail."""

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
    """Raises UsageError unless it is one of http or https."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--notify {url!r} is no address of a web hook: it must begin with https:// or http://")


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
        if wait is not None:
            sleep(wait)
    return why
