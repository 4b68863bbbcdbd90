import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from captioning.features.cache import ImageToCaption
from captioning.inference.caption_images import write_captions
from captioning.settings import make_config
from conftest import full_disk
from support.errors import UserError
from tiny_captioner import SIZES, VOCABULARY, tiny_captioner

COUNT = 7
FEATURES = np.stack(
    [np.random.default_rng(seed).standard_normal((64, 2048)).clip(0) + seed / COUNT - 0.5 for seed in range(COUNT)]
).astype(np.float32)  # (COUNT, P, F)


@pytest.fixture(scope="module")
def tiny():
    """One captioner for all tests: each would be compiled anew."""
    return dataclasses.replace(tiny_captioner(make_config(SIZES), FEATURES, seed=5), identity="a digest")


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{name}.png" for name in "abcdefg"]
    for number, path in enumerate(paths):
        Image.new("RGB", (60, 40), (30 * number, 99, 0)).save(path)
    return [ImageToCaption(path, str(path), references=["a dog"]) for path in paths]


class Source:
    """Gives features in batches of 3. It may stop as a kill or Ctrl-C does, or find images that cannot be read."""

    def __init__(self, stop_after=COUNT, unreadable=(), watched=None):
        self.stop_after, self.unreadable, self.watched = stop_after, unreadable, watched
        self.done, self.lines = [], []

    def __call__(self, images):
        readable = [image for image in images if image.path.stem not in self.unreadable]
        for number, start in enumerate(range(0, len(readable), 3)):
            if self.watched:
                self.lines.append(self.watched.read_bytes().count(b"\n"))
            if number == self.stop_after:
                raise KeyboardInterrupt
            batch = readable[start : start + 3]
            self.done += [image.path.stem for image in batch]
            yield batch, tf.constant(np.stack([FEATURES["abcdefg".find(p.path.stem[0])] for p in batch]))


def caption(tiny, images, output, source=None, anew=False, attention="drawn", **settings):
    """Run write_captions with two figures. Returns the names of the images that were captioned, in order."""
    output.mkdir(exist_ok=True)
    source = source or Source()
    options = types.SimpleNamespace(anew=anew, attention=attention)
    config = make_config({**SIZES, "max_words": 5, "repeat_block": 0, "figures": 2, **settings})
    write_captions(tiny, images, source, output, options, config)
    return "".join(source.done)


def records(output):
    return [json.loads(line) for line in (output / "captions.jsonl").read_text(errors="surrogateescape").splitlines()]


def captions(output):
    """Dict of the image's name to what was said of it."""
    return {os.path.basename(record["image"])[0]: record["caption"] for record in records(output)}


def figures(output):
    """The stems of the images that have a figure."""
    return "".join(sorted(path.stem.rpartition("_")[0] for path in output.glob("*.png")))


def pixels_of(output):
    """Dict of path to pixels, int (height, width, channels), of the figures."""
    return {path: np.asarray(Image.open(path), int) for path in output.glob("*.png")}


def is_redrawn(expected, found):
    """Whether a figure is the same; of another batch its map may differ in the last bits, and so a level of light."""
    return expected.shape == found.shape and np.abs(expected - found).max() <= 2


def headings(page):
    return re.findall(r'<h2 id="image-\d+"><bdi>(.*?)</bdi>', page.read_text())


# --- What is left -----------------------------------------------------------------------------------------------


def test_captions_figures_a_table_and_a_page_are_written_and_the_last_line_names_the_page(
    tiny, images, tmp_path, capsys
):
    output = tmp_path / "out"
    assert caption(tiny, images, output) == "abcdefg"
    assert "".join(captions(output)) == "abcdefg"
    assert len(set(captions(output).values())) > 3
    assert figures(output) == "ab"
    assert headings(output / "index.html") == ["a.png", "b.png"]
    with (output / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in table] == [(r["image"], r["caption"]) for r in records(output)]
    *printed, advice, last = capsys.readouterr().out.splitlines()
    for name, said in captions(output).items():
        assert f"  generated  {said}" in printed and str(images["abcdefg".find(name)].path) in printed
    assert "--figures 7 draws all" in advice
    assert last == f"open {output / 'index.html'} to look at the attention"
    assert {path.name for path in output.iterdir()} == {
        *(record["figure"] for record in records(output)[:2]),
        "captions.jsonl",
        "captions.csv",
        "index.html",
        "made_by.json",
    }


