"""Script 2: train the captioner on what data_utils.py prepared; the same command continues a run that stopped.

python train_image_caption_model.py [--dataset coco|demo] [--<field> VALUE ...]
"""

import contextlib
import csv
import dataclasses
import pathlib
import shutil
import time
import zlib

from command_line import UserError, interrupts_held_back, parse_command_line, run_script
from data_utils import (
    CHANNELS,
    LOCATIONS,
    PAD,
    feature_path,
    has_fast_bfloat16,
    load_prepared,
    parallel_map,
    read_feature,
)
from distribution import (
    SummedAdam,
    check_same_everywhere,
    is_chief,
    own_rows,
    replicas,
    run_replicas,
    share_batches,
    sum_replicas,
)
from files import free_space, locked, read_json, remove_leftovers, replacing, write_csv, write_json
from model import attention_loss, build_captioner, caption_loss

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

# What the weights' shapes depend on, besides the vocabulary: a run continues only with the same values.
MODEL_SETTINGS = ("encoder_dim", "embedding_dim", "units")


def main(argv):
    config, _ = parse_command_line(argv, __doc__)
    with replicas(config):
        train_captioner(config)


def train_captioner(config):
    """Train as the settings say, or continue to; all processes of a run that has several call this."""
    prepared = load_prepared(config)
    with locked(config.run_dir) if is_chief() else contextlib.nullcontext():
        run = open_run(prepared, config)
        history = read_history(run, config)
        train = collect_captions(prepared.train, config)
        validation = collect_captions(prepared.validation, config)
        try:
            with interrupts_held_back() as stop_if_asked:
                train_epochs(run, history, train, validation, stop_if_asked, config)
        except KeyboardInterrupt:
            save_last(run, config)
            print(f"stopped in epoch {run.epoch.numpy() + 1}, after {run.captions_done.numpy()} captions: saved")
            raise
    epochs, best_epoch, best_loss = (value.numpy() for value in (run.epoch, run.best_epoch, run.best_loss))
    print(f"trained {epochs} epochs; the best is {best_epoch}, {best_loss:.3f} nats per word")
    print(f"checkpoints, history.csv and loss.png are in {config.run_dir}")


# --- The run folder ---------------------------------------------------------------------------------------------


def open_run(prepared, config):
    """Build models and optimiser, and restore the last checkpoint of `run_dir` if there is one.

    Returns:
      tf.train.Checkpoint with encoder, decoder, optimizer, epoch (epochs finished), best_epoch and best_loss. The
      random state is in it as `epoch` and the optimiser's step count: every shuffle is drawn from (seed, epoch) and
      every dropout mask from (seed, step). Of the epoch begun last it has the order (as a checksum), captions_done,
      and the sums of loss (nats), words and seconds so far; saves numbers the checkpoints. With precision
      mixed_float16, also loss_scale, which wraps the optimizer.

    Raises:
      UserError: the folder holds a run with another vocabulary or other sizes, no checkpoint in it can be read, or it
        is not the same for all workers.
    """
    folder = pathlib.Path(config.run_dir)
    saved = checkpoints(folder / "last")
    check_same_everywhere(
        float(checkpoint_number(saved[0])) if saved else 0.0,
        f"{folder} does not hold the same on every worker: set --run_dir to one folder that all of them share",
    )
    if saved:
        check_run_fits(folder, config, prepared.vocabulary)
    if is_chief():
        remove_leftovers(folder)
        write_json(folder / "config.json", dataclasses.asdict(config), indent=1)
        write_json(folder / "vocabulary.json", prepared.vocabulary)

    precision = config.precision
    if precision == "auto":
        precision = "mixed_bfloat16" if has_fast_bfloat16() else "float32"
    encoder, decoder = build_captioner(
        config, len(prepared.vocabulary), prepared.feature_mean, prepared.feature_std, precision
    )
    # Otherwise much of the first epoch is spent on learning which words are frequent.
    decoder.make_logits.bias.assign(starting_bias(prepared.train, len(prepared.vocabulary)))
    optimizer = SummedAdam(learning_rate(prepared.train, config), global_clipnorm=config.clip_norm)
    weights = encoder.trainable_variables + decoder.trainable_variables
    optimizer.build(weights)
    run = tf.train.Checkpoint(
        encoder=encoder,
        decoder=decoder,
        optimizer=optimizer,
        epoch=tf.Variable(0, dtype=tf.int64),
        best_epoch=tf.Variable(0, dtype=tf.int64),
        best_loss=tf.Variable(np.inf, dtype=tf.float64),
        order=tf.Variable(0, dtype=tf.int64),
        captions_done=tf.Variable(0, dtype=tf.int64),
        nats=tf.Variable(0, dtype=tf.float64),
        words=tf.Variable(0, dtype=tf.float64),
        seconds=tf.Variable(0, dtype=tf.float64),
        saves=tf.Variable(0, dtype=tf.int64),
    )
    if restore_newest(run, folder / "last"):
        print(f"continuing {folder} after epoch {run.epoch.numpy()}")
    elif (folder / "history.csv").exists():
        print(f"no checkpoint is in {folder / 'last'}: training begins anew")
    if precision == "mixed_float16":  # after restoring: a checkpoint of another precision has none
        run.loss_scale = keras.optimizers.LossScaleOptimizer(optimizer)
        run.loss_scale.build(weights)
    return run


