import csv
import json
import pathlib
import re
import shutil
import types

import numpy as np
import pillow_heif
import pytest
import tensorflow as tf
from PIL import Image

import inference_image_caption as inference
from captioning.export import saved_model
from captioning.inference import own_images
from captioning.training import run_folder
from conftest import full_disk, options
from support.errors import UserError
from tiny_captioner import colour_network


def infer(root, *more):
    inference.main([*options(root), *more])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def own_network(monkeypatch):
    """The run's features were made elsewhere; a stand-in for the network that made them."""
    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: colour_network)


@pytest.fixture
def alone(trained, tmp_path, monkeypatch):
    """An empty place with a copy of a run's folder, `runs/x`, and an image, `a.png`; it is the working folder."""
    place = tmp_path / "empty"
    shutil.copytree(trained / "run", place / "runs" / "x", ignore=shutil.ignore_patterns("captions"))
    Image.new("RGB", (80, 200), "red").save(place / "a.png")
    monkeypatch.chdir(place)
    return place


# --- Validation images ------------------------------------------------------------------------------------------


def test_validation_images_are_captioned_printed_and_plotted(trained, tmp_path, capsys):
    (tmp_path / ".tmp-999999999-1-001.png").touch()  # of a run that was killed
    infer(trained, "--output", str(tmp_path), "--plot_images", "3")
    assert not list(tmp_path.glob(".tmp*"))
    written = records(tmp_path / "captions.jsonl")
    assert len(written) == 3
    validation = json.loads((trained / "data" / "validation.json").read_text())
    by_id = {image["image_id"]: image for image in validation}
    printed = capsys.readouterr().out
    for record in written:
        assert record["caption"] == " ".join(record["words"])
        assert record["caption"] in printed
        for reference in by_id[record["image_id"]]["references"]:
            assert reference in printed
        weights = np.array(record["attention_weights"])
        assert weights.shape == (len(record["words"]), 64)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-3)
        assert record["log_probability"] < 0
    assert len(list(tmp_path.glob("*.png"))) == 3

    infer(trained, "--output", str(tmp_path / "again"), "--plot_images", "3")
    assert records(tmp_path / "again" / "captions.jsonl") == written  # the choice depends on the seed


@pytest.mark.parametrize("most", [0, 2, 3, 4])
def test_no_more_figures_are_drawn_than_asked_for(trained, tmp_path, capsys, most):
    infer(trained, "--output", str(tmp_path), "--plot_images", "3", "--figures", str(most))
    written = records(tmp_path / "captions.jsonl")
    assert [("figure" in record) for record in written] == [number < most for number in range(3)]
    assert {path.name for path in tmp_path.glob("*.png")} == {record["figure"] for record in written[:most]}
    printed = capsys.readouterr().out
    assert ("--figures 3 draws all" in printed) == (most < 3)
    assert (f"open {tmp_path / 'index.html'}" in printed) == (most > 0)


def test_an_image_damaged_since_its_features_were_made_costs_its_figure_alone(trained, tmp_path, monkeypatch, capsys):
    def plot(caption, path, attention_map):
        drawn.append(path)
        if len(drawn) == 2:
            raise ValueError(f"{caption.path} cannot be drawn (it is gone)")
        path.touch()

    drawn = []

    monkeypatch.setattr("captioning.inference.caption_images.plot_attention", plot)
    infer(trained, "--output", str(tmp_path), "--plot_images", "3")
    assert ["figure" in record for record in records(tmp_path / "captions.jsonl")] == [True, False, True]
    assert set(tmp_path.glob("*.png")) == {drawn[0], drawn[2]}
    assert "cannot be drawn (it is gone)\n" in capsys.readouterr().out


def test_a_full_disk_is_one_line_that_names_the_figure(trained, tmp_path):
    with full_disk(500), pytest.raises(UserError, match=r"cannot write .*\.png: .* MB free there"):
        infer(trained, "--output", str(tmp_path))
    assert not list(tmp_path.glob(".tmp*")) and not list(tmp_path.glob("*.png"))


