"""Errors that end a command with a message."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""
