import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from captioning.attention.boxes import _instances_path
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.demo.scenes import draw_demo
from captioning.evaluation.evaluate import _IMAGES_OF_A_GROUP, Evaluated, _name_files, _score_pages, evaluate
from captioning.evaluation.metrics import METRICS
from captioning.features.cache import ImageToCaption
from captioning.settings import make_config
from tiny_captioner import SIZES, tiny_captioner

NUMBERS = range(1, 6)
MOST = 5  # words, which no default is and so goes into the names of files
SPLITS = ("validation", "test")


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageToCaption with cached features, all of which differ."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("images")
    images = []
    for number in NUMBERS:
        path, features = folder / f"{number}.jpg", folder / f"{number}.npy"
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(path)
        np.save(features, (rng.standard_normal((64, 2048)).clip(0) + rng.standard_normal()).astype(np.float16))
        images.append(ImageToCaption(path, path.name, number, ["word1 word2 word3 tüür", "word4"], features))
    return images


@pytest.fixture(scope="module")
def tiny(images):
    """One captioner for all tests: each would be compiled anew."""
    stacked = np.stack([np.load(image.feature_path) for image in images]).astype(np.float32)
    return tiny_captioner(make_config(SIZES), stacked, seed=5)


def evaluate_tiny(tiny, images, split, output, **settings):
    config = make_config({**SIZES, "max_words": MOST, "decode_batch": 3, "run_dir": "runs/x", **settings})
    evaluate(tiny, images, split, output, config)


def test_each_split_has_files_of_its_own(tiny, images, tmp_path, capsys):
    output = tmp_path / "captions"
    evaluate_tiny(tiny, images, "validation", output, dataset="karpathy")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    evaluate_tiny(tiny, images, "test", output, dataset="karpathy")
    assert before == {name: (output / name).read_bytes() for name in before}
    runs = ("greedy", "beam3", "beam5")
    named = [f"{split}_max_words{MOST}" for split in SPLITS]
    expected = {f"captions_{name}_{run}_results.json" for name in named for run in runs}
    expected |= {f"metrics_{name}.json" for name in named} | {f"evaluation_{name}.html" for name in named}
    assert {path.name for path in output.iterdir()} == expected
    printed = capsys.readouterr().out
    assert all(f"metrics_{name}.json and the captions" in printed for name in named)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "test"),
        ({"length_penalty": 0.5}, "test_length_penalty0.5"),
        ({"repeat_block": 0, "max_words": 12}, "test_repeat_block0_max_words12"),
        ({"dataset": "demo", "repeat_block": 0}, "test"),
        ({"dataset": "demo", "repeat_block": 2}, "test_repeat_block2"),
        ({"beam_width": 3}, "test"),  # is compared in any case
        ({"beam_width": 2}, "test_beam_width2"),
        ({"captions_per_image": 5, "beam_width": 5}, "test_captions_per_image5"),
        ({"captions_per_image": 7, "beam_width": 7}, "test_captions_per_image7_beam_width7"),
        ({"sample": "yes"}, "test_sample"),
        ({"sample": "yes", "captions_per_image": 5, "sample_seed": 7}, "test_captions_per_image5_sample_seed7"),
        ({"sample": "yes", "top_p": 1.0, "temperature": 0.5}, "test_sample_temperature0.5_top_p1.0"),
        ({"temperature": 0.5, "sample_seed": 7}, "test"),  # which change nothing
    ],
)
def test_the_names_of_files_tell_how_captions_were_decoded(settings, name):
    assert _name_files("test", make_config(settings)) == name


def test_two_ways_of_decoding_do_not_overwrite_each_others_files(tiny, images, tmp_path):
    evaluate_tiny(tiny, images, "test", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for count, other in enumerate(({"length_penalty": 0.0}, {"repeat_block": 0}, {"beam_width": 2}), 2):
        evaluate_tiny(tiny, images, "test", tmp_path / "out", **other)
        assert len(list((tmp_path / "out").glob("metrics_*.json"))) == count
        assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}


