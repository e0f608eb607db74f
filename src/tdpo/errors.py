"""Exceptions that are reported in one line: an error the user can fix, and a stop the user asked for."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input, with a message that says where the mistake is and how to fix it.

    The command line prints the message alone and exits with code 2; from Python it is an ordinary exception.
    """


class Stopped(Exception):
    """A run was asked to stop before its end and has saved where it is; the command line exits with ``code``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string.

    Examples:
        >>> nearest("learning_rat", ["learning_rate", "beta"])
        " Did you mean 'learning_rate'?"
        >>> nearest("zzz", ["learning_rate", "beta"])
        ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
