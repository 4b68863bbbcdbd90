import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from captioning.attention import figure
from captioning.attention.figure import _GAP, _LINE, _PANEL_WIDTH, plot_attention
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.training.saving import _plot_losses
from conftest import full_disk
from support.errors import UserError


def make_caption(path, words, weights=None):
    weights = np.random.default_rng(0).random((len(words), 64)) if weights is None else weights
    return GeneratedCaption(path, str(path), words, np.zeros(len(words)), weights)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 100)])
def test_figures_of_any_number_of_words_and_any_shape(tmp_path, count, size):
    Image.new("RGB", size, "white").save(tmp_path / "image.png")
    plot_attention(make_caption(tmp_path / "image.png", [f"word{i}" for i in range(count)]), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 100
        dark = (np.asarray(figure.convert("L")) < 128).mean()
    assert dark > 0.02 if count else dark < 0.1  # the attention panels darken what was not looked at


@pytest.mark.parametrize("data", [None, b"", b"P6 20000 20000 255\n"])  # the last is more than Pillow opens
def test_an_image_gone_or_damaged_since_its_features_were_made_is_named(tmp_path, data):
    path = tmp_path / "image.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match="image.png cannot be drawn"):
        plot_attention(make_caption(path, ["word"]), tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("size", "panel"), [((1, 1), (190, 190)), ((40, 20), (190, 95)), ((1, 5000), (1, 570)), ((5000, 1), (190, 1))]
)
def test_panels_fill_their_room_whatever_the_image(tmp_path, size, panel):
    Image.new("RGB", size, "red").save(tmp_path / "image.png")
    caption = make_caption(tmp_path / "image.png", ["w"] * 12, np.ones((12, 64)))
    plot_attention(caption, tmp_path / "figure.png")
    figure = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)
    assert max(figure.shape) < 2500
    title, below = figure[:_LINE], figure[_LINE:]
    assert title.min() < 100  # there is one,
    assert title[0].min() == 255  # which does not touch the edge
    column = below[:, : _PANEL_WIDTH + _GAP]  # three panels, one below the other
    red = (column[:, :, 0] > 100) & (column[:, :, 1:] < 30).all(axis=2)  # level light leaves it darker
    assert (red.any(axis=0).sum(), red.any(axis=1).sum()) == (panel[0], 3 * panel[1])


def test_the_light_of_a_panel_falls_where_the_weight_is(tmp_path):
    Image.new("RGB", (190, 190), "white").save(tmp_path / "image.png")
    plot_attention(make_caption(tmp_path / "image.png", ["w"], np.eye(64)[[8 * 1 + 6]]), tmp_path / "figure.png")
    figure = np.asarray(Image.open(tmp_path / "figure.png").convert("L")).astype(float)
    panel = figure[-190:, _PANEL_WIDTH + _GAP :][:, _GAP // 2 : _GAP // 2 + 190]  # the second of one row
    row, column = np.unravel_index(panel.argmax(), panel.shape)
    assert abs(row / 190 - 1.5 / 8) < 0.1
    assert abs(column / 190 - 6.5 / 8) < 0.1
    assert panel[-20:, :20].max() < 100


@pytest.mark.parametrize(
    ("given", "place", "name"),
    [((), 14, "attention weights"), (("weights",), 14, "attention weights"), (("evidence",), 50, "evidence")],
)
def test_a_figure_draws_attention_weights_unless_evidence_is_wanted_and_names_them(
    tmp_path, monkeypatch, given, place, name
):
    Image.new("RGB", (190, 190), "white").save(tmp_path / "image.png")
    caption = dataclasses.replace(
        make_caption(tmp_path / "image.png", ["dog"], np.eye(64)[[14]]), evidence=np.eye(64)[[50]]
    )
    texts, lay_out = [], figure._lay_out_panels

    def note(panels, size, title):
        texts.extend([*(word for word, _ in panels), title])
        lit = panels[1][1].mean(axis=2)
        row, column = np.unravel_index(lit.argmax(), lit.shape)
        assert 8 * (8 * row // 190) + 8 * column // 190 == place
        return lay_out(panels, size, title)

    monkeypatch.setattr(figure, "_lay_out_panels", note)
    plot_attention(caption, tmp_path / "figure.png", *given)
    assert texts == ["", "dog", f"dog\n{name}"]


@pytest.mark.parametrize("epochs", [1, 9])
def test_losses_are_drawn_by_epoch(tmp_path, epochs):
    history = [{"epoch": i + 1, "train_loss": 4 / (i + 1), "validation_loss": 5 / (i + 1)} for i in range(epochs)]
    _plot_losses(history, tmp_path / "new" / "loss.png")
    with Image.open(tmp_path / "new" / "loss.png") as figure:
        assert figure.width > 300
        assert np.asarray(figure.convert("L")).min() < 100


def test_the_ciders_of_self_critical_epochs_are_drawn_below_the_losses(tmp_path):
    history = [{"epoch": 1, "train_loss": 4.0, "validation_loss": 3.5}]
    _plot_losses(history, tmp_path / "before.png")
    row = {"epoch": 2, "train_loss": None, "validation_loss": 3.4, "sampled_cider": 0.3, "validation_cider": 0.4}
    _plot_losses([*history, row, {**row, "epoch": 3}], tmp_path / "loss.png")
    before, after = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("before.png", "loss.png"))
    assert len(after) > 1.5 * len(before)
    assert (after[len(before) :] < 100).any()


def test_a_full_disk_is_one_line_that_names_the_figure(tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "image.png")
    with full_disk(500), pytest.raises(UserError, match=r"cannot write .*figure\.png: .* MB free there"):
        plot_attention(make_caption(tmp_path / "image.png", ["w"]), tmp_path / "figure.png")
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == ["image.png"]