def test_the_metrics_the_page_and_what_is_printed_say_how_captions_were_decoded(tiny, images, tmp_path, capsys):
    known = dataclasses.replace(tiny, identity="0123abcd")
    evaluate_tiny(known, images, "test", tmp_path / "out", length_penalty=0.5, beam_width=2)
    (path,) = (tmp_path / "out").glob("metrics_*.json")
    metrics = json.loads(path.read_text())
    how = {"checkpoint_digest": "0123abcd", "length_penalty": 0.5, "repeat_block": 2, "max_words": MOST}
    assert how.items() <= metrics.items()
    runs = {"greedy": 1, "beam 2": 2, "beam 3": 3, "beam 5": 5}
    assert {run: metrics[run]["beam_width"] for run in runs} == runs
    assert {metrics[run]["tokens"] for run in runs} == {"project"}
    (page,) = (tmp_path / "out").glob("*.html")
    printed = capsys.readouterr().out.splitlines()
    assert f"note: {metrics['cider_note']}" in printed and "CIDEr of 5 images" in metrics["cider_note"]
    (line,) = [line for line in printed if line.startswith("scored: ")]
    for text in (line, page.read_text()):
        assert "split test, images 5, checkpoint runs/x/best/ckpt-1, checkpoint_digest 0123abcd" in text
        assert f"length_penalty 0.5, repeat_block 2, max_words {MOST}" in text


def test_the_metrics_name_their_data_set_split_and_checkpoint_and_keep_meteors_place(tiny, images, tmp_path, capsys):
    evaluate_tiny(tiny, images, "test", tmp_path / "out", dataset="karpathy", beam_width=2)
    metrics = json.loads((tmp_path / "out" / f"metrics_test_max_words{MOST}_beam_width2.json").read_text())
    assert metrics["dataset"] == "karpathy"
    assert metrics["split"] == "test"
    assert metrics["images"] == 5
    assert metrics["checkpoint"] == "runs/x/best/ckpt-1"
    for run in ("greedy", "beam 2", "beam 3", "beam 5"):
        assert list(metrics[run])[4] == "METEOR" and metrics[run]["METEOR"] is None
    printed = capsys.readouterr().out.splitlines()
    header, _, *rows = [line for line in printed if line.startswith("|")]
    assert "| METEOR |" in header
    assert len(rows) == 4
    form = metrics["greedy"]["form"]
    assert (form["captions"], form["distinct"]) == (5, len({caption for caption in said(tmp_path, "greedy")}))
    line = f"greedy: {form['distinct']} of 5 captions differ; {form['mean_length']:.1f} words each; 0 break off"
    assert line in printed


def said(root, run):
    (path,) = (root / "out").glob(f"captions_test_*_{run}_results.json")
    return [result["caption"] for result in json.loads(path.read_text())]


@pytest.mark.parametrize(
    ("settings", "run"),
    [({"beam_width": 3}, "beam 3"), ({"sample": "yes", "temperature": 3.0, "top_p": 0.95}, "sample")],
)
def test_several_captions_are_scored_by_the_best_and_by_how_they_differ(tiny, images, tmp_path, capsys, settings, run):
    evaluate_tiny(tiny, images, "test", tmp_path / "plain")
    capsys.readouterr()
    evaluate_tiny(tiny, images, "test", tmp_path / "out", captions_per_image=3, **settings)
    plain, several = (json.loads(next((tmp_path / name).glob("m*.json")).read_text()) for name in ("plain", "out"))
    for other in {"greedy", "beam 3", "beam 5"} - {run}:
        assert several[other] == plain[other]
    scores = several[run]
    if run == "beam 3":
        assert scores.items() >= plain[run].items()  # of the first captions
    else:
        assert (scores["sample"], several["temperature"], several["top_p"], several["seed"]) == ("yes", 3.0, 0.95, 42)
    assert several["captions_per_image"] == scores["captions_per_image"] == 3
    assert all(scores["best"][name] >= scores[name] for name in METRICS if name != "METEOR")
    if run == "sample":
        assert any(scores["best"][name] > scores[name] for name in METRICS if name != "METEOR")
    diversity = scores["diversity"]
    assert 5 < diversity["captions"] <= 15 and 0 < diversity["div_1"] < 1 and 0 < diversity["distinct"] <= 1
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    place = rows.index(run)
    assert rows[place + 1] == f"{run}, best of 3" and len(rows) == 2 + len({"greedy", "beam 3", "beam 5", run}) + 1
    assert f"{run}, 3 captions of each image: Div-1 {diversity['div_1']:.3f}, " in printed
    assert ("have fewer captions" in printed) == (diversity["captions"] < 15)
    (page,) = (tmp_path / "out").glob("*.html")
    assert f"{run}, best of 3" in page.read_text()
    assert len(said(tmp_path, run.replace(" ", ""))) == 5  # one of each image, as the format has it


