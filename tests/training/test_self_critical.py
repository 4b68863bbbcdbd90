import dataclasses
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf

import train_image_caption_model as training
from captioning.captioner import caption_batch
from captioning.decoder.rules import _BANNED_WORDS
from captioning.evaluation.metrics import cider_by_image
from captioning.features.cache import ImageToCaption, dataset_images, feature_path, features_folder, load_data
from captioning.settings import make_config, read_settings
from captioning.training import batches, self_critical
from captioning.training.batches import image_batches, shares_of_batch
from captioning.training.checkpoints import list_checkpoints
from captioning.training.cider_reward import CiderReward
from captioning.training.epochs import begin_epoch
from captioning.training.optimizer import self_critical_rate
from captioning.training.run_folder import load_captioner
from captioning.training.sampling import longest_sample, sample_captions
from captioning.training.saving import return_to_best
from captioning.training.self_critical import (
    ImageSet,
    _add_references,
    _collect_images,
    _compare_samples,
    _policy_gradient_loss,
    _policy_step,
    _score_samples,
    _validation_cider,
)
from captioning.training.state import Progress
from captioning.vocabulary import END, PAD, SPECIAL_WORDS, START, UNK
from conftest import options, rows, weights
from model import greedy_decode
from support.errors import UserError
from tiny_captioner import SIZES, tiny_captioner

SAMPLES = 5
IMAGES = 19  # of the tiny data set's training split


class State:
    """What sampling needs of a TrainingState."""

    def __init__(self, captioner, step=0):
        self.encoder, self.decoder = captioner.encoder, captioner.decoder
        self.optimizer = type("Optimizer", (), {"iterations": tf.Variable(step, dtype=tf.int64)})()


@pytest.fixture(scope="module")
def sampled():
    """(config, state, features float (B, P, F)) of a captioner with drawn weights."""
    config = make_config(SIZES | {"max_words": 9})
    features = np.random.default_rng(5).standard_normal((6, 64, 2048)).astype(np.float32)
    return config, State(tiny_captioner(config, features)), tf.constant(features)


def sample(sampled, positions=range(6), step=0, seed=42):
    config, state, features = sampled
    state.optimizer.iterations.assign(step)
    config = dataclasses.replace(config, seed=seed)
    return sample_captions(state, features, np.array(positions), config)


# --- Sampling -----------------------------------------------------------------------------------------------------


def test_samples_are_captions_of_words_that_may_be_said(sampled):
    captions = sample(sampled)
    assert captions.shape == (6 * SAMPLES, 10)  # however soon the last of them ends
    assert (captions[:, 0] == START).all()
    for row in captions[:, 1:].tolist():
        ended = row.index(END) if END in row else len(row)
        assert not set(row[:ended]) & {*_BANNED_WORDS}
        assert set(row[ended + 1 :]) <= {PAD}
    assert len({tuple(row) for row in captions.tolist()}) > 10


def test_the_same_seed_and_step_draw_the_same_and_others_do_not(sampled):
    captions = sample(sampled, step=3)
    np.testing.assert_array_equal(sample(sampled, step=3), captions)
    for other in (sample(sampled, step=4), sample(sampled, step=3, seed=1)):
        assert other.shape != captions.shape or (other != captions).any()


def test_samples_of_no_image_are_empty(sampled):
    captions = sample(sampled, positions=[0, 1, 2, 3, -1, -1])
    by_sample = captions.reshape(SAMPLES, 6, -1)  # (S, b, T)
    assert (by_sample[:, 4:] == PAD).all()
    np.testing.assert_array_equal(by_sample[:, :4], sample(sampled).reshape(SAMPLES, 6, -1)[:, :4])


def test_a_image_without_doubt_is_sampled_as_it_is_decoded(sampled):
    """Where the probabilities leave no choice, every sample of an image is that image's greedy caption."""
    config, state, features = sampled
    kernel = state.decoder.output_layer.kernel
    before = kernel.numpy()
    kernel.assign(1000 * before)
    captions = sample(sampled).reshape(SAMPLES, 6, -1)
    greedy = greedy_decode(state.encoder, state.decoder, features, config.max_words).words.numpy()
    kernel.assign(before)
    greedy = np.pad(greedy, ((0, 0), (0, config.max_words - greedy.shape[1])), constant_values=PAD)
    for number in range(SAMPLES):
        np.testing.assert_array_equal(captions[number, :, 1:], greedy)
    assert len({tuple(row) for row in greedy.tolist()}) > 1


