"""The benchmarks are run by hand. What is tested here: that the comparisons they rest on see what is wrong."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import model
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.features.cache import features_folder
from captioning.inference.captions_file import make_record
from captioning.settings import make_config

SIZES = {"encoder_dim": 16, "embedding_dim": 12, "units": 32, "vocab_size": 200, "batch_size": 8}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "benchmarks")


# --- gpu_check.py -------------------------------------------------------------------------------------------------


def made_up_results():
    rng = np.random.default_rng(0)
    results = {"features": rng.random((2, 64, 20)), "losses": 5 - rng.random(3), "loss": np.float32(4)}
    results |= {f"gradient {i}": rng.standard_normal(30) for i in range(3)}
    for name in ("greedy", "beams"):
        results |= {f"{name} words": rng.integers(4, 9, (10, 5)), f"{name} log_probs": -rng.random(10)}
    return results


def broken_bounds(**changed):
    """What the check calls bad of results that differ from the reference in `changed`."""
    import gpu_check

    results = made_up_results()
    changed = {name.replace("_", " ", 1): value(results[name.replace("_", " ", 1)]) for name, value in changed.items()}
    rows = gpu_check.compare(results, results | changed, "GPU, float32", make_config())
    assert len(rows) == 8
    return {what.partition(",")[0] for _, what, _, _, kept in rows if not kept}


def test_a_gpu_check_finds_the_same_results_good():
    assert broken_bounds() == set()
    padded = lambda words: np.pad(words, ((0, 0), (0, 2)))  # noqa: E731
    assert broken_bounds(greedy_words=padded) == set()


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"features": lambda x: x[:, ::-1]}, "features"),
        ({"losses": lambda x: x * [1, 1, 1.02]}, "losses of 3 training steps"),
        ({"losses": lambda x: x * np.nan}, "losses of 3 training steps"),
        ({"loss": lambda x: x * 1.02}, "loss of trained weights"),
        ({"gradient_1": lambda x: -x}, "gradients"),
        ({"gradient_2": lambda x: x * np.nan}, "gradients"),
        ({"greedy_words": lambda x: x + 1}, "captions"),
        ({"beams_log_probs": lambda x: x - 1}, "captions"),
    ],
)
def test_a_gpu_check_finds_what_differs(change, stage):
    assert broken_bounds(**change) == {stage}


def test_without_a_gpu_there_is_nothing_to_check(monkeypatch, capsys):
    import gpu_check

    monkeypatch.setattr("tensorflow.config.list_physical_devices", lambda kind=None: [])
    gpu_check.main([])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("there is no GPU to check: computing on the CPU")


# --- train_speed.py -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_attention_does_not_pass_as_the_usual_ways(tmp_path, monkeypatch):
    import drawn_data
    import train_speed

    config = make_config({**SIZES, "features_dir": str(tmp_path), "precision": "float32"})
    prepared = drawn_data.draw_prepared(tmp_path, 20, config)
    states = train_speed.open_runs(prepared, tmp_path, config)
    usual = iter(
        train_speed.usual_batches(train_speed.collect_captions(prepared.train, features_folder(config)), config)
    )
    train_speed.check_same_gradients(*states, usual, config)

    right, step = model.RNN_Decoder.teacher_forcing, model.RNN_Decoder.step

    def level_attention(*args):
        with monkeypatch.context() as inside:  # the usual way, which goes step by step, stays right
            inside.setattr(model.RNN_Decoder, "step", lambda *args: step(*args[:-1], keys=0 * args[-1]))
            return right(*args)

    monkeypatch.setattr(model.RNN_Decoder, "teacher_forcing", level_attention)
    state = train_speed.open_runs(prepared, tmp_path / "wrong", config)[1]
    with pytest.raises(AssertionError):
        train_speed.check_same_gradients(states[0], state, usual, config)


# --- folder_memory.py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "problems"),
    [
        ("abc", []),
        ("ab", ["1 captions are lost, such as that of c"]),
        ("abcb", ["1 captions are there twice"]),
        ("abcd", ["1 captions are of images that nobody named"]),
        ("aad", ["2 captions are lost, such as that of b", "1 captions are there twice", "1 captions are of images"]),
    ],
)
def test_lost_double_and_foreign_captions_of_a_folder_are_problems(found, problems):
    import folder_memory

    lines = [json.dumps({"image": name}).encode() for name in found]
    said = folder_memory.find_problems(folder_memory.Measured(0, 1.0, 1.0, lines), set("abc"))
    assert len(said) == len(problems)
    assert all(line.startswith(start) for line, start in zip(said, problems, strict=True))


def test_the_images_of_a_folder_are_made_once(tmp_path):
    import folder_memory

    few = folder_memory.make_images(tmp_path, 3)
    many = folder_memory.make_images(tmp_path, 5)
    assert few < many and len(many) == 5
    assert {str(path) for path in tmp_path.rglob("*.jpg")} == many


# --- readme_image.py ----------------------------------------------------------------------------------------------


def test_readmes_image_has_attention_weights_above_and_evidence_below(tmp_path):
    import readme_image

    Image.new("RGB", (240, 240), "white").save(tmp_path / "a.png")
    maps = {"attention_weights": np.eye(64)[[0, 0]], "evidence": np.eye(64)[[63, 63]]}
    caption = GeneratedCaption(tmp_path / "a.png", str(tmp_path / "a.png"), ["two", "words"], np.zeros(3), **maps)
    (tmp_path / "captions.jsonl").write_bytes(make_record(caption, (0, 0)).line())
    readme_image.main([str(tmp_path / "a.jpg"), str(tmp_path / "captions.jsonl"), "a.png"])
    pixels = np.asarray(Image.open(tmp_path / "a.jpg").convert("L"), float)
    assert pixels.shape == (26 + 2 * (120 + 26), 3 * (120 + 4))
    for left in (124, 248):
        above, below = (pixels[top : top + 120, left : left + 120] for top in (26, 26 + 146))
        for panel, (bright, dark) in ((above, (0, 105)), (below, (105, 0))):
            assert panel[bright : bright + 15, bright : bright + 15].mean() > 150
            assert panel[dark : dark + 15, dark : dark + 15].mean() < 70
