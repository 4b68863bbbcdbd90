"""The error that ends a script with one line instead of a traceback."""


class UserError(Exception):
    """Something that the user can put right.

    The message says in one line what is wrong and which command or change mends it.
    """

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # a file name or a quoted error may hold line breaks
