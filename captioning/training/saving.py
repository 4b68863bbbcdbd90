"""What is saved to the run folder after each epoch: checkpoints, history.csv and loss.png."""

import contextlib
import dataclasses
import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captioning.training.checkpoints import restore_newest, save_checkpoint
from captioning.training.state import CROSS_ENTROPY, SELF_CRITICAL, EpochRow, check_finite
from support.distribution import is_chief, wait_for_chief
from support.errors import FileError, UserError
from support.files import replacing, write_csv


def save_epoch(state, row, config):
    """Write the checkpoints, `best` if this epoch is, and then history.csv and loss.png.

    The best epoch has the lowest validation loss. Once there are self-critical epochs, it has the highest CIDEr.

    Args:
      state: TrainingState
      row: EpochRow
    """
    folder, progress = pathlib.Path(config.run_dir), state.progress
    check_finite(state)
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
    save_last(state, folder)
    write_history(progress.history, folder)


def save_last(state, run_dir):
    """Write the checkpoint that the same command continues from."""
    check_finite(state)
    state.progress.saves += 1
    save_checkpoint(state, pathlib.Path(run_dir, "last"), state.progress.saves)


def return_to_best(state, cider, run_dir):
    """After an epoch that collapsed: restore the best weights and halve the learning rate."""
    progress = state.progress
    restored = restore_best(state, run_dir)
    progress.rate_factor /= 2
    print(
        f"validation CIDEr fell to {cider:.3f} from {progress.best_cider:.3f}: "
        f"back to the weights of best/{restored.name}, at half the learning rate from here"
    )


def restore_best(state, run_dir):
    """Take the weights of `best`.

    Returns:
      pathlib.Path of the checkpoint

    Raises:
      FileError: there is none that can be read.
    """
    wait_for_chief()  # it may still be writing this checkpoint
    folder = pathlib.Path(run_dir, "best")
    restored = restore_newest(state.captioner(), [folder])
    if restored is None:
        raise FileError(folder, "holds no checkpoint")
    return restored


def write_history(history, folder):
    """Write history.csv and loss.png, from a list of a dict for each epoch. Only the checkpoints must not fail."""
    if not history or not is_chief():
        return
    rows = [dataclasses.asdict(EpochRow(**row)) for row in history]  # rows of an older run may lack columns
    with warning_only():
        write_csv(folder / "history.csv", rows)
    with warning_only():
        _plot_losses(history, folder / "loss.png")


@contextlib.contextmanager
def warning_only():
    """Print a UserError of the block as a warning: another program may hold a file open, and training goes on."""
    try:
        yield
    except UserError as error:
        print(f"warning: {error}")


def _plot_losses(history, path):
    """Draw training and validation loss by epoch, and where there are self-critical epochs their CIDEr.

    history: list of dicts of EpochRows, of which those of an older run may lack columns.
    """
    panels = [("loss (nats per word)", {"train_loss": "training", "validation_loss": "validation"})]
    if any(row.get("validation_cider") is not None for row in history):
        panels.append(("CIDEr", {"sampled_cider": "sampled", "validation_cider": "validation"}))
    figure = Figure(figsize=(6, 1 + 3 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, columns) in zip(rows, panels, strict=True):
        for name, label in columns.items():
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_ylabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    rows[-1].set_xlabel("epoch")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