def test_images_with_fewer_captions_are_counted(tiny, images, tmp_path, capsys):
    frozen = {"sample": "yes", "temperature": 0.01, "captions_per_image": 2}
    evaluate_tiny(tiny, images, "test", tmp_path / "out", **frozen)
    line = r"\nsample: ([345]) images have fewer captions, as no more different ones were found\n"
    few = int(re.search(line, capsys.readouterr().out)[1])  # two words may be as likely as each other
    metrics = json.loads(next((tmp_path / "out").glob("metrics_*.json")).read_text())
    assert metrics["sample"]["diversity"]["captions"] == 2 * 5 - few


def test_the_results_are_the_captions_of_every_image(tiny, images, tmp_path):
    evaluate_tiny(tiny, images, "validation", tmp_path / "out")
    by_run = {}
    for run in ("greedy", "beam3"):
        results = json.loads((tmp_path / "out" / f"captions_validation_max_words{MOST}_{run}_results.json").read_text())
        assert [result["image_id"] for result in results] == [1, 2, 3, 4, 5]
        by_run[run] = [result["caption"] for result in results]
    assert len(set(by_run["greedy"])) > 2
    assert by_run["greedy"] != by_run["beam3"]


def test_demo_captions_are_compared_with_the_scenes(tiny, images, tmp_path, capsys):
    draw_demo(tmp_path / "scenes", 10, seed=0)
    evaluate_tiny(tiny, images, "validation", tmp_path / "out", dataset="demo", coco_dir=str(tmp_path / "scenes"))
    metrics = json.loads((tmp_path / "out" / f"metrics_validation_max_words{MOST}.json").read_text())
    assert metrics["greedy"]["scenes"]["objects"] == 0  # no such words
    attention = metrics["greedy"]["attention"]
    assert attention["words"] == 0 and attention["maps"]["attention weights"]["inside"] is None
    assert "greedy, scenes: objects 0" in capsys.readouterr().out


def test_attention_is_scored_where_cocos_boxes_are(tiny, images, tmp_path):
    (tmp_path / "annotations").mkdir()
    box = {"category_id": 1, "bbox": [0, 0, 50, 100], "iscrowd": 0}
    instances = {
        "images": [{"id": image.image_id, "width": 100, "height": 100} for image in images],
        "categories": [{"id": 1, "name": name} for name in ["word1"]],
        "annotations": [{"id": i, "image_id": image.image_id, **box} for i, image in enumerate(images, 1)],
    }
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(instances))
    evaluate_tiny(tiny, images, "validation", tmp_path / "out", coco_dir=str(tmp_path))
    metrics = json.loads((tmp_path / "out" / f"metrics_validation_max_words{MOST}.json").read_text())
    assert metrics["greedy"]["attention"].keys() >= {"words", "maps", "absent"}
    assert metrics["greedy"]["attention"]["words"] > 0
    (tmp_path / "annotations" / "instances_train2014.json").unlink()
    evaluate_tiny(tiny, images, "validation", tmp_path / "out", coco_dir=str(tmp_path))
    assert (
        "attention"
        not in json.loads((tmp_path / "out" / f"metrics_validation_max_words{MOST}.json").read_text())["greedy"]
    )