# --- Reward and loss ----------------------------------------------------------------------------------------------

VOCABULARY = [*SPECIAL_WORDS, "dog", "cat", "boat"]
REWARD = CiderReward([["dog"], ["cat"], ["boat"], ["dog boat"]], VOCABULARY)


def said(word):
    return [START, VOCABULARY.index(word), END]


@pytest.mark.parametrize("replicas", [1, 2])
def test_scores_are_of_each_samples_own_image(replicas, monkeypatch):
    monkeypatch.setattr(self_critical, "local_replica_ids", lambda: list(range(replicas)))
    positions = np.array([2, 0, 1, -1])
    names = np.array(["boat", "dog", "cat", "dog"])
    right = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], bool)  # (S, B): which of the samples name their image
    wrong = np.array(["cat", "boat", "dog", "cat"])
    by_sample = np.where(right, names, wrong)  # (S, B)
    parts = np.split(by_sample, replicas, axis=1)  # of each replica (S, b)
    captions = np.array([said(word) for part in parts for word in part.ravel()])
    scores = _score_samples(ImageSet(None, REWARD, []), positions, captions, 2)
    assert scores.shape == (2 * replicas, 4 // replicas)
    together = np.concatenate(np.split(scores, replicas), axis=1)  # (S, B)
    np.testing.assert_array_equal(together[:, :3] == 5, right[:, :3])  # all of an image's 1- and 2-grams, of 4
    assert (together[:, 3] == 0).all()


def test_a_process_that_has_no_image_of_a_batch_scores_none():
    scores = _score_samples(ImageSet(None, REWARD, []), np.array([-1, -1]), np.full((4, 3), PAD), 2)
    np.testing.assert_array_equal(scores, np.zeros((2, 2)))


def test_an_advantage_is_the_distance_from_the_mean_of_the_others():
    scores = np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])  # (S, b) of one replica
    advantages = _compare_samples(scores, 3)
    np.testing.assert_allclose(advantages, [1 - 4, 0 - 1.5, 2 - 3.5, 0 - 1.5, 6 - 1.5, 3 - 0])
    assert advantages.dtype == np.float32
    both = _compare_samples(np.concatenate((scores, 2 * scores)), 3)
    np.testing.assert_allclose(both, np.concatenate((advantages, 2 * advantages)))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_reference_of_each_image_stands_behind_its_replicas_samples(replicas, monkeypatch):
    monkeypatch.setattr(self_critical, "local_replica_ids", lambda: list(range(replicas)))
    long = [START, *range(4, 40), END]
    images = ImageSet(None, None, [[[START, 7, END], [START, 8, END]], [long], [[START, 9, END]] * 3])
    positions = np.array([2, 1, 0, -1])
    captions = np.full((8, 21), PAD)  # (R b S, T), two samples of each image
    captions[:, :3] = np.arange(100, 124).reshape(8, 3)
    advantages = np.arange(8, dtype=np.float32)
    config = make_config({"reference_weight": 0.25})
    joined, weights = _add_references(images, positions, captions, advantages, 3, config)
    assert joined.shape == (12, 21) and weights.dtype == np.float32
    order = (
        [0, 1, 2, 3, 4, 5, 6, 7, "r", "r", "r", "r"] if replicas == 1 else [0, 1, 2, 3, "r", "r", 4, 5, 6, 7, "r", "r"]
    )
    np.testing.assert_allclose(weights, [0.25 if row == "r" else advantages[row] for row in order])
    is_sample = np.array([row != "r" for row in order])
    np.testing.assert_array_equal(joined[is_sample], captions)
    references = joined[~is_sample].tolist()
    assert references[0] == [START, 9, END] + [PAD] * 18  # the fourth epoch's is the first of three
    assert references[1] == long[:21]  # cut where the longest sample ends
    assert references[2] == [START, 8, END] + [PAD] * 18  # the second of two
    assert references[3] == [PAD] * 21
    same = _add_references(images, positions, captions, advantages, 3, make_config({"reference_weight": 0}))
    assert same[0] is captions and same[1] is advantages


