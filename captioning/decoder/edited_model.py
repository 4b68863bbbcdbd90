"""What cannot go on with an edited model.py ends in one line. The rest of the project calls what users edit there."""

import contextlib
import pathlib
import re
import traceback

import tensorflow as tf

from support.errors import UserError

_NO_EDITS = (UserError, OSError, MemoryError)  # what no edit of model.py is behind
_LIBRARIES = "__autograph_generated|site-packages|dist-packages"
_LONGEST_REASON = 300  # letters; TensorFlow may list whole tensors


@contextlib.contextmanager
def following_model(what, remedy="and run the same command again"):
    """Raise UserError for an error in the block, or function, as if model.py were the reason.

    Args:
      what: str, what the block computes.
      remedy: str, what else the user can do, or does behind it.
    """
    try:
        yield
    except _NO_EDITS:
        raise
    except Exception as error:  # an edit may raise errors of all kinds
        if isinstance(error, tf.errors.OpError) and not isinstance(error, tf.errors.InvalidArgumentError):
            raise  # of the memory, a device or another worker
        raise UserError(f"{what} cannot follow model.py ({_describe(error)}): change it there, {remedy}") from error


def _describe(error):
    """The first line of an error, and the last line of model.py that led to it, or else of any file. -> str"""
    text = str(error)
    # AutoGraph and Keras put the error that they met, and where, into the text of another.
    met = re.findall(r"^\s*(\w*(?:Error|Exception): .+)$", text, re.M)
    frames = [(each.filename, each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'File "(.+?)", line (\d+), in ', text)
    own = [(pathlib.PurePath(file).name, line) for file, line in frames if not re.search(_LIBRARIES, file)]
    name, line = ([place for place in own if place[0] == "model.py"] or own)[-1]
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    reason = met[-1] if met else f"{type(error).__name__}: {first}"
    return f"line {line} of {name}: {reason.strip()[:_LONGEST_REASON]}"