# --- The page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_each_image_of_a_small_split_once_with_all_runs_side_by_side(tiny, images, tmp_path, capsys):
    evaluate_tiny(tiny, images, "test", tmp_path / "out", dataset="karpathy")
    page = tmp_path / "out" / f"evaluation_test_max_words{MOST}.html"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"open {page} to look at")
    start, *articles = page.read_text().split("<article")
    assert "Best, middle and worst captions of the test split" in start
    metrics = json.loads((tmp_path / "out" / f"metrics_test_max_words{MOST}.json").read_text())
    for run in ("greedy", "beam 3", "beam 5"):  # the table of scores, on top
        assert f'<th scope="row">{run}</th>' in start
        assert f"{metrics[run]['CIDEr']:.3f}"[:4] in start
    headings = [re.search("<bdi>(.*?)</bdi>", article)[1] for article in articles]
    assert [heading.split(":")[0] for heading in headings] == ["best", "best", "middle", "worst", "worst"]
    assert sorted(heading.split(": ")[1] for heading in headings) == [f"{number}.jpg" for number in NUMBERS]
    scores = {run: [] for run in ("greedy", "beam 3", "beam 5")}
    for article in articles:
        found = re.findall(r'<b>(.*?)</b><span class="note">CIDEr ([\d.]+)</span>', article)
        assert [run for run, _ in found] == list(scores)
        for run, score in found:
            scores[run].append(float(score))
        assert "word4" in article  # a reference
    assert scores["greedy"] == sorted(scores["greedy"], reverse=True)
    for run, values in scores.items():
        assert metrics[run]["CIDEr"] == pytest.approx(np.mean(values), abs=0.01)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"best": [0]}),
        (2, {"best": [0], "worst": [1]}),
        (3, {"best": [0], "middle": [1], "worst": [2]}),
        (4, {"best": [0, 1], "middle": [2], "worst": [3]}),
        (20, {"best": range(7), "middle": range(7, 13), "worst": range(13, 20)}),
        (36, {"best": range(12), "middle": range(12, 24), "worst": range(24, 36)}),
        (101, {"best": range(12), "middle": range(44, 56), "worst": range(89, 101)}),
    ],
)
def test_the_best_the_middle_and_the_worst_are_chosen_by_the_first_runs_score(count, expected):
    """The image of number n is the n-th best of the first run, and the n-th worst of the second."""
    assert _IMAGES_OF_A_GROUP == 12
    images = [ImageToCaption(pathlib.Path(f"{number}.jpg"), f"{number}.jpg", number) for number in range(count)]
    captions = [
        GeneratedCaption(each.path, each.name, [], np.zeros(0), np.zeros((0, 64)), each.image_id) for each in images
    ]
    runs = {
        "greedy": Evaluated(captions, {}, [], {number: -float(number) for number in range(count)}, {}),
        "beam 3": Evaluated(captions, {}, [], {number: float(number) for number in range(count)}, {}),
    }
    shuffled = [images[i] for i in np.random.default_rng(0).permutation(count)]
    shown = [image.heading.removesuffix(".jpg").split(": ") for image in _score_pages(runs, shuffled)]
    by_group = {}
    for group, number in shown:
        by_group.setdefault(group, []).append(int(number))
    assert by_group == {group: list(numbers) for group, numbers in expected.items()}


def test_the_page_holds_attention_and_evidence(tiny, images, tmp_path):
    evaluate_tiny(tiny, images, "test", tmp_path / "out", dataset="karpathy")
    page = (tmp_path / "out" / f"evaluation_test_max_words{MOST}.html").read_text()
    assert f"worst CIDEr of all {len(images)}, greedy. Scored: " in page
    assert page.count(' data-weights="') == page.count(' data-evidence="') == page.count('class="word"') > 0


def test_boxes_of_what_a_word_names_are_on_the_page(tiny, images, tmp_path):
    (tmp_path / "annotations").mkdir()
    box = {"category_id": 1, "bbox": [0, 0, 20, 30], "iscrowd": 0}  # the left half
    instances = {
        "images": [{"id": image.image_id, "width": 40, "height": 30} for image in images],
        "categories": [{"id": 1, "name": "word1"}],
        "annotations": [{"id": i, "image_id": image.image_id, **box} for i, image in enumerate(images, 1)],
    }
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(instances))
    evaluate_tiny(tiny, images, "validation", tmp_path / "out", coco_dir=str(tmp_path))
    buttons = re.findall(
        r"<button.*?</button>", (tmp_path / "out" / f"evaluation_validation_max_words{MOST}.html").read_text()
    )
    with_boxes = [button for button in buttons if "data-boxes" in button]
    assert with_boxes and all('data-boxes="[[0.0, 0.0, 0.5, 1.0]]"' in button for button in with_boxes)
    assert all(button.endswith(">word1</button>") for button in with_boxes)


# --- Images and boxes of other programs' files --------------------------------------------------------------------