def test_the_loss_is_reinforce_with_the_banned_words_barred():
    rng = np.random.default_rng(0)
    captions = tf.constant([[START, 5, 4, END], [START, 6, END, PAD]])
    logits = tf.Variable(rng.standard_normal((5, 7)), dtype=tf.float32)  # (N, V), words 5 6 4 END END
    advantages = np.array([2.0, -0.5])
    with tf.GradientTape() as tape:
        loss = _policy_gradient_loss(captions, logits, tf.constant(advantages, tf.float32))
    open_words = np.delete(np.arange(7), _BANNED_WORDS)
    exponents = np.exp(logits.numpy()[:, open_words])
    probabilities = np.zeros((5, 7))
    probabilities[:, open_words] = exponents / exponents.sum(1, keepdims=True)
    words, by_word = [5, 6, 4, END, END], advantages[[0, 1, 0, 1, 0]]
    assert words[3] == END  # the second word of the second caption comes before the third of the first
    expected = -np.mean(by_word * np.log(probabilities[range(5), words]))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    gradient = by_word[:, None] * (probabilities - np.eye(7)[words]) / 5
    np.testing.assert_allclose(tape.gradient(loss, logits), gradient, atol=1e-6)


def test_an_unknown_word_of_a_reference_teaches_nothing():
    """It may not be said, so its probability is none, and nothing that is learned raises it."""
    rng = np.random.default_rng(0)
    logits = tf.Variable(rng.standard_normal((5, 7)), dtype=tf.float32)  # (N, V)
    advantages = tf.constant([2.0, 0.5])
    known = [0, 1, 4, 3]  # of 5, 6, <unk>, the second <end> and the first, in the order of the captions without <unk>
    with tf.GradientTape(persistent=True) as tape:
        loss = _policy_gradient_loss(tf.constant([[START, 5, UNK, END], [START, 6, END, PAD]]), logits, advantages)
        kept = tf.gather(logits, known)
        expected = _policy_gradient_loss(tf.constant([[START, 5, END], [START, 6, END]]), kept, advantages[:2])
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    gradient = tape.gradient(loss, logits).numpy()
    assert not gradient[2].any()
    assert not gradient[:, UNK].any()
    np.testing.assert_allclose(gradient, tf.convert_to_tensor(tape.gradient(expected, logits)), atol=1e-7)


def test_a_replicas_share_of_the_words_is_of_those_that_are_learned(monkeypatch):
    captions = tf.constant([[START, 5, UNK, END], [START, UNK, UNK, PAD], [PAD, PAD, PAD, PAD]])
    monkeypatch.setattr(batches, "sum_replicas", lambda counts: tf.constant([8.0, 4.0]))
    assert [float(share) for share in shares_of_batch(captions)] == [5 / 8, 2 / 4]
    assert [float(share) for share in shares_of_batch(captions, UNK)] == [2 / 8, 2 / 4]


def test_the_loss_of_no_caption_is_0():
    captions = tf.fill((2, 3), PAD)
    assert float(_policy_gradient_loss(captions, tf.zeros((0, 7)), tf.zeros(2))) == 0


# --- Batches ------------------------------------------------------------------------------------------------------


def test_batches_hold_each_images_features_and_position(trained):
    config = settings_of(trained, trained / "run", "--images_per_step", "4")
    images = load_data(config).train[:6]
    paths = tf.constant([str(feature_path(image, features_folder(config))) for image in images])
    read = [(features.numpy(), positions.numpy()) for features, positions in image_batches(paths, ORDER, config)]
    assert [positions.tolist() for _, positions in read] == [[5, 0, 3, 1], [2, 4, -1, -1]]
    for features, positions in read:
        assert features.shape == (4, 64, 2048)
        for feature, position in zip(features, positions, strict=True):
            np.testing.assert_array_equal(feature, np.load(feature_path(images[position], features_folder(config))))


ORDER = np.array([5, 0, 3, 1, 2, 4])

# --- The phase ----------------------------------------------------------------------------------------------------

QUICK = ["--images_per_step", "8", "--self_critical_rate", "0.01", "--schedule", "constant"]
QUICK += ["--dropout", "0", "--doubly_stochastic", "0", "--precision", "float32"]  # other rounding draws other captions
EPOCHS = 10
PHASE = ["--self_critical_epochs", str(EPOCHS)]


def settings_of(trained, run, *more):
    return read_settings([*options(trained), "--run_dir", str(run), *more], "")[0]


