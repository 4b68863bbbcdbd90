"""The state of a training: what a checkpoint holds, the rows of its history, and how far it has come."""

import dataclasses
import json
import pathlib

import tensorflow as tf

from captioning.training.checkpoints import captioner_checkpoint
from captioning.training.optimizer import scheduled_rate, self_critical_rate
from support.errors import UserError


@dataclasses.dataclass(eq=False)
class Progress(tf.train.experimental.PythonState):
    """How far a training has come. A checkpoint holds it as JSON.

    The random state needs no place: every shuffle is drawn from (seed, epoch), every dropout mask from (seed, step).

    Attributes:
      epoch: epochs finished.
      best_epoch: the epoch whose weights are in `best`: the one of the lowest validation loss, or, once a self-critical
        epoch has raised it, of the highest validation CIDEr. 0 stands for the weights that a run begins with.
      best_loss: the lowest validation loss of the cross-entropy epochs, in nats per word.
      order: checksum of the order of the epoch begun last.
      captions_done: captions of that epoch that were trained on.
      nats, words, seconds: sums over these captions. In self-critical epochs nats is 0.
      ciders: sum of their CIDErs, in self-critical epochs.
      saves: checkpoints written; it numbers them.
      history: list of dicts, a row of history.csv for each epoch.
      cross_entropy_epochs: epochs that were done when the self-critical ones began, -1 where they have not.
      best_cider: the highest validation CIDEr since then.
      rate_factor: factor of the self-critical learning rate; each return to the best halves it.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    order: int = 0
    captions_done: int = 0
    nats: float = 0.0
    words: float = 0.0
    seconds: float = 0.0
    saves: int = 0
    history: list = dataclasses.field(default_factory=list)
    ciders: float = 0.0
    cross_entropy_epochs: int = -1
    best_cider: float = 0.0
    rate_factor: float = 1.0

    def add_batch(self, captions, seconds, nats=0.0, words=0.0, ciders=0.0):
        """Count a batch that was trained on."""
        self.captions_done += captions
        self.seconds += seconds
        self.nats += nats
        self.words += words
        self.ciders += ciders

    def serialize(self):
        return json.dumps(dataclasses.asdict(self))

    def deserialize(self, text):
        for name, value in json.loads(text).items():
            setattr(self, name, value)


class TrainingState(tf.train.Checkpoint):
    """All that a training must not lose: encoder, decoder, optimizer and progress.

    With loss scaling `loss_scale` is the Keras optimizer that wraps the other one. Checkpoints of another precision
    have none, so it is set after restoring.
    """

    def __init__(self, encoder, decoder, optimizer):
        super().__init__(encoder=encoder, decoder=decoder, optimizer=optimizer, progress=Progress())
        self.loss_scale = None

    @property
    def scaled_optimizer(self):
        return self.loss_scale or self.optimizer

    @property
    def trainable_variables(self):
        """The weights, those of the detector last wherever model.py makes it: the optimizer clips them apart."""
        apart = self.decoder.detector.trainable_variables
        weights = self.encoder.trainable_variables + self.decoder.trainable_variables
        return [weight for weight in weights if not any(weight is each for each in apart)] + apart

    def dropout_seed(self, seed):
        """The seed of this step's dropout masks, int (2,). A run that is continued draws the same."""
        return tf.stack((tf.constant(seed, tf.int64), tf.cast(self.optimizer.iterations, tf.int64)))  # (2,)

    def captioner(self):
        """The part of the state that captioning needs, as a tf.train.Checkpoint."""
        return captioner_checkpoint(self.encoder, self.decoder)


def check_finite(state):
    """Raise UserError where a weight is not a finite number: such a state must not be saved as a good one."""
    if not all(bool(tf.reduce_all(tf.math.is_finite(weight))) for weight in state.trainable_variables):
        raise UserError(f"the model's weights are no longer finite numbers: {LOWER_RATE}")


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
      sampled_cider: float, mean CIDEr of the captions that were drawn of training images, or None where none were.
      validation_cider: float, CIDEr of greedy captions of validation images, or None in an epoch of cross-entropy.
        Both are computed alike, each with the n-gram counts of its own images.
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


def _current_rate(progress, epochs_done, config):
    """The learning rate after some epochs of a training, which need not be a whole number."""
    if progress.cross_entropy_epochs < 0:
        return scheduled_rate(config, epochs_done)
    return progress.rate_factor * self_critical_rate(config, epochs_done - progress.cross_entropy_epochs)


def _last_epoch(progress, config):
    """The epoch that the phase of a training ends with, unless it stops sooner."""
    if progress.cross_entropy_epochs < 0:
        return config.epochs
    return progress.cross_entropy_epochs + config.self_critical_epochs


def announce_start(state, restored, config):
    """Print where the training starts or continues, and its learning rate."""
    folder, progress = config.run_dir, state.progress
    done, epochs = f"after epoch {progress.epoch}", config.epochs
    if progress.cross_entropy_epochs >= 0:
        done += f", {progress.cross_entropy_epochs} of them of cross-entropy"
        epochs = config.self_critical_epochs
    rate = "no epochs of this phase are left"
    if progress.epoch < _last_epoch(progress, config):
        rate = f"learning rate {_current_rate(progress, progress.epoch, config):.2g}"
        rate += f", {config.schedule} over {epochs} epochs"
    if restored:
        print(f"continuing {folder} {done}; {rate}")
    elif pathlib.Path(folder, "history.csv").exists():
        print(f"no checkpoint is in {folder}: training begins anew; {rate}")
    else:
        print(f"training begins; {rate}")


def announce_end(progress, run_dir):
    best = progress.history[progress.best_epoch - 1] if progress.best_epoch else {}
    score = f"{progress.best_loss:.3f} nats per word"
    if best.get("validation_cider") is not None:
        score = f"validation CIDEr {best['validation_cider']:.3f}"
    name = progress.best_epoch or "what they began with"
    print(f"trained {progress.epoch} epochs; the best is {name}, {score}")
    print(f"checkpoints, history.csv, loss.png and samples.html are in {run_dir}")
