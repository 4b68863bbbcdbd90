"""A training's losses, learning rate and sample captions as TensorBoard events, beside its history.csv."""

import contextlib
import importlib.util
import pathlib

import tensorflow as tf

from support.distribution import is_chief
from support.errors import UserError


@contextlib.contextmanager
def tensorboard_log(config):
    """Give a tf.summary writer of `run_dir`/tensorboard, or None where the setting `tensorboard` is no.

    Of several workers only the chief writes.

    Raises:
      UserError: the package tensorboard is not installed.
    """
    if config.tensorboard == "no" or not is_chief():
        yield None
        return
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard yes needs a package that is not installed: run pip install tensorboard")
    writer = tf.summary.create_file_writer(str(pathlib.Path(config.run_dir, "tensorboard")))
    with contextlib.closing(writer):
        yield writer


def log_epoch(writer, row, learning_rate, predictions):
    """Write an epoch's events.

    Args:
      writer: as `tensorboard_log` gives it; None writes nothing.
      row: dict of the epoch's history: epoch, and numbers.
      learning_rate: float, at the epoch's end.
      predictions: list of GeneratedCaptions of the samples.
    """
    if writer is None:
        return
    with writer.as_default(step=row["epoch"]):
        for name, value in row.items():
            if isinstance(value, float):
                tf.summary.scalar(name, value)
        tf.summary.scalar("learning_rate", learning_rate)
        for prediction in predictions:
            tf.summary.text(prediction.path.name, prediction.caption)
    writer.flush()