def continue_run(trained, root, *more):
    """Train on from a copy of the run of two epochs; `root`/run may be there already."""
    if not (root / "run").exists():
        shutil.copytree(trained / "run", root / "run")
    training.main([*options(trained), "--run_dir", str(root / "run"), "--epochs", "2", *QUICK, *more])


@pytest.fixture(scope="module")
def taught(trained, tmp_path_factory):
    """The root of the trained run with 10 self-critical epochs behind its 2; tests only read it."""
    root = tmp_path_factory.mktemp("taught")
    continue_run(trained, root, *PHASE)
    return root


def test_the_captions_that_are_sampled_get_better(taught):
    sampled = [float(row["sampled_cider"]) for row in rows(taught)[2:]]
    assert np.mean(sampled[-5:]) > 1.2 * np.mean(sampled[:2]) > 0


def test_the_cider_of_samples_is_on_the_scale_of_validation(trained, monkeypatch):
    """The captions that were drawn in an epoch, scored as validation scores them, give the number in history.csv."""
    config = settings_of(trained, trained / "run", *QUICK, *PHASE)
    prepared, drawn = load_data(config), {}
    state = training.build_state(prepared, "float32", config)
    state.progress.cross_entropy_epochs = 0

    def record(state, features, positions, config):
        captions = sample_captions(state, features, positions, config)
        by_sample = captions.reshape(config.samples_per_image, len(positions), -1)  # (S, b, T)
        drawn.update({position: by_sample[:, b] for b, position in enumerate(positions) if position >= 0})
        return captions

    monkeypatch.setattr(self_critical, "sample_captions", record)
    images = _collect_images(prepared.train, prepared.vocabulary, features_folder(config))
    row = self_critical._train_epoch(state, images, 0, config)
    references = {position: prepared.train[position].references for position in drawn}
    write = lambda words: " ".join(prepared.vocabulary[i] for i in words if i not in (PAD, START, END))  # noqa: E731
    ciders = [
        cider
        for number in range(config.samples_per_image)
        for cider in cider_by_image({p: write(captions[number]) for p, captions in drawn.items()}, references).values()
    ]
    assert len(drawn) == IMAGES and np.mean(ciders) > 0
    assert row.sampled_cider == pytest.approx(np.mean(ciders), rel=1e-6)


def test_history_tells_the_phases_and_why_an_epoch_was_the_best(taught, trained):
    history = rows(taught)
    assert [row["epoch"] for row in history] == [str(number + 1) for number in range(2 + EPOCHS)]
    assert [row["phase"] for row in history] == 2 * ["cross-entropy"] + EPOCHS * ["self-critical"]
    assert [row["train_loss"] == "" for row in history] == 2 * [False] + EPOCHS * [True]
    assert [row["validation_cider"] == "" for row in history] == 2 * [True] + EPOCHS * [False]
    assert all(float(row["validation_loss"]) > 0 for row in history)
    assert [row["best_by"] for row in history[:2]] == [row["best_by"] for row in rows(trained)]
    best = float("-inf")
    for row in history[2:]:
        cider = float(row["validation_cider"])
        assert row["best_by"] in ("", "validation CIDEr")
        if row["best_by"]:
            assert cider > best
        best = max(best, cider)


def test_the_best_checkpoint_is_that_of_the_highest_cider(taught, trained):
    chosen = [row for row in rows(taught) if row["best_by"]][-1]
    assert chosen["best_by"] == "validation CIDEr"
    config = settings_of(trained, taught / "run")
    captioner = load_captioner(config)
    assert captioner.checkpoint == f"best/ckpt-{chosen['epoch']}"
    prepared = load_data(config)
    images = dataset_images(prepared.validation, config)
    cider = _validation_cider(captioner, images, prepared.vocabulary, config)
    assert cider == pytest.approx(float(chosen["validation_cider"]), abs=1e-6)


@pytest.mark.slow
def test_a_run_stopped_in_this_phase_goes_on_and_ends_as_if_nothing_had_been(taught, trained, tmp_path, monkeypatch):
    """3 batches an epoch: stopped in the first epoch's second, and in a later one's validation."""
    for batch in (2, 6):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, batch)
            continue_run(trained, tmp_path, *PHASE)
    continue_run(trained, tmp_path, *PHASE)
    expected = weights(taught)
    for name, value in weights(tmp_path).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    for mine, theirs in zip(rows(tmp_path), rows(taught), strict=True):
        for name in set(mine) - {"captions_per_second"}:
            assert mine[name] == theirs[name] or float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)


