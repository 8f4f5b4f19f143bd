"""Mistakes of the person who asked, as against bugs of ours."""


class UsageError(ValueError):
    """What was asked cannot be done; the message names the rule, the value and the fix.

    The jobs print it without a stack trace and exit with code 2.
    """


class RunError(RuntimeError):
    """The job had to stop, through no mistake in what was asked; exit code 1, no stack trace."""