def test_boxes_that_cannot_be_used_are_one_line_and_cost_no_scores(tiny, images, tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train2014.json"
    box = {"category_id": 1, "bbox": [0, 0, 20, 30]}
    instances = {
        "images": [{"id": image.image_id} for image in images],  # without sizes
        "categories": [{"id": 1, "name": "word1"}],
        "annotations": [{"id": i, "image_id": image.image_id, **box} for i, image in enumerate(images, 1)],
    }
    for text, reason in (
        (json.dumps(instances), "an image without id, width or height"),
        ("no json", "cannot be read"),
    ):
        path.write_text(text)
        evaluate_tiny(tiny, images, "validation", tmp_path / "out", coco_dir=str(tmp_path))
        metrics = json.loads((tmp_path / "out" / f"metrics_validation_max_words{MOST}.json").read_text())
        assert metrics["greedy"]["BLEU-1"] is not None and "attention" not in metrics["greedy"]
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "boxes cannot be used" in line)
        assert reason in line and str(path) in line
        (tmp_path / "out" / f"metrics_validation_max_words{MOST}.json").unlink()


def test_results_have_ids_of_both_kinds(tiny, images, tmp_path):
    """Their boxes are found too, whichever way the instances write the ids."""
    ids = ["d7495e8d036dd200", 12, "12b", "3", 0]
    others = [dataclasses.replace(image, image_id=i) for image, i in zip(images, ids, strict=True)]
    box = {"category_id": 1, "bbox": [0, 0, 20, 30]}
    instances = {
        "images": [{"id": str(i), "width": 40, "height": 30} for i in ids],
        "categories": [{"id": 1, "name": "word1"}],
        "annotations": [{"id": 1, "image_id": i, **box} for i in ("d7495e8d036dd200", 12.0, "12b", 3, "0")],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(instances))
    evaluate_tiny(tiny, others, "test", tmp_path / "out", coco_dir=str(tmp_path))
    evaluate_tiny(tiny, images, "test", tmp_path / "numbers", coco_dir=str(tmp_path))
    results = json.loads((tmp_path / "out" / f"captions_test_max_words{MOST}_greedy_results.json").read_text())
    assert [result["image_id"] for result in results] == ids
    metrics, numbers = (
        json.loads((tmp_path / name / f"metrics_test_max_words{MOST}.json").read_text())["greedy"]
        for name in ("out", "numbers")
    )
    assert metrics["attention"]["words"] > 0
    assert metrics["CIDEr"] == pytest.approx(numbers["CIDEr"]) and metrics["BLEU-4"] == pytest.approx(numbers["BLEU-4"])


def test_the_boxes_of_another_split_are_those_of_the_folder_of_its_images(tmp_path):
    captions = [GeneratedCaption(tmp_path / "val2017" / "a.jpg", "a", [], np.zeros(0), np.zeros((0, 64)), 1)]
    config = make_config({"coco_dir": str(tmp_path), "coco_split": "train2017"})
    train, val = (tmp_path / "annotations" / f"instances_{split}2017.json" for split in ("train", "val"))
    assert _instances_path([], config) == _instances_path(captions, config) == train
    val.parent.mkdir()
    val.touch()
    assert (_instances_path([], config), _instances_path(captions, config)) == (train, val)


def test_scores_are_against_every_reference(tiny, images, tmp_path):
    """Each image's last reference is made what the captioner says of it, and nothing else of it is."""
    evaluate_tiny(tiny, images, "test", tmp_path / "out", dataset="karpathy")
    texts = said(tmp_path, "greedy")
    wordings = ("of other things", "in no way alike", "nothing said here")
    told = [
        dataclasses.replace(image, references=[wordings[number % 3], wordings[(number + 1) % 3], text])
        for number, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    evaluate_tiny(tiny, told, "test", tmp_path / "out", dataset="karpathy")
    (path,) = (tmp_path / "out").glob("metrics_*.json")
    metrics = json.loads(path.read_text())
    assert said(tmp_path, "greedy") == texts
    assert metrics["greedy"]["BLEU-1"] == pytest.approx(100, abs=1e-3)
    assert metrics["greedy"]["ROUGE-L"] == pytest.approx(100, abs=1e-3)
    (page,) = (tmp_path / "out").glob("evaluation_*.html")
    ciders = re.findall(r"<b>greedy</b><span class=\"note\">CIDEr ([\d.]+)", page.read_text())
    assert len(ciders) == 5 and max(map(float, ciders)) > 1