def interrupt_at(monkeypatch, batch):
    real, read = self_critical.image_batches, []

    def counted(*args):
        for item in real(*args):
            read.append(1)
            if len(read) == batch:
                signal.raise_signal(signal.SIGINT)
            yield item

    monkeypatch.setattr(self_critical, "image_batches", counted)


def test_more_epochs_of_cross_entropy_come_too_late(taught, trained, tmp_path, capsys):
    shutil.copytree(taught / "run", tmp_path / "run")
    before = weights(tmp_path)
    continue_run(trained, tmp_path, "--epochs", "29")
    for name, value in weights(tmp_path).items():
        np.testing.assert_array_equal(value, before[name])
    printed = capsys.readouterr().out
    assert "after epoch 12, 2 of them of cross-entropy; no epochs of this phase are left" in printed


def test_captions_that_break_down_take_the_run_back_to_its_best(trained, tmp_path, monkeypatch, capsys):
    ciders = iter([0.5, 0.6, 0.47, 0.55])  # at the start, then after each epoch; 0.47 is under 0.8 of 0.6
    monkeypatch.setattr(self_critical, "_validation_cider", lambda *args: next(ciders))
    continue_run(trained, tmp_path, "--self_critical_epochs", "3")
    printed = capsys.readouterr().out
    assert "self-critical epochs begin with the weights of best/ckpt-2, at a validation CIDEr of 0.500" in printed
    line = "validation CIDEr fell to 0.470 from 0.600: back to the weights of best/ckpt-3, at half the learning rate"
    assert printed.count("fell to") == 1 and line in printed
    progress = Progress()
    tf.train.Checkpoint(progress=progress).read(list_checkpoints(tmp_path / "run" / "last")[0]).expect_partial()
    assert (progress.rate_factor, progress.best_cider, progress.best_epoch) == (0.5, 0.6, 3)
    assert [row["best_by"] for row in rows(tmp_path)[2:]] == ["validation CIDEr", "", ""]