def test_a_split_that_is_not_there_is_one_line(trained, tmp_path):
    with pytest.raises(UserError, match="no test split"):
        infer(trained, "--evaluate", "--split", "test", "--output", str(tmp_path))


# --- Own images -----------------------------------------------------------------------------------------------


def test_own_images_in_files_and_folders_and_a_bad_one(trained, tmp_path, own_network, capsys):
    images = tmp_path / "images" / "deep" / "deeper"
    images.mkdir(parents=True)
    Image.new("RGB", (80, 200), "red").save(images / "portrait.png", "JPEG")
    (images / "portrait.png").write_bytes((images / "portrait.png").read_bytes()[:-2])
    (images / "notes.txt").write_text("not an image, and not taken for one")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    with pytest.raises(SystemExit) as stopped:
        infer(trained, "--image", str(tmp_path / "broken.jpg"), str(tmp_path / "images"), "--output", str(tmp_path))
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "broken.jpg cannot be read" in printed
    assert f"1 JPEG files lack their end and are captioned all the same, such as {images / 'portrait.png'}" in printed
    (record,) = records(tmp_path / "captions.jsonl")
    assert record["image"].endswith("portrait.png")
    assert "image_id" not in record
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_images_from_the_web_among_files_and_bad_ones(trained, tmp_path, server, own_network, monkeypatch, capsys):
    Image.new("RGB", (80, 200), "red").save(server.folder / "red.png")
    Image.new("RGB", (80, 200), "blue").save(tmp_path / "blue.png")
    (server.folder / "notes.txt").write_text("no image")
    (server.folder / "huge.jpg").write_bytes(bytes(20_000))
    monkeypatch.setattr(own_images, "_MOST_IMAGE_BYTES", 10_000)
    red, blue = f"{server.url}/red.png?size=../../large", str(tmp_path / "blue.png")
    bad = {
        f"{server.url}/notes.txt": "cannot be read as an image",
        f"{server.url}/missing.jpg": "404",
        f"{server.url}/huge.jpg": "longer than 10,000 bytes",
    }
    with pytest.raises(SystemExit) as stopped:
        infer(trained, "--image", red, *bad, red, blue, "--output", str(tmp_path / "out"))
    assert stopped.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    for address, reason in bad.items():
        (line,) = [line for line in printed if address in line]
        assert reason in line
    assert [record["image"] for record in records(tmp_path / "out" / "captions.jsonl")] == [red, blue]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    kept = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "out" / "downloads").iterdir()}
    assert kept == {"red_png", "notes_txt"}


def test_an_image_from_the_web_is_seen_anew_each_time(trained, tmp_path, server, monkeypatch):
    seen = []

    def network(pixels):
        seen.append(np.asarray(pixels).mean((0, 1, 2)).tolist())
        return tf.zeros((len(pixels), 64, 2048))

    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: network)
    for colour in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (30, 30), colour).save(server.folder / "webcam.png")
        infer(trained, "--image", f"{server.url}/webcam.png", "--output", str(tmp_path))
    assert seen == [[255, 0, 0], [0, 0, 255]]


def test_new_images_are_refused_where_another_program_made_the_features(trained, tmp_path, server):
    with pytest.raises(UserError, match="made by another program"):
        infer(trained, "--image", f"{server.url}/red.png", "--output", str(tmp_path / "out"))
    assert not server.requests  # before anything is downloaded


def test_a_folder_without_images_is_one_line(trained, tmp_path):
    with pytest.raises(UserError, match="no image file"):
        infer(trained, "--image", str(tmp_path), "--output", str(tmp_path / "out"))


