"""What epochs of both phases share: their counters, their progress bar and the check of the loss."""

import zlib

import numpy as np
from tqdm import tqdm

from captioning.training.state import LOWER_RATE
from support.distribution import is_chief
from support.errors import UserError


def begin_epoch(progress, epoch, order, samples=1):
    """Reset the counters of an epoch, unless it is the one that was stopped, in the same order.

    Args:
      epoch: int, epochs finished before.
      order: int (N,), positions of captions, or of images with so many `samples` each.
    """
    checksum = zlib.crc32(order.tobytes(), zlib.crc32(f"{epoch} {samples}".encode()))
    if progress.order != checksum:
        progress.order, progress.captions_done = checksum, 0
        progress.nats = progress.words = progress.seconds = progress.ciders = 0.0


def epoch_bar(progress, epoch, epochs, total):
    """The progress bar of an epoch, in captions; a context manager. Of several workers only the chief shows it.

    Args:
      epoch: int, epochs finished before.
      epochs: int, the epoch that this phase ends with.
      total: int, captions of an epoch.
    """
    text = f"epoch {epoch + 1}/{epochs}"
    return tqdm(total=total, initial=progress.captions_done, desc=text, unit=" captions", disable=not is_chief())


def check_loss(loss, progress, size):
    """Raise UserError where the loss of a batch of `size` captions is not a finite number."""
    if not np.isfinite(loss):
        batch = progress.captions_done // size + 1
        raise UserError(f"the loss is {loss} at batch {batch} of epoch {progress.epoch + 1}: {LOWER_RATE}")