@pytest.mark.parametrize("attention", ["drawn", "all"])
def test_attention_is_kept_of_what_is_drawn_or_of_all(tiny, images, tmp_path, attention):
    caption(tiny, images, tmp_path / "out", attention=attention)
    for number, record in enumerate(records(tmp_path / "out")):
        kept = number < 2 or attention == "all"
        assert ("attention_weights" in record) == ("words" in record) == ("log_probs" in record) == kept
        assert ("evidence" in record) == kept
        assert record.get("figure_map") == ("weights" if number < 2 else None)
        if kept:
            assert np.shape(record["attention_weights"]) == (len(record["words"]), 64)
            assert np.shape(record["evidence"]) == (len(record["words"]), 64)
            assert record["caption"] == " ".join(record["words"])
            assert record["log_probability"] == pytest.approx(sum(record["log_probs"]), abs=1e-3)
        else:
            assert len(json.dumps(record)) < 300


def test_without_figures_no_page_and_no_attention_is_kept(tiny, images, tmp_path, capsys):
    output = tmp_path / "out"
    caption(tiny, images[:1], output, figures=0)
    assert {path.name for path in output.iterdir()} == {"captions.jsonl", "captions.csv", "made_by.json"}
    (record,) = records(output)
    assert "attention_weights" not in record
    printed = capsys.readouterr().out
    assert f"  generated  {record['caption']}\n" in printed
    assert "index.html" not in printed and "no page of attention" in printed


