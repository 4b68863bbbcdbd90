"""The batches of an epoch as a training takes them: stopped and continued, with checkpoints and a progress bar."""

import time
import zlib

import numpy as np
from tqdm import tqdm

from captioning.training.saving import save_last
from captioning.training.state import LOWER_RATE, current_rate, last_epoch
from support.distribution import is_chief
from support.errors import UserError


def begin_epoch(progress, epoch, order, samples=1):
    """Start the counters of an epoch anew, unless it is the one that was stopped, in the same order.

    Args:
      epoch: int, epochs finished before.
      order: int (N,), positions of captions, or of pictures with so many `samples` each.
    """
    checksum = zlib.crc32(order.tobytes(), zlib.crc32(f"{epoch} {samples}".encode()))
    if progress.order != checksum:
        progress.order, progress.captions_done = checksum, 0
        progress.nats = progress.words = progress.seconds = progress.ciders = 0.0


def each_batch(state, epoch, batches, size, total, stop_if_asked, config):
    """Give the batches of an epoch one by one, and count each as done when the next one is asked for.

    Before each batch the learning rate is set, and a checkpoint is written where one is due.

    Args:
      epoch: int, epochs finished before.
      batches: iterable of what is still to be trained on.
      size, total: int, captions of a batch and of the epoch.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
    """
    progress = state.progress
    start = saved = time.perf_counter()
    bar = tqdm(total=total, initial=progress.captions_done, unit=" captions", disable=not is_chief())
    bar.set_description(f"epoch {epoch + 1}/{last_epoch(progress, config)}")
    with bar:
        for batch in batches:
            stop_if_asked()
            if time.perf_counter() - saved > 60 * config.checkpoint_minutes:
                save_last(state, config)
                saved = time.perf_counter()
            state.optimizer.learning_rate = current_rate(progress, epoch + progress.captions_done / total, config)
            yield batch
            done = min(size, total - progress.captions_done)
            progress.captions_done += done
            progress.seconds += time.perf_counter() - start
            start = time.perf_counter()
            if progress.words:
                bar.set_postfix(loss=f"{progress.nats / progress.words:.3f}", refresh=False)
            else:
                bar.set_postfix(cider=f"{progress.ciders / progress.captions_done:.3f}", refresh=False)
            bar.update(done)


def check_loss(loss, progress, size):
    if not np.isfinite(loss):
        batch = progress.captions_done // size + 1
        raise UserError(f"the loss is {loss} at batch {batch} of epoch {progress.epoch + 1}: {LOWER_RATE}")