# --- Own images that are many -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nine images in a folder; two at a time are extracted and captioned."""
    monkeypatch.setattr(own_images, "_EXTRACTED", 2)
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("RGB", (80, 60), (25 * number, 200, 9)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def seen(monkeypatch):
    """The numbers of the images that the stand-in for the network has seen. `stop_at` is where a kill comes."""
    seen = types.SimpleNamespace(numbers=[], stop_at=None)

    def network(pixels):
        numbers = [round(red / 25) for red in np.asarray(pixels)[:, 0, 0, 0]]
        if seen.stop_at in numbers:
            raise KeyboardInterrupt
        seen.numbers += numbers
        return colour_network(pixels)

    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: network)
    return seen


def caption_folder(trained, folder, *more):
    infer(trained, "--image", str(folder), "--output", str(folder / "captions"), "--figures", "2", *more)


def names(path):
    return [pathlib.Path(record["image"]).name for record in records(path)]


def test_a_folder_is_captioned_on_where_it_stopped(trained, folder, seen, capsys):
    """The folder of captions, with its figures, is among the images."""
    path, everything = folder / "captions" / "captions.jsonl", [f"{number}.png" for number in range(9)]
    seen.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        caption_folder(trained, folder)
    assert names(path) == everything[:4]
    with path.open("ab") as file:
        file.write(b'{"image": "half a li')
    seen.numbers, seen.stop_at = [], None
    caption_folder(trained, folder)
    assert seen.numbers == [4, 5, 6, 7, 8]
    assert names(path) == everything
    written, seen.numbers = path.read_bytes(), []
    caption_folder(trained, folder)
    assert seen.numbers == [] and path.read_bytes() == written
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"open {folder / 'captions' / 'index.html'} to look at the attention"
    assert any(line.startswith("9 of 9 images were captioned before") for line in printed)
    with (folder / "captions" / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == [record["caption"] for record in records(path)]
    assert sorted(path.name[:2] for path in (folder / "captions").glob("*.png")) == ["0_", "1_"]


def test_a_second_call_adds_to_what_the_first_one_left(trained, folder, seen, capsys):
    """Which images are named, and from where, does not matter; how they are captioned does."""
    path, output = folder / "captions" / "captions.jsonl", ["--output", str(folder / "captions")]
    caption_folder(trained, folder)
    Image.new("RGB", (80, 60), (225, 200, 9)).save(folder.parent / "one.png")
    seen.numbers = []
    infer(trained, "--image", str(folder.parent / "one.png"), *output)
    assert seen.numbers == [9]
    assert names(path) == [*(f"{number}.png" for number in range(9)), "one.png"]
    assert sorted(path.name[:2] for path in (folder / "captions").glob("*.png")) == ["0_", "1_", "on"]
    page = (folder / "captions" / "index.html").read_text()
    assert all(f"<bdi>{name}</bdi>" in page for name in ("0.png", "1.png", "one.png"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="beam_width 1, not 3: name another folder behind --output, or give --anew"):
        infer(trained, "--image", str(folder.parent / "one.png"), *output, "--beam_width", "3")
    assert path.read_bytes() == before


def test_several_captions_are_found_printed_and_on_the_page(trained, tmp_path, capsys):
    infer(trained, "--captions", "3", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    assert "--beam_width 3 is taken instead of 1, to find as many captions\n" in printed
    made_by = json.loads((tmp_path / "made_by.json").read_text())
    assert made_by.items() >= {"captions_per_image": 3, "beam_width": 3, "sample": "no"}.items()
    for record in records(tmp_path / "captions.jsonl"):
        texts = [each["caption"] for each in record["captions"]]
        assert len(set(texts)) == 3 and texts[0] == record["caption"]
        assert all(f"  generated  {text}\n" in printed for text in texts)
    infer(trained, "--captions_per_image", "3", "--output", str(tmp_path))  # which is the same, and nothing is missing
    assert "2 of 2 images were captioned before" in capsys.readouterr().out
    with pytest.raises(UserError, match="captions_per_image 3, not 2, .*sample no, not yes: .*--anew"):
        infer(trained, "--captions", "2", "--sample", "--output", str(tmp_path))


def test_captions_of_the_data_sets_images_may_be_shorter_than_those_it_was_prepared_with(trained, tmp_path):
    for most in (1, 60):
        infer(trained, "--max_words", str(most), "--figures", "0", "--output", str(tmp_path / str(most)))
    short, long = (records(tmp_path / name / "captions.jsonl") for name in ("1", "60"))
    assert [record["caption"].split()[:1] for record in long] == [record["caption"].split() for record in short]


def test_another_seed_draws_other_captions_of_the_same_images(trained, tmp_path):
    """The seed of the data, and of a network with random weights, is the run's."""
    drawn = {}
    for seed in ("42", "7"):
        given = ["--sample", "--temperature", "3", "--seed", seed, "--figures", "0", "--output", str(tmp_path / seed)]
        infer(trained, "--captions", "3", *given)
        drawn[seed] = {record["image"]: record["captions"] for record in records(tmp_path / seed / "captions.jsonl")}
        assert json.loads((tmp_path / seed / "made_by.json").read_text())["seed"] == int(seed)
    assert drawn["7"].keys() == drawn["42"].keys() and drawn["7"] != drawn["42"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--captions", "photos.csv"], "--captions_per_image takes int 1..20, not 'photos.csv'"),
        (["--captions", "21"], "--captions_per_image takes int 1..20, not 21"),
        (["--temperature", "0.5"], "give --sample too"),
        (["--sample", "--beam_width", "3"], "give one of the two"),
        (["--captions", "5", "--export", "m"], "a SavedModel says one caption of each image"),
        (["--sample", "--export", "m", "--format", "savedmodel"], "a SavedModel says one caption of each image"),
        (["--captions", "5", "--export", "m", "--format", "web"], "the web page says one caption of each image"),
        (["--sample", "--serve"], "the web page says one caption of each image"),
    ],
)
@pytest.mark.usefixtures("soon")  # a page that is served never ends
def test_several_captions_that_cannot_be_are_one_line(trained, tmp_path, monkeypatch, own_network, wrong, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        infer(trained, *wrong)
    assert "\n" not in str(raised.value) and not (tmp_path / "m").exists()


def test_the_help_says_what_anew_deletes(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search("--anew .*delete the captions and figures that the output folder's captions.jsonl lists", text)


def test_the_options_for_many_images(trained, folder, seen):
    path = folder / "captions" / "captions.jsonl"
    caption_folder(trained, folder)
    assert ["attention_weights" in record for record in records(path)] == [True] * 2 + [False] * 7
    assert all(len(line) < 300 for line in path.read_text().splitlines()[2:])
    seen.numbers = []
    caption_folder(trained, folder, "--attention", "all")
    assert seen.numbers == [2, 3, 4, 5, 6, 7, 8]
    assert all("attention_weights" in record for record in records(path))
    for more, again in (
        (("--anew",), list(range(9))),
        (("--max_words", "7", "--anew"), list(range(9))),
        (("--max_words", "7", "--figures", "0"), []),
    ):
        seen.numbers = []
        caption_folder(trained, folder, *more)
        assert seen.numbers == again
        assert len(records(path)) == 9


def test_photographs_of_phones_are_captioned_and_what_is_no_image_is_counted(trained, tmp_path, own_network, capsys):
    (tmp_path / "images").mkdir()
    image = Image.new("RGB", (64, 48), "red")
    pillow_heif.from_pillow(image).save(tmp_path / "images" / "a.heic")
    image.save(tmp_path / "images" / "b.jpg")
    for name in ("._b.jpg", "c.pdf", "d.h5", "e.jpg"):
        (tmp_path / "images" / name).touch()
    with pytest.raises(SystemExit, match="1"):
        infer(trained, "--image", str(tmp_path / "images"), "--output", str(tmp_path / "out"))
    assert names(tmp_path / "out" / "captions.jsonl") == ["a.heic", "b.jpg"]
    *_, skipped, page, last = capsys.readouterr().out.splitlines()
    assert skipped == "skipped: 1 *.h5, 1 *.pdf, 1 macOS side files (._*), 1 not readable"
    assert page.startswith("open ")
    assert last == "1 of 3 images have no caption; the lines above say why"
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_captions_do_not_go_among_the_images(trained, folder, own_network):
    with pytest.raises(UserError, match="holds the images: give another folder by --output"):
        infer(trained, "--image", str(folder), "--output", str(folder))


# --- What does not go together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [("--image", "a.png", "--evaluate"), ("--image", "a.png", "--export", "m"), ("--evaluate", "--export", "m")],
)
def test_only_one_thing_is_done_at_a_time(alone, asked):
    names = [part for part in asked if part.startswith("--")]
    with pytest.raises(UserError, match=" and ".join(names)):
        inference.main(["--run_dir", "runs/x", *asked])
    assert not (alone / "runs" / "x" / "captions").exists()


def test_an_exported_model_computes_in_float32(trained, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: config.extract_precision)
    monkeypatch.setattr(saved_model, "export_captioner", lambda _, network, config, folder: exported.append(network))
    infer(trained, "--export", str(tmp_path / "model"), "--extract_precision", "bfloat16")
    assert exported == ["float32"]


def test_inference_before_training_names_the_command(trained, tmp_path):
    with pytest.raises(UserError, match="run python train_image_caption_model.py first"):
        infer(trained, "--run_dir", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="run python train_image_caption_model.py --dataset demo first"):
        inference.main(["--dataset", "demo", "--run_dir", str(tmp_path / "nothing")])


# --- A run that stands on its own -------------------------------------------------------------------------------


def test_a_run_folder_alone_captions_an_image(alone, own_network):
    inference.main(["--run_dir", "runs/x", "--image", "a.png"])
    (record,) = records(alone / "runs" / "x" / "captions" / "captions.jsonl")
    assert record["image"] == "a.png"
    assert {path.name for path in alone.iterdir()} == {"runs", "a.png"}


def test_a_run_folder_alone_is_exported(alone, own_network):
    inference.main(["--run_dir", "runs/x", "--export", "model"])
    served = tf.saved_model.load("model").signatures["serving_default"]
    answer = served(images=tf.constant([(alone / "a.png").read_bytes()]))
    inference.main(["--run_dir", "runs/x", "--image", "a.png"])
    (record,) = records(alone / "runs" / "x" / "captions" / "captions.jsonl")
    assert [text.decode() for text in answer["captions"].numpy()] == [record["caption"]]


def test_the_data_of_a_run_are_found_by_its_settings(trained, tmp_path, capsys):
    output = ["--output", str(tmp_path / "typed")]
    infer(trained, *output, "--plot_images", "3")
    inference.main(["--run_dir", str(trained / "run"), "--output", str(tmp_path / "taken"), "--plot_images", "3"])
    assert records(tmp_path / "taken" / "captions.jsonl") == records(tmp_path / "typed" / "captions.jsonl")
    assert f"taken from {trained / 'run'}: " in capsys.readouterr().out


def test_a_run_is_evaluated_on_data_that_have_moved(trained, alone, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no Java
    shutil.copytree(trained / "data", alone / "data")
    inference.main(["--run_dir", "runs/x", "--evaluate", "--data_dir", "data", "--beam_width", "3"])
    metrics = json.loads((alone / "runs" / "x" / "captions" / "metrics_validation.json").read_text())
    assert metrics["split"] == "validation"
    assert metrics["checkpoint"].startswith("runs/x/best/ckpt-")


def test_what_is_typed_wins_and_a_contradiction_is_one_line(alone):
    with pytest.raises(UserError, match="--units 16, not 20"):
        inference.main(["--run_dir", "runs/x", "--image", "a.png", "--units", "20"])
    with pytest.raises(UserError, match="prepared with --vocab_size 5000, not 6000"):
        inference.main(["--run_dir", "runs/x", "--vocab_size", "6000"])


def test_a_run_that_is_asked_about_other_data_says_so(alone, capsys):
    path = alone / "runs" / "x" / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps(vocabulary[:4] + vocabulary[:3:-1]))
    inference.main(["--run_dir", "runs/x"])
    assert "runs/x was not trained on" in capsys.readouterr().out


def test_a_damaged_best_checkpoint_leaves_the_last_one_which_is_named(alone, own_network, capsys):
    for path in (alone / "runs" / "x" / "best").iterdir():
        path.write_bytes(b"")
    inference.main(["--run_dir", "runs/x", "--image", "a.png"])
    assert len(records(alone / "runs" / "x" / "captions" / "captions.jsonl")) == 1
    (line, *_) = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert "last/ckpt-2 is taken instead" in line and "delete" not in line


def test_options_are_not_abbreviated(alone):
    with pytest.raises(UserError, match="--export"):
        inference.main(["--exp", "model"])


# --- Karpathy's splits ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_karpathys_splits_are_prepared_trained_on_and_scored(coco, monkeypatch, capsys):
    """Every third image is a test image: none of them is trained on, and all of them are scored."""
    import data_utils
    import train_image_caption_model as training

    monkeypatch.setattr(shutil, "which", lambda name: None)  # no Java, which takes minutes
    captions = json.loads((coco / "coco" / "annotations" / "captions_train2014.json").read_text())
    images = []
    for image in captions["images"]:
        texts = [record["caption"] for record in captions["annotations"] if record["image_id"] == image["id"]]
        split = "test" if image["id"] % 3 == 0 else "val" if image["id"] % 5 == 0 else "train"
        sentences = [{"raw": text, "tokens": text.split()} for text in texts]
        images.append({"imgid": image["id"], "filename": image["file_name"], "split": split, "sentences": sentences})
    (coco / "dataset.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    argv = [*options(coco), "--dataset", "karpathy", "--karpathy_json", str(coco / "dataset.json")]
    argv += ["--images", str(coco / "coco" / "train2014")]
    data_utils.main(argv)
    training.main([*argv, "--epochs", "1"])
    run = ["--run_dir", str(coco / "run")]  # the rest is known
    inference.main([*run, "--evaluate", "--output", str(coco / "scores")])
    inference.main([*run, "--evaluate", "--split", "test", "--output", str(coco / "scores")])

    trained_on = {image["image_id"] for image in json.loads((coco / "data" / "train.json").read_text())}
    for split, theirs in (("validation", "val"), ("test", "test")):
        expected = {image["imgid"] for image in images if image["split"] == theirs}
        assert not trained_on & expected
        results = json.loads((coco / "scores" / f"captions_{split}_greedy_results.json").read_text())
        assert {record["image_id"] for record in results} == expected
        metrics = json.loads((coco / "scores" / f"metrics_{split}.json").read_text())
        assert (metrics["dataset"], metrics["split"], metrics["images"]) == ("karpathy", split, len(expected))
        assert metrics["checkpoint"] == str(coco / "run" / "best" / "ckpt-1")
    assert "CIDEr" in capsys.readouterr().out

    inference.main([*run, "--output", str(coco / "figures"), "--plot_images", "2"])  # images where they lie
    assert len(list((coco / "figures").glob("*.png"))) == 2


def test_a_run_from_before_the_choice_is_inceptionv3s(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("cnn") == "InceptionV3"
    path.write_text(json.dumps(saved))
    config = run_folder.run_settings({}, str(tmp_path / "run"))
    assert config.cnn == "InceptionV3"
    assert run_folder.read_captioner(tmp_path / "run", config).encoder.feature_mean.shape == (2048,)