def starting_bias(images, vocab_size):
    """The output layer's bias before training: logarithms of the words' shares of all that the captions say.

    As in Karpathy's NeuralTalk (github.com/karpathy/neuraltalk), but half of each share is any word's, 1 / V: where
    rare words start at nearly 0, the training captions are sooner learned by heart.

    Returns:
      float (V,)
    """
    said = np.concatenate([words[1:] for image in images for words in image["ids"]])
    shares = np.bincount(said, minlength=vocab_size) / len(said)  # (V,)
    return np.log((shares + 1 / vocab_size) / 2)  # (V,)


def learning_rate(images, config):
    """Adam's step size by the optimiser's step; a function whatever `schedule` says, so that a run may change it."""
    captions = sum(len(image["ids"]) for image in images)
    steps = config.epochs * -(-captions // config.batch_size)
    lowest = {"constant": 1.0, "cosine": 0.0}[config.schedule]  # share of learning_rate that it falls to
    return keras.optimizers.schedules.CosineDecay(config.learning_rate, steps, alpha=lowest)


def check_run_fits(folder, config, vocabulary):
    """Raise UserError where the run in `folder` has another vocabulary or other sizes than are asked for."""
    mend = "give another --run_dir, or delete that folder, and run python train_image_caption_model.py again"
    saved = read_json(folder / "config.json", mend, dict)
    for name in MODEL_SETTINGS:
        if saved.get(name) != getattr(config, name):
            raise UserError(
                f"{folder} was trained with --{name} {saved.get(name)}, not {getattr(config, name)}: {mend}"
            )
    known = read_json(folder / "vocabulary.json", mend, list)
    if known != vocabulary:
        raise UserError(
            f"{folder} was trained with another vocabulary ({len(known)} words) "
            f"than {config.data_dir}'s ({len(vocabulary)} words): {mend}"
        )


def read_history(run, config):
    """The rows of history.csv up to the restored epoch: a later row's epoch was not saved and is trained again."""
    path = pathlib.Path(config.run_dir, "history.csv")
    if not path.exists() or not run.epoch.numpy():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        rows = [{**row, "epoch": int(row["epoch"])} for row in rows if row["epoch"] <= run.epoch.numpy()]
        if not rows or not all({"train_loss", "validation_loss", "captions_per_second"} <= row.keys() for row in rows):
            raise ValueError("epochs or losses are missing")
    except (ValueError, TypeError, KeyError, OverflowError, OSError, csv.Error) as error:
        print(f"{path} cannot be read ({error}): it begins anew after epoch {run.epoch.numpy()}")
        return []
    return rows


def save_epoch(run, history, config):
    """Write history.csv, loss.png, and the checkpoints: `best` if this epoch is, and `last`, which ends the epoch."""
    folder = pathlib.Path(config.run_dir)
    row = history[-1]
    run.epoch.assign(row["epoch"])
    if is_chief():
        write_csv(folder / "history.csv", history)
        plot_losses(history, folder / "loss.png")
    if row["validation_loss"] < run.best_loss.numpy():
        run.best_loss.assign(row["validation_loss"])
        run.best_epoch.assign(row["epoch"])
        weights = tf.train.Checkpoint(encoder=run.encoder, decoder=run.decoder)
        save_checkpoint(weights, folder / "best", row["epoch"])
    save_last(run, config)


def save_last(run, config):
    run.saves.assign_add(1)
    save_checkpoint(run, pathlib.Path(config.run_dir, "last"), int(run.saves.numpy()))


def save_checkpoint(objects, folder, number):
    """Write a tf.train.Checkpoint's objects as `folder`/ckpt-`number`, and keep the one before it and no others.

    Of several workers only the chief writes.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    if not is_chief():
        return
    path = folder / f"ckpt-{number}"
    try:
        objects.write(path)
    except tf.errors.OpError as error:
        reason = error.message.rpartition("; ")[2].partition(" [Op")[0]
        raise UserError(f"cannot write {path}: {reason} ({free_space(folder)})") from error
    finally:
        kept = [checkpoint.name for checkpoint in checkpoints(folder) if checkpoint_number(checkpoint) <= number][:2]
        for file in folder.glob("ckpt-*"):
            if file.is_dir():  # of a save that was killed or failed
                shutil.rmtree(file)
            elif file.name.partition(".")[0] not in kept:
                file.unlink()


def restore_newest(objects, folder):
    """Restore a tf.train.Checkpoint's objects from the newest checkpoint in `folder` that can be read.

    Returns:
      bool, whether there was one.

    Raises:
      UserError: there are some, and none can be read.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            objects.read(path).assert_existing_objects_matched().expect_partial()
        except Exception as error:  # TensorFlow raises many kinds for damaged files
            reason = str(error).partition("\n")[0]
            damaged.append(f"{path} cannot be read ({reason})")
            continue
        for problem in damaged:
            print(f"{problem}: {path.name} is taken instead")
        return True
    if damaged:
        raise UserError(f"{damaged[0]}: delete {folder.parent} and run python train_image_caption_model.py again")
    return False


def checkpoints(folder):
    """The paths of the checkpoints in a folder, without endings, the newest first."""
    return sorted((path.with_suffix("") for path in folder.glob("ckpt-*.index")), key=checkpoint_number, reverse=True)


def checkpoint_number(path):
    return int(path.name.removeprefix("ckpt-"))


def plot_losses(history, path):
    """Draw training and validation loss by epoch as a PNG file, without a display."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss (nats per word)")
    epochs = [row["epoch"] for row in history]
    for name, label in (("train_loss", "training"), ("validation_loss", "validation")):
        axes.plot(epochs, [row[name] for row in history], marker=".", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


# --- Batches ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Captions:
    """The N captions of a split, and behind them an empty one."""

    paths: tf.Tensor  # (N + 1,) string, of each one's features
    words: tf.RaggedTensor  # (N + 1, T) int32
    lengths: np.ndarray  # (N,), words of each


def collect_captions(images, config):
    ids = [words for image in images for words in image["ids"]]
    paths = [str(feature_path(image, config)) for image in images for _ in image["ids"]]
    lengths = np.array([len(words) for words in ids])
    return Captions(
        paths=tf.constant([*paths, paths[-1]]),
        words=tf.RaggedTensor.from_row_lengths(np.concatenate(ids).astype(np.int32), [*lengths, 0]),
        lengths=lengths,
    )


def plan_batches(lengths, batch_size, rng):
    """The order of an epoch: every caption once, those of a batch of two lengths, the batches in random order.

    The first half of a batch has captions of one length, longer than most, and the other half captions of another,
    shorter than most: so `say_words` has few words to fill up, and no batch teaches that all captions are so long.

    Args:
      lengths: int (N,), words of each caption.
      batch_size: int, B.
      rng: np.random.Generator

    Returns:
      int (N,): positions of captions; each B in a row are a batch. The last, smaller one takes any lengths.
    """
    order = rng.permutation(len(lengths))
    count, short = len(order) // batch_size, batch_size // 2
    full = count * batch_size
    by_length = order[:full][np.argsort(lengths[order[:full]], kind="stable")]
    shorter = by_length[: count * short].reshape(count, short)
    longer = by_length[count * short :].reshape(count, batch_size - short)
    batches = np.concatenate([rng.permutation(longer), rng.permutation(shorter)], axis=1)
    return np.concatenate([batches.ravel(), order[full:]])


def caption_batches(captions, order, config):
    """A tf.data pipeline of (features (B, P, F), captions (B, T)), each batch padded to its longest caption.

    The last batch is filled up with empty captions, so that all are of one size: another would be compiled apart. Of
    several processes each reads its share of every batch.
    """

    def read(positions, longest):
        paths = tf.gather(captions.paths, positions)  # (B,)
        dtype = tf.as_dtype(config.feature_dtype)
        features = tf.map_fn(lambda path: read_feature(path, dtype), paths, fn_output_signature=dtype)  # (B, P, F)
        words = tf.gather(captions.words, positions).to_tensor(PAD, shape=tf.stack((-1, longest)))  # (B, T)
        return features, words

    positions = share_batches(order, config.batch_size) % len(captions.paths)  # -1 is the last, which is empty
    longest = np.maximum.reduceat(captions.lengths[order], batch_starts(order, config))
    return parallel_map(read, (positions, longest)).prefetch(2)


def batch_starts(order, config):
    return np.arange(0, len(order), config.batch_size)


def count_tokens(captions, order, config):
    """The words to be said in each batch, <end> among them. float (number of batches,)."""
    return np.add.reduceat(captions.lengths[order] - 1.0, batch_starts(order, config))


def batch_shapes(config):
    """Shapes and types of a batch of any size and length, so that one graph serves them all."""
    features = tf.TensorSpec((None, LOCATIONS, CHANNELS), config.feature_dtype)  # (B, P, F)
    return features, tf.TensorSpec((None, None), tf.int32)  # (B, T)


# --- Steps ------------------------------------------------------------------------------------------------------


def train_epochs(run, history, train, validation, stop_if_asked, config):
    """Train, validate and save until `epochs` are done or validation has not got better for `patience` epochs."""
    for epoch in range(int(run.epoch.numpy()), config.epochs):
        if epoch - int(run.best_epoch.numpy()) >= config.patience:
            print(f"no better validation loss for {config.patience} epochs (--patience): stopping")
            break
        row = train_epoch(run, train, epoch, config, stop_if_asked)
        row["validation_loss"] = validate(run, validation, config, stop_if_asked)
        history.append(row)
        save_epoch(run, history, config)


def train_epoch(run, captions, epoch, config, stop_if_asked=lambda: None):
    """Train one pass over the captions, or what is left of it where the epoch was stopped.

    Args:
      stop_if_asked: function called before each batch, as interrupts_held_back gives.

    Returns:
      dict: epoch (counted from 1), train_loss (nats per word, dropout on), captions_per_second.

    Raises:
      UserError: the loss is not finite.
    """
    order = plan_batches(captions.lengths, config.batch_size, np.random.default_rng((config.seed, epoch)))
    checksum = zlib.crc32(order.tobytes(), epoch)
    if int(run.order.numpy()) != checksum:  # the epoch begins, or its batches are no longer the same
        run.order.assign(checksum)
        for counter in (run.captions_done, run.nats, run.words, run.seconds):
            counter.assign(0)
    done, total = int(run.captions_done.numpy()), len(order)
    order = order[done:]
    tokens = count_tokens(captions, order, config)
    # Traced at the first call only. It is called with all arguments: without those that are no tensors TensorFlow first
    # makes up an error message, with the whole batch in it, at each call.
    step = train_step.get_concrete_function(run, *batch_shapes(config), config)
    losses, start = [], time.perf_counter()
    title = f"epoch {epoch + 1}/{config.epochs}"
    batches = caption_batches(captions, order, config) if len(order) else ()
    with tqdm(total=total, initial=done, desc=title, unit=" captions", disable=not is_chief()) as bar:
        for count, (features, words) in zip(tokens, batches, strict=True):
            stop_if_asked()
            losses.append(float(step(run, features, words, config)))
            if not np.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is {losses[-1]} at batch {done // config.batch_size + 1} of epoch {epoch + 1}: lower "
                    "--learning_rate or --clip_norm and run the same command, which continues from the last good "
                    "checkpoint"
                )
            size = min(config.batch_size, total - done)
            done += size
            run.captions_done.assign(done)
            run.nats.assign_add(losses[-1] * count)
            run.words.assign_add(count)
            run.seconds.assign_add(time.perf_counter() - start)
            start = time.perf_counter()
            recent = np.average(losses[-50:], weights=tokens[: len(losses)][-50:])
            bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
            bar.update(size)
    return {
        "epoch": epoch + 1,
        "train_loss": float(run.nats.numpy() / run.words.numpy()),
        "captions_per_second": round(total / run.seconds.numpy(), 1),
    }


@tf.function
def train_step(run, features, captions, config):
    """One optimiser step. features (B, P, F), captions (B, T) -> loss (), nats per word."""
    return run_replicas(train_replica, run, features, captions, config)


def train_replica(run, features, captions, config):
    """A replica's part of train_step: what is summed over the replicas is what one replica would compute."""
    features, captions = own_rows(features), own_rows(captions)
    word_share, caption_share = shares_of_batch(captions)
    dropout_seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(run.optimizer.iterations, tf.int64)))  # (2,)
    weights = run.encoder.trainable_variables + run.decoder.trainable_variables
    optimizer = getattr(run, "loss_scale", run.optimizer)
    with tf.GradientTape() as tape:
        logits, attention_weights = run.decoder.teach(captions, run.encoder(features), dropout_seed)
        loss = caption_loss(captions, logits) * word_share
        total = loss + config.doubly_stochastic * attention_loss(captions, attention_weights) * caption_share
        total = optimizer.scale_loss(total)
    loss, *gradients = sum_replicas([loss, *tape.gradient(total, weights)])
    optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return loss