def test_more_images_than_are_printed_get_a_bar(tiny, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("captioning.inference.caption_images._MOST_PRINTED_IMAGES", 6)
    caption(tiny, images, tmp_path / "out")
    printed = capsys.readouterr()
    assert "generated" not in printed.out
    assert re.search(r"captioning: 100%.* 7/7 .*(images/s|s/images)", printed.err)  # as fast or as slow as it was


# --- Streaming and going on -------------------------------------------------------------------------------------


def test_a_line_is_written_as_its_batch_is_done(tiny, images, tmp_path):
    source = Source(watched=tmp_path / "out" / "captions.jsonl")
    caption(tiny, images, tmp_path / "out", source)
    assert source.lines == [0, 3, 6]


@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("half_a_line", [False, True])
def test_after_a_kill_only_what_is_missing_is_captioned(tiny, images, tmp_path, capsys, stop_after, half_a_line):
    caption(tiny, images, tmp_path / "undisturbed")
    output, kept = tmp_path / "out", 3 * stop_after
    with pytest.raises(KeyboardInterrupt):
        caption(tiny, images, output, Source(stop_after))
    assert "".join(captions(output)) == "abcdefg"[:kept]
    if half_a_line and kept:  # as a kill may leave
        path = output / "captions.jsonl"
        path.write_bytes(path.read_bytes()[:-10])
        kept -= 1
    capsys.readouterr()
    assert caption(tiny, images, output) == "abcdefg"[kept:]
    assert (f"{kept} of 7 images were captioned before (--anew" in capsys.readouterr().out) == (kept > 0)
    assert records(output) == records(tmp_path / "undisturbed")
    for name in ("index.html", "captions.csv", *(path.name for path in output.glob("*.png"))):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert caption(tiny, images, output) == ""  # and now nothing is missing
    assert records(output) == records(tmp_path / "undisturbed")


@pytest.mark.parametrize("sample", ["yes", "no"])
def test_after_a_kill_the_same_captions_are_found_of_which_an_image_has_several(tiny, images, tmp_path, sample, capsys):
    several = {"captions_per_image": 3, "sample": sample, "temperature": 3.0, "beam_width": 9}
    caption(tiny, images, tmp_path / "undisturbed", **several)
    printed = capsys.readouterr().out.splitlines()
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        caption(tiny, images, output, Source(stop_after=1), **several)
    assert caption(tiny, images, output, **several) == "defg"
    assert records(output) == records(tmp_path / "undisturbed")
    with (output / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = [row["caption"] for row in csv.DictReader(file)]
    said = [[each["caption"] for each in record["captions"]] for record in records(output)]
    assert [text for texts in said for text in texts] == rows and len(rows) == 3 * 7
    assert all(len(set(texts)) == 3 for texts in said)
    assert [line.removeprefix("  generated  ") for line in printed if "  generated  " in line] == rows
    assert all("attention_weights" in each for record in records(output)[:2] for each in record["captions"][1:])
    page = (output / "index.html").read_text()
    assert (page.count('<ol class="captions list">'), page.count("<li><div")) == (2, 6)
    assert f"{records(output)[1]['captions'][2]['log_probability']:.2f}".replace("-", "\N{MINUS SIGN}") in page
    assert "Each image has up to 3 captions, " in page
    assert ("at temperature 1." in page) == ("in which they were drawn" in page) == (sample == "yes")
    with pytest.raises(UserError, match="captions_per_image 3, not 2: "):
        caption(tiny, images, output, **several | {"captions_per_image": 2})


def test_images_with_fewer_captions_than_were_asked_for_are_counted(tiny, images, tmp_path, capsys):
    caption(tiny, images, tmp_path / "out", captions_per_image=3, sample="yes", temperature=0.01)
    assert "\n7 images have fewer than 3 captions, as no more different ones were found\n" in capsys.readouterr().out
    assert all("captions" not in record for record in records(tmp_path / "out"))


def test_a_full_disk_keeps_what_was_done_and_the_same_command_goes_on(tiny, images, tmp_path, capsys):
    """What is printed is captured in memory, as it would not fit on that disk."""
    caption(tiny, images, tmp_path / "undisturbed", figures=0)
    lines = (tmp_path / "undisturbed" / "captions.jsonl").read_bytes().splitlines(keepends=True)
    output = tmp_path / "out"
    output.mkdir()
    with full_disk(len(b"".join(lines[:4])) + 9), pytest.raises(UserError, match=r"captions\.jsonl.* MB free there"):
        caption(tiny, images, output, figures=0)
    assert caption(tiny, images, output, figures=0) == "efg"
    assert records(output) == records(tmp_path / "undisturbed")


def anew(tiny, images):
    return {"anew": True}


def nothing(tiny, images):
    return {}


def one_changed(tiny, images):
    Image.new("RGB", (9, 9)).save(images[4].path)
    return {}


def all_touched(tiny, images):
    for image in images:
        os.utime(image.path, ns=(1, 1))
    return {}


@pytest.mark.parametrize(
    ("change", "again"), [(nothing, ""), (anew, "abcdefg"), (one_changed, "e"), (all_touched, "abcdefg")]
)
def test_what_makes_a_caption_old(tiny, images, tmp_path, change, again):
    output = tmp_path / "out"
    caption(tiny, images, output)
    assert caption(**{"tiny": tiny, "images": images, "output": output, **change(tiny, images)}) == again
    assert sorted(captions(output)) == list("abcdefg") and len(records(output)) == 7
    assert figures(output) == "ab"


def test_another_map_draws_the_figures_anew_and_nothing_else(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images, output)
    said, before = captions(output), pixels_of(output)
    assert caption(tiny, images, output, attention_map="evidence") == "ab"
    assert captions(output) == said
    other = pixels_of(output)
    assert before.keys() == other.keys() and not any(is_redrawn(before[path], other[path]) for path in before)
    assert caption(tiny, images, output, attention_map="evidence") == ""
    assert caption(tiny, images, output) == "ab"
    again = pixels_of(output)
    assert before.keys() == again.keys() and all(is_redrawn(before[path], again[path]) for path in before)


@pytest.mark.parametrize("kept", ["evidence", "weights"])
def test_captions_of_before_both_maps_were_kept_are_gone_on_with(tiny, images, tmp_path, kept):
    """Then made_by.json said what figures draw, not each line, and evidence was kept only where it was drawn."""
    output, path = tmp_path / "out", tmp_path / "out" / "captions.jsonl"
    caption(tiny, images[:5], output)
    expected = pixels_of(output)
    left_out = {"figure_map"} | ({"evidence"} if kept == "weights" else set())
    lines = [{name: value for name, value in record.items() if name not in left_out} for record in records(output)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    maker = json.loads((output / "made_by.json").read_text())
    (output / "made_by.json").write_text(json.dumps({**maker, "attention_map": kept}))
    assert caption(tiny, images[5:], output) == "fg"  # other images: the old ones are shown as they are
    assert headings(output / "index.html") == ["f.png", "g.png", "a.png", "b.png"]
    page = (output / "index.html").read_text().rpartition("a.png</bdi>")[2]
    assert "data-weights=" in page and ("data-evidence=" in page) == (kept == "evidence")
    assert caption(tiny, images[:5], output) == "ab"  # the same images: their figures are drawn anew
    assert "".join(sorted(captions(output))) == "abcdefg"
    found = pixels_of(output)
    assert all(is_redrawn(expected[path], found[path]) for path in expected)


@pytest.mark.parametrize("settings", [{"length_penalty": 0.5}, {"identity": "another"}])
def test_another_checkpoint_or_other_settings_are_one_line_and_cost_nothing(tiny, images, tmp_path, settings):
    output = tmp_path / "out"
    caption(tiny, images, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    other = dataclasses.replace(tiny, identity=settings.pop("identity", tiny.identity))
    with pytest.raises(UserError, match="--output, or give --anew"):
        caption(other, images[:2], output, **settings)
    assert before == {path.name: path.read_bytes() for path in output.iterdir()}
    assert caption(other, images[:2], output, anew=True, **settings) == "ab"
    assert sorted(captions(output)) == ["a", "b"]


# --- A second call ----------------------------------------------------------------------------------------------


def table(output):
    with (output / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        return [row["image"] for row in csv.DictReader(file)]


def test_a_second_call_of_other_images_keeps_what_the_first_one_finished(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images[:5], output)
    first = {path.name: path.read_bytes() for path in output.glob("*.png")}
    assert caption(tiny, images[5:], output) == "fg"
    assert "".join(captions(output)) == "abcdefg" and len(table(output)) == 7
    assert figures(output) == "abfg"
    assert first == {name: (output / name).read_bytes() for name in first}
    assert headings(output / "index.html") == ["f.png", "g.png", "a.png", "b.png"]  # what was asked for comes first
    assert "a dog" in (output / "index.html").read_text().rpartition("b.png</bdi>")[2]  # its reference
    before = records(output)
    assert caption(tiny, images, output, figures=0) == ""
    assert records(output) == before and figures(output) == "abfg"
    assert headings(output / "index.html") == ["a.png", "b.png", "f.png", "g.png"]


def test_images_of_one_name_in_two_folders_have_a_line_and_a_figure_each(tiny, images, tmp_path):
    output, other = tmp_path / "out", tmp_path / "other" / "a.png"
    other.parent.mkdir()
    Image.new("RGB", (60, 40), "white").save(other)
    caption(tiny, images[:1], output)
    (first,) = output.glob("*.png")
    before = first.read_bytes()
    caption(tiny, [ImageToCaption(other, str(other))], output)
    assert [record["image"] for record in records(output)] == [images[0].name, str(other)]
    assert figures(output) == "aa" and first.read_bytes() == before


def test_a_changed_image_has_its_new_line_and_its_old_one_until_then(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images, output)
    Image.new("RGB", (9, 9)).save(images[0].path)
    caption(tiny, images[:1], output, Source(unreadable="a"))
    assert "".join(captions(output)) == "abcdefg" and figures(output) == "ab"
    old = records(output)[0]
    assert caption(tiny, images[:1], output) == "a"
    assert "".join(captions(output)) == "bcdefga" and records(output)[-1]["size"] != old["size"]
    assert figures(output) == "ab" and len(table(output)) == 7


def test_anew_begins_again(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images, output, figures=5)
    (output / "index_2.html").write_bytes((output / "index.html").read_bytes())
    (output / "mine.png").touch()
    assert caption(tiny, images[5:], output, anew=True) == "fg"
    assert "".join(captions(output)) == "fg" and figures(output) == "fg"
    assert headings(output / "index.html") == ["f.png", "g.png"]
    assert not (output / "index_2.html").exists() and (output / "mine.png").exists()
    assert caption(tiny, images[:2], output, anew=True, figures=0) == "ab"
    assert figures(output) == "" and not (output / "index.html").exists()


def test_an_image_that_changes_between_being_read_and_its_line_is_captioned_again(tiny, images, tmp_path):
    class Late(Source):
        def __call__(self, wanted):
            for batch, features in super().__call__(wanted):
                Image.new("RGB", (9, 9)).save(images[1].path)
                yield batch, features

    assert caption(tiny, images[:2], tmp_path / "out", Late()) == "ab"
    assert caption(tiny, images[:2], tmp_path / "out") == "b"


def test_a_page_of_somebody_else_stays(tiny, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("<p>mine")
    caption(tiny, images, tmp_path / "out", figures=0)
    assert (tmp_path / "out" / "index.html").read_text() == "<p>mine"


def test_figures_fit_their_images_when_others_come_before_them(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images[1:], output)
    assert caption(tiny, images, output) == "a"
    assert figures(output) == "abc"
    for record in records(output):
        name = os.path.basename(record["image"])[0]
        assert record.get("figure", "_").rpartition("_")[0] == (name if name in "abc" else "")


def test_more_figures_than_before_are_drawn(tiny, images, tmp_path):
    output = tmp_path / "out"
    caption(tiny, images, output, figures=0, attention="all")
    assert caption(tiny, images, output, figures=3) == "abc"
    assert figures(output) == "abc"
    assert headings(output / "index.html") == ["a.png", "b.png", "c.png"]  # the order of the images, not of the lines


# --- What may go wrong with an image ---------------------------------------------------------------------------


def test_a_figure_that_cannot_be_drawn_is_a_named_warning_and_the_rest_goes_on(
    tiny, images, tmp_path, monkeypatch, capsys
):
    def plot(prediction, path, attention_map):
        if prediction.path.stem == "a":
            raise RuntimeError("of a kind\nthat nobody thought of")
        path.touch()

    monkeypatch.setattr("captioning.inference.caption_images.plot_attention", plot)
    output = tmp_path / "out"
    caption(tiny, images, output)
    assert f"warning: no figure of {images[0].name}: of a kind that nobody thought of\n" in capsys.readouterr().out
    assert len(records(output)) == 7 and "figure" not in records(output)[0]
    assert figures(output) == "b"
    assert caption(tiny, images, output) == "a"  # the same command tries it again, and nothing else


def test_an_image_damaged_since_its_features_were_made_has_a_caption_and_no_figure(tiny, images, tmp_path, capsys):
    images[0].path.write_bytes(b"broken")
    caption(tiny, images, tmp_path / "out")
    assert captions(tmp_path / "out")["a"]
    assert f"warning: no figure of {images[0].name}: " in capsys.readouterr().out
    assert headings(tmp_path / "out" / "index.html") == ["a.png", "b.png"]


def test_images_that_cannot_be_read_have_no_line_and_are_tried_again(tiny, images, tmp_path):
    output = tmp_path / "out"
    options = types.SimpleNamespace(anew=False, attention="drawn")
    config = make_config({**SIZES, "max_words": 5, "repeat_block": 0, "figures": 2})
    output.mkdir()
    assert write_captions(tiny, images, Source(unreadable="ag"), output, options, config) == 5
    assert "".join(captions(output)) == "bcdef"
    assert headings(output / "index.html") == ["b.png"]
    assert write_captions(tiny, images, Source(unreadable="g"), output, options, config) == 6
    assert headings(output / "index.html") == ["a.png", "b.png"]


def test_if_no_image_can_be_read_there_is_no_page(tiny, images, tmp_path, capsys):
    caption(tiny, images, tmp_path / "out", Source(unreadable="abcdefg"))
    assert records(tmp_path / "out") == [] and not (tmp_path / "out" / "index.html").exists()
    assert "no page of attention" in capsys.readouterr().out


# --- Names and words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"b" * 250 + b".png", "犬".encode() * 80 + b".png", b"<img src=x onerror=alert(1)>.png"]
)
def test_any_name_of_an_image_will_do(tiny, tmp_path, name):
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / os.fsdecode(name)
    try:
        Image.new("RGB", (60, 40)).save(path)
    except OSError:
        pytest.skip("the file system does not take such a name")
    output = tmp_path / "out"
    with contextlib.redirect_stdout(io.StringIO()):  # a terminal shows such names too, see run_script
        assert len(caption(tiny, [ImageToCaption(path, str(path))], output)) == len(path.stem)
        assert caption(tiny, [ImageToCaption(path, str(path))], output) == ""
    (record,) = records(output)
    assert record["image"] == str(path)
    (figure,) = (path.name for path in output.glob("*.png"))
    assert record["figure"] == figure
    figure.encode()
    (heading,) = headings(output / "index.html")
    assert "<" not in heading


def test_no_order_in_a_name_or_a_caption_reaches_the_terminal(tiny, tmp_path, monkeypatch, capsys):
    orders = dataclasses.replace(tiny, vocabulary=[*VOCABULARY[:4], *(f"\x1b[{i}m\x9b" for i in range(17))])
    path = tmp_path / "a\x1b]0;title\x07\n\u202e.png"
    try:
        Image.new("RGB", (60, 40)).save(path)
    except OSError:
        pytest.skip("the file system does not take such a name")
    image = ImageToCaption(path, str(path), references=["a \x1b[31m dog"])
    fail = lambda *_: (_ for _ in ()).throw(ValueError(f"{path}\x1b"))  # noqa: E731
    monkeypatch.setattr("captioning.inference.caption_images.plot_attention", fail)
    caption(orders, [image], tmp_path / "out\x1b[m")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6 and all(line.isprintable() for line in printed.splitlines())
    assert r"a\x1b]0;title\x07\n\u202e.png" in printed and r"\x1b[31m dog" in printed


def test_two_names_of_the_same_file_have_a_line_each(tiny, images, tmp_path):
    other = images[0].path.with_name("b2.png")
    try:
        other.symlink_to(images[0].path)
    except OSError:
        pytest.skip("the file system has no links")
    twins = [images[0], ImageToCaption(other, str(other))]
    assert caption(tiny, twins, tmp_path / "out") == "ab2"
    assert [record["image"] for record in records(tmp_path / "out")] == [image.name for image in twins]
    assert caption(tiny, twins, tmp_path / "out") == ""


def test_words_that_other_programs_would_take_for_orders_are_words(tiny, images, tmp_path, capsys):
    """A $ is TeX for matplotlib, < is HTML for a browser."""
    hostile = dataclasses.replace(tiny, vocabulary=VOCABULARY[:4] + [f"<b>$\\x{i}$" for i in range(17)])
    caption(hostile, images, tmp_path / "out")
    assert "warning" not in capsys.readouterr().out
    assert figures(tmp_path / "out") == "ab"
    assert "<b>$" not in (tmp_path / "out" / "index.html").read_text()


def test_a_caption_without_words_is_a_caption(images, tmp_path, capsys):
    silent = tiny_captioner(make_config(SIZES), FEATURES)
    silent.decoder.output_layer.bias.assign(100 * np.eye(len(VOCABULARY))[3])  # <end>
    output = tmp_path / "out"
    assert caption(silent, images, output) == "abcdefg"
    assert set(captions(output).values()) == {""} and len(records(output)) == 7
    assert figures(output) == "ab"
    assert headings(output / "index.html") == ["a.png", "b.png"]
    assert caption(silent, images, output) == ""


def write_instances(folder, image_ids):
    """COCO instances in which `word9` is the left half of each image."""
    (folder / "annotations").mkdir()
    instances = {
        "images": [{"id": i, "width": 60, "height": 40} for i in image_ids],
        "categories": [{"id": 1, "name": "word9"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 30, 40]} for i in image_ids],
    }
    (folder / "annotations" / "instances_train2014.json").write_text(json.dumps(instances))


def test_boxes_of_what_a_word_names_are_on_the_page_of_a_data_sets_images(tiny, images, tmp_path, capsys):
    numbered = [dataclasses.replace(image, image_id=number) for number, image in enumerate(images, 1)]
    coco = {"coco_dir": str(tmp_path), "figures": 7}
    caption(tiny, numbered, tmp_path / "without", **coco)
    assert "data-boxes" not in (tmp_path / "without" / "index.html").read_text()
    write_instances(tmp_path, range(1, 8))
    caption(tiny, numbered, tmp_path / "with", **coco)
    buttons = re.findall("<button.*?</button>", (tmp_path / "with" / "index.html").read_text())
    named = [button for button in buttons if button.endswith(">word9</button>")]
    assert named and all('data-boxes="[[0.0, 0.0, 0.5, 1.0]]"' in button for button in named)
    assert sum("data-boxes" in button for button in buttons) == len(named)

    caption(tiny, images, tmp_path / "own", **coco)  # whose image nobody knows
    assert "data-boxes" not in (tmp_path / "own" / "index.html").read_text()
    (tmp_path / "annotations" / "instances_train2014.json").write_text("[]")
    assert "note" not in capsys.readouterr().out
    caption(tiny, numbered, tmp_path / "damaged", **coco)
    assert "note: the page of attention has no boxes: " in capsys.readouterr().out
    assert headings(tmp_path / "damaged" / "index.html")[0] == "a.png"