def test_the_phase_begins_with_the_best_weights_of_cross_entropy(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = settings_of(trained, tmp_path / "run", "--self_critical_epochs", "4")
    prepared = load_data(config)
    state = training.open_run(prepared, config)
    progress = state.progress
    for weight in state.trainable_variables:
        weight.assign(weight + 1)
    progress.epoch = 5  # as if three epochs had made it no better
    best = load_captioner(config)
    expected = best.encoder.trainable_variables + best.decoder.trainable_variables
    self_critical._begin(state, lambda: 0.25, config.run_dir)
    for weight, value in zip(state.trainable_variables, expected, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert (progress.best_cider, progress.cross_entropy_epochs, progress.epoch) == (0.25, 5, 5)
    assert "begin with the weights of best/ckpt-2, at a validation CIDEr of 0.250" in capsys.readouterr().out


def test_a_run_without_its_best_checkpoint_does_not_begin_the_phase(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(UserError, match="best holds no checkpoint: give another --run_dir"):
        continue_run(trained, tmp_path, "--self_critical_epochs", "1")


@pytest.mark.slow
def test_references_are_learned_beside_the_samples(trained, tmp_path):
    losses = {}
    for weight in "0", "5":
        continue_run(trained, tmp_path / weight, *PHASE, "--reference_weight", weight)
        losses[weight] = np.mean([float(row["validation_loss"]) for row in rows(tmp_path / weight)[-5:]])
    assert losses["5"] < losses["0"] - 0.05, losses  # it is 0.18 less


def test_the_best_weights_are_what_the_guard_brings_back(taught, trained):
    config = settings_of(trained, taught / "run", "--self_critical_epochs", "4")
    prepared = load_data(config)
    state = training.open_run(prepared, config)
    for weight in state.trainable_variables:
        weight.assign(weight + 1)
    return_to_best(state, 0.1, config.run_dir)
    best = load_captioner(config)
    expected = best.encoder.trainable_variables + best.decoder.trainable_variables
    for weight, value in zip(state.trainable_variables, expected, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_the_rate_falls_over_the_epochs_of_this_phase():
    config = make_config({"self_critical_epochs": 10, "self_critical_rate": 0.2})
    rates = [self_critical_rate(config, epochs) for epochs in (0, 5, 10, 11)]
    np.testing.assert_allclose(rates, [0.2, 0.1, 0, 0], atol=1e-12)
    constant = dataclasses.replace(config, schedule="constant")
    assert self_critical_rate(constant, 7) == 0.2


def test_fewer_than_two_samples_cannot_be_compared():
    with pytest.raises(UserError, match="samples_per_image"):
        make_config({"samples_per_image": 1})


def test_images_are_known_by_their_position(trained):
    config = settings_of(trained, trained / "run")
    prepared = load_data(config)
    images = _collect_images(prepared.train, prepared.vocabulary, features_folder(config))
    assert len(images.feature_paths) == IMAGES == len(images.reward.references)
    third = prepared.train[2]
    assert images.feature_paths[2].numpy().decode() == str(feature_path(third, features_folder(config)))
    assert len(images.reward.references[2]) == len(third.references)


@pytest.mark.parametrize("other", [(2, [0, 1, 2], 5), (1, [0, 2, 1], 5), (1, [0, 1, 2], 4)])
def test_an_epoch_in_another_order_or_with_other_samples_begins_anew(other):
    progress = Progress()
    begin_epoch(progress, 1, np.array([0, 1, 2]), 5)
    progress.captions_done, progress.ciders = 10, 2.0
    begin_epoch(progress, 1, np.array([0, 1, 2]), 5)
    assert (progress.captions_done, progress.ciders) == (10, 2.0)
    epoch, order, samples = other
    begin_epoch(progress, epoch, np.array(order), samples)
    assert (progress.captions_done, progress.ciders) == (0, 0)


@pytest.mark.parametrize("rate", ["0", "0.5"])
def test_each_sample_is_taught_with_its_own_image(taught, trained, rate):
    """The loss of a step is that of captions whose features, less the channels dropped, are put together by hand."""
    more = ["--dropout", "0", "--feature_dropout", rate, "--precision", "float32", "--samples_per_image", "3"]
    config = settings_of(trained, taught / "run", *more)
    prepared = load_data(config)
    state = training.open_run(prepared, config)
    paths = [feature_path(image, features_folder(config)) for image in prepared.train[:2]]
    features = np.stack([np.load(path) for path in paths])  # (B, P, F)
    captions = np.full((6, 1 + longest_sample(config.max_words)), PAD)  # (B S, T)
    captions[:, :4] = [[START, 5 + i, 6 + i, END] for i in range(6)]
    advantages = np.array([1, -2, 3, -4, 5, -6], np.float32)
    images = _collect_images(prepared.train, prepared.vocabulary, features_folder(config))
    captions, advantages = _add_references(images, np.arange(2), captions, advantages, 0, config)
    assert captions[6:, 1:].any(axis=1).all() and (advantages[6:] == np.float32(0.3)).all()
    encoded_features = state.encoder(tf.constant(features), dropout_seed=state.dropout_seed(config.seed))
    by_caption = tf.gather(encoded_features, [0, 1] * 4)  # first samples, second samples, third samples, references
    logits, _ = state.decoder.teacher_forcing(tf.constant(captions), by_caption)
    expected = float(_policy_gradient_loss(tf.constant(captions), logits, tf.constant(advantages)))
    loss = _policy_step(state, tf.constant(features), tf.constant(captions), tf.constant(advantages), config)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_validation_cider_is_of_greedy_captions_against_every_reference(sampled, tmp_path):
    config, state, features = sampled
    captioner = tiny_captioner(config, features.numpy())
    images = []
    for number, feature in enumerate(features.numpy()):
        np.save(tmp_path / f"{number}.npy", feature)
        path = tmp_path / f"{number}.jpg"
        images.append(ImageToCaption(path, path.name, number, feature_path=tmp_path / f"{number}.npy"))
    said = {caption.image_id: caption.caption for caption in caption_batch(captioner, images, features, config)}
    assert len({*said.values()}) > 2
    others = ["of another thing", "not like that at all", "nothing of this is there"]
    for place in (0, 1, 2):
        told = [
            dataclasses.replace(image, references=[*others[:place], said[image.image_id], *others[place:]])
            for image in images
        ]
        beams = dataclasses.replace(config, beam_width=3, decode_batch=4)
        references = {image.image_id: image.references for image in told}
        expected = np.mean(list(cider_by_image(said, references).values()))
        assert expected > 1
        assert _validation_cider(captioner, told, captioner.vocabulary, beams) == pytest.approx(expected, rel=1e-6)
