"""What a training leaves in its run folder after each epoch, and what it says where it begins and ends."""

import contextlib
import dataclasses
import pathlib

from captioning.checkpoints import check_finite, restore_newest, save_checkpoint
from captioning.distribution import is_chief, wait_for_chief
from captioning.figures import plot_losses
from captioning.optimizer import scheduled_rate, self_critical_rate
from captioning.run_folder import other_folder
from support.errors import UserError
from support.files import write_csv

CROSS_ENTROPY, SELF_CRITICAL = "cross-entropy", "self-critical"  # the phases of a training

LOWER_RATE = (
    "lower --learning_rate (--self_critical_rate in self-critical epochs) or --clip_norm and run the same command, "
    "which continues from the last checkpoint, if there is one"
)


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """A row of history.csv.

    Attributes:
      epoch: int, counted from 1.
      phase: CROSS_ENTROPY or SELF_CRITICAL.
      train_loss: float, nats per word with dropout on, or None in a self-critical epoch.
      validation_loss: float, nats per word of the reference captions.
      sampled_cider: float, mean CIDEr of the captions that were drawn of training pictures, or None where none were.
      validation_cider: float, CIDEr of greedy captions of validation pictures, or None in an epoch of cross-entropy.
        Both are computed alike, each with the n-gram counts of its own pictures.
      captions_per_second: float, trained on.
      best_by: str, why this epoch's weights became the best ones; "" where they did not.
    """

    epoch: int
    phase: str = CROSS_ENTROPY
    train_loss: float | None = None
    validation_loss: float | None = None
    sampled_cider: float | None = None
    validation_cider: float | None = None
    captions_per_second: float | None = None
    best_by: str = ""


def current_rate(progress, epochs_done, config):
    """The learning rate after some epochs of a training, which need not be a whole number."""
    if progress.cross_entropy_epochs < 0:
        return scheduled_rate(config, epochs_done)
    return progress.rate_factor * self_critical_rate(config, epochs_done - progress.cross_entropy_epochs)


def last_epoch(progress, config):
    """The epoch that the phase of a training ends with, unless it stops sooner."""
    if progress.cross_entropy_epochs < 0:
        return config.epochs
    return progress.cross_entropy_epochs + config.self_critical_epochs


def announce_start(state, restored, config):
    """Say where the training goes on, and at which learning rate."""
    folder, progress = config.run_dir, state.progress
    done, epochs = f"after epoch {progress.epoch}", config.epochs
    if progress.cross_entropy_epochs >= 0:
        done += f", {progress.cross_entropy_epochs} of them of cross-entropy"
        epochs = config.self_critical_epochs
    rate = "no epochs of this phase are left"
    if progress.epoch < last_epoch(progress, config):
        rate = f"learning rate {current_rate(progress, progress.epoch, config):.2g}"
        rate += f", {config.schedule} over {epochs} epochs"
    if restored:
        print(f"continuing {folder} {done}; {rate}")
    elif pathlib.Path(folder, "history.csv").exists():
        print(f"no checkpoint is in {folder}: training begins anew; {rate}")
    else:
        print(f"training begins; {rate}")


def announce_end(progress, config):
    best = progress.history[progress.best_epoch - 1] if progress.best_epoch else {}
    score = f"{progress.best_loss:.3f} nats per word"
    if best.get("validation_cider") is not None:
        score = f"validation CIDEr {best['validation_cider']:.3f}"
    print(f"trained {progress.epoch} epochs; the best is {progress.best_epoch}, {score}")
    print(f"checkpoints, history.csv, loss.png and samples.html are in {config.run_dir}")


def save_epoch(state, row, config):
    """Write the checkpoints, `best` if this epoch is, and then history.csv and loss.png.

    The best epoch has the lowest validation loss. Once there are self-critical epochs, it has the highest CIDEr.

    Args:
      state: TrainingState
      row: EpochRow
    """
    folder, progress = pathlib.Path(config.run_dir), state.progress
    check_finite(state, LOWER_RATE)
    if not progress.saves:  # killed between `best` and `last`, the first epoch could not be continued
        save_checkpoint(state, folder / "last", 0)
    progress.epoch = row.epoch
    if row.phase == CROSS_ENTROPY and row.validation_loss < progress.best_loss:
        progress.best_loss = row.validation_loss
        row = dataclasses.replace(row, best_by="validation loss")
    elif row.phase == SELF_CRITICAL and row.validation_cider > progress.best_cider:
        progress.best_cider = row.validation_cider
        row = dataclasses.replace(row, best_by="validation CIDEr")
    progress.history.append(dataclasses.asdict(row))
    if row.best_by:
        progress.best_epoch = row.epoch
        save_checkpoint(state.captioner(), folder / "best", row.epoch)
    save_last(state, config)
    write_history(progress.history, folder)


def save_last(state, config):
    """Write the checkpoint that the same command continues from."""
    check_finite(state, LOWER_RATE)
    state.progress.saves += 1
    save_checkpoint(state, pathlib.Path(config.run_dir, "last"), state.progress.saves)


def return_to_best(state, cider, config):
    """Take the best weights again, after an epoch whose captions broke down, and halve the learning rate."""
    progress = state.progress
    restored = restore_best(state, config)
    progress.rate_factor /= 2
    print(
        f"validation CIDEr fell to {cider:.3f} from {progress.best_cider:.3f}: "
        f"back to the weights of best/{restored.name}, at half the learning rate from here"
    )


def restore_best(state, config):
    """Take the weights of `best`.

    Returns:
      pathlib.Path of the checkpoint

    Raises:
      UserError: there is none that can be read.
    """
    wait_for_chief()  # it may still be writing this checkpoint
    folder = pathlib.Path(config.run_dir, "best")
    restored = restore_newest(state.captioner(), [folder], other_folder(config))
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint: {other_folder(config)}")
    return restored


def write_history(history, folder):
    """Write history.csv and loss.png, from a list of a dict for each epoch. Only the checkpoints must not fail."""
    if not history or not is_chief():
        return
    rows = [dataclasses.asdict(EpochRow(**row)) for row in history]  # rows of an older run may lack columns
    with warning_only():
        write_csv(folder / "history.csv", rows)
    with warning_only():
        plot_losses(history, folder / "loss.png")


@contextlib.contextmanager
def warning_only():
    """Print a UserError of the block as a warning: another program may hold a file open, and training goes on."""
    try:
        yield
    except UserError as error:
        print(f"warning: {error}")
