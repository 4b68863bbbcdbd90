import pathlib
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from captioning.attention.figure import _lay_out_panels
from captioning.attention.fonts import _DEFAULT_FAMILY, _find_families, letters_in_fonts

FONTS = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
ITS_OWN = "\ue0f9"  # which of matplotlib's fonts STIXNonUnicode alone has


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that says which fonts the machine has."""
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    names = lambda fonts: [str(damaged), *(str(FONTS / name) for name in fonts)]  # noqa: E731
    return lambda *fonts: monkeypatch.setattr(font_manager, "findSystemFonts", lambda: names(fonts))


def draw(word, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter without a font
        _lay_out_panels([(word, np.ones((9, 190, 3)))], (190, 9), word).savefig(path)


def test_europes_letters_need_no_other_font(machine, capsys):
    machine()
    assert _find_families(["dog", "Übergröße", "кот", "سگی", "می\u200cدود"]) == [_DEFAULT_FAMILY]
    assert _find_families([]) == [_DEFAULT_FAMILY]
    assert capsys.readouterr().out == ""


def test_the_font_that_has_the_other_letters_is_taken(machine, capsys, tmp_path):
    machine("cmr10.ttf", "STIXNonUniBol.ttf", "STIXNonUni.ttf")
    families = _find_families(["dog", f"x{ITS_OWN}"])
    assert families == [_DEFAULT_FAMILY, "STIXNonUnicode"]
    assert capsys.readouterr().out == ""
    with letters_in_fonts([ITS_OWN]):
        draw(f"x{ITS_OWN}", tmp_path / "figure.png")
    with pytest.raises(UserWarning, match="missing"):
        draw(f"x{ITS_OWN}", tmp_path / "figure.png")


def test_letters_that_no_font_has_are_named_in_one_line(machine, capsys):
    machine("cmr10.ttf")
    assert _find_families(["dog", "一只狗", "狗"]) == [_DEFAULT_FAMILY]
    (line,) = capsys.readouterr().out.splitlines()
    assert "no font here has 3 of the captions' letters (一 只 狗)" in line
    _find_families([chr(ord("一") + i) for i in range(500)])
    assert "500 of the captions' letters (" in (line := capsys.readouterr().out) and "..." in line and len(line) < 250
