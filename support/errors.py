"""The error that ends a script with one line instead of a traceback, and texts that fit into such a line."""


class UserError(Exception):
    """Something that the user can put right.

    The message says in one line what is wrong and which command or change mends it.
    """

    def __str__(self):
        return printable(" ".join(super().__str__().splitlines()))  # a file name or a quoted error may hold line breaks


def printable(text):
    """A text that no terminal takes for orders: what cannot be seen is written as Python would, as in \\x1b."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
