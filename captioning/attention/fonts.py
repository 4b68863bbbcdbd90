"""Fonts of this machine that have the letters of captions, for figures."""

import contextlib
import unicodedata

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

_DEFAULT_FAMILY = "sans-serif"  # matplotlib's own font, with the letters of Europe, and Arabic and Hebrew
_MOST_QUOTED = 12  # letters that a message quotes at the most


def letters_in_fonts(words):
    """A context in which matplotlib shows words in the fonts that `_find_families` finds."""
    return matplotlib.rc_context({"font.family": _find_families(words)})


def _find_families(words):
    """The font families in which matplotlib can show words, its own font first. list of str -> list of str.

    Of the other fonts those come first that have the most of the letters, of these the ones of regular style, and of
    these the sans serifs, which go with matplotlib's own. Letters that no font has are printed in one line.
    """
    letters = {ord(letter) for letter in "".join(words) if unicodedata.category(letter) != "Cf"}
    default = font_manager.findfont(font_manager.FontProperties(family=[_DEFAULT_FAMILY]))
    missing, families = letters - FT2Font(default).get_charmap().keys(), [_DEFAULT_FAMILY]
    fonts = _read_fonts(missing) if missing else []
    while missing and fonts:
        had, _, path, family = max(fonts, key=lambda font: (len(font[0] & missing), *font[1]))
        if not had & missing:
            break
        font_manager.fontManager.addfont(path)  # matplotlib's own list may be older than the font
        families.append(family)
        missing -= had
    if missing:
        quoted = " ".join(map(chr, sorted(missing)[:_MOST_QUOTED])) + (" ..." if len(missing) > _MOST_QUOTED else "")
        print(
            f"no font here has {len(missing)} of the captions' letters ({quoted}), and figures show boxes for them: "
            "install one that has, such as Noto"
        )
    return families


def _read_fonts(letters):
    """What each font of the machine has of some letters, a set of code points.

    Returns:
      list of (set of those it has, (whether its style is regular, whether it is a sans serif), path, family)
    """
    fonts = []
    for path in sorted(font_manager.findSystemFonts()):
        with contextlib.suppress(OSError, RuntimeError):  # a damaged file, or of a kind that cannot be read
            font = FT2Font(path)
            fit = font.style_name in ("Regular", "Book", "Roman", "Medium"), "Sans" in font.family_name
            fonts.append((letters & font.get_charmap().keys(), fit, path, font.family_name))
    return fonts
