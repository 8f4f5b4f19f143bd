"""Mistakes of the person who asked, as against bugs of ours."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """What was asked cannot be done; the message names the rule, the value and the fix.

    The jobs print it without a stack trace and exit with code 2.
    """


class RunError(RuntimeError):
    """The job had to stop, through no mistake in what was asked; exit code 1, no stack trace."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to put behind an unknown name; empty where nothing is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
