"""Silence the C++ code of Ray and TensorFlow, which writes to stderr past every logger of Python."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def silence_native_stderr() -> Iterator[None]:
    """Send what C++ code writes to file descriptor 2 to nowhere; Python's own `sys.stderr` still gets through."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(kept), "w", buffering=1, errors="replace") as stream:
        os.dup2(nowhere.fileno(), 2)
        try:
            with redirect_stderr(stream):
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Send all that this process writes to stderr to nowhere, Python's own messages included."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
