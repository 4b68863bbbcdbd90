"""The errors that end a script with one line instead of a traceback, and texts that fit into such a line."""

import contextlib
import pathlib


class UserError(Exception):
    """Something that the user can put right.

    The message says in one line what is wrong and which command or change mends it.
    """

    def __str__(self):
        return printable(" ".join(super().__str__().splitlines()))  # a file name or a quoted error may hold line breaks


class FileError(UserError):
    """A file or folder that is missing, damaged or does not fit. Its reader does not know what mends it: `mended_by`.

    Attributes:
      path: pathlib.Path, which begins the message.
    """

    def __init__(self, path, problem):
        super().__init__(f"{path} {problem}")
        self.path = pathlib.Path(path)


@contextlib.contextmanager
def mended_by(remedy):
    """End the message of a FileError in the block, or function, with what the user can do about it. str -> context."""
    try:
        yield
    except FileError as error:
        raise UserError(f"{error}: {remedy}") from None


def printable(text):
    """A text that no terminal takes for orders: what cannot be seen is written as Python would, as in \\x1b."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