def shares_of_batch(captions):
    """This replica's share of the words and of the captions of the whole batch. int (B, T) -> float (), float ()."""
    words = tf.cast(captions[:, 1:] != PAD, tf.float32)  # (B, T-1)
    counts = tf.stack((tf.reduce_sum(words), tf.reduce_sum(tf.reduce_max(words, axis=1))))  # (2,)
    return tf.unstack(counts / sum_replicas(counts))


def validate(run, captions, config, stop_if_asked=lambda: None):
    """The loss over all captions, dropout off, in nats per word."""
    order = np.argsort(captions.lengths, kind="stable")
    step = validation_step.get_concrete_function(run, *batch_shapes(config))
    losses = []
    for features, words in caption_batches(captions, order, config):
        stop_if_asked()
        losses.append(float(step(run, features, words)))
    return float(np.average(losses, weights=count_tokens(captions, order, config)))


@tf.function
def validation_step(run, features, captions):
    return run_replicas(validate_replica, run, features, captions)


def validate_replica(run, features, captions):
    features, captions = own_rows(features), own_rows(captions)
    word_share, _ = shares_of_batch(captions)
    logits, _ = run.decoder.teach(captions, run.encoder(features))
    return sum_replicas(caption_loss(captions, logits) * word_share)


if __name__ == "__main__":
    run_script(main)
