"""Errors that end a command without a stack trace; any other exception but an OSError is a bug."""


class UsageError(ValueError):
    """The user has made a mistake; the message names the rule, the value and the fix.

    The command prints it and exits with code 2.
    """


class RunError(RuntimeError):
    """The job had to stop through no mistake of the user; the command prints it and exits with code 1."""
