"""Captions cut into words, and words joined to captions: the one normalisation of all that people write.

A word is a run of letters, digits and inner apostrophes. Han, kana, Thai, Lao, Khmer and Myanmar have no blanks between
words. There each character is a word, with the marks that belong to it, and captions are written back without blanks.
"""

import itertools
import re
import unicodedata

# The letters, digits and marks of scripts without blanks between words. From Unicode's Scripts.txt, with the signs for
# repeated and for long sounds that Unicode counts to no single script. Code points without a letter are inside too.
_CHARACTER_SCRIPTS = {
    "Thai": "\u0e01-\u0e5b",
    "Lao": "\u0e81-\u0edf",
    "Myanmar": "\u1000-\u109f\ua9e0-\ua9fe\uaa60-\uaa7f\U000116d0-\U000116e3",
    "Khmer": "\u1780-\u17f9",
    "Hiragana": "\u3041-\u309f\U0001b001-\U0001b11f\U0001b132\U0001b150-\U0001b152",
    "Katakana": "\u30a1-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b000\U0001b120-\U0001b122\U0001b155\U0001b164-\U0001b167",
    "Han": "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufad9\U00020000-\U0003347f",
}
CHARACTER = "".join(_CHARACTER_SCRIPTS.values())  # all of them, for a class of a regular expression

# Apostrophes as people and programs write them: left, right and reversed quotes, the letter, the acute accent, full
# width, and Hebrew's geresh. The grave accent is ASCII, and parts words as before.
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u00b4\uff07\u05f3"), "'")

# In text that `_Letters` has gone through, whatever is no \w, apostrophe, joiner or blank is a mark.
_MARK = r"[^\w\s'\u200c\u17d2\u1039]"  # U+200D too
_OTHER = rf"[^\W{CHARACTER}]"  # a letter or digit of a script with blanks
_FOLLOWING = (  # what stays with a character: vowels behind it (two are letters), marks, and letters set below it
    rf"[\u0e33\u0eb3]|{_MARK}|\u200c(?={_MARK})|[\u17d2\u1039](?=\w)[{CHARACTER}]"
)
_WORD = re.compile(
    rf"(?=\w)(?![\u0e33\u0eb3])[{CHARACTER}](?:{_FOLLOWING})*|{_OTHER}(?:{_OTHER}|{_MARK}|['\u200c]+(?={_OTHER}))*"
)
_ASCII_WORD = re.compile("[a-z0-9]+(?:'+[a-z0-9]+)*")
_STARTS_AS_CHARACTER = re.compile(f"[{CHARACTER}]")


class _Letters(dict):
    """A table for str.translate that leaves letters, marks, digits, apostrophes and joiners; filled as they come.

    What has no shape of its own is dropped, such as soft hyphens, marks of direction and choices between glyphs. All
    else is a blank, with U+200B, which parts words unseen.
    """

    def __missing__(self, code):
        kind = unicodedata.category(chr(code))
        dropped = (kind == "Cf" and code != 0x200B) or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
        self[code] = None if dropped else code if kind[0] in "LMN" else " "
        return self[code]


_LETTERS = _Letters(_APOSTROPHES | {code: code for code in map(ord, "'\u200c\u200d")})


def split_words(caption):
    """Cut a caption into words.

    Letters are in lower case and in Unicode's form NFKC, so that what looks alike is one word. `str.lower` is the same
    on every machine and leaves words as people write them; `casefold` would make "strasse" of German "Straße". U+200C,
    which Persian has between parts of a word, and U+200D stay. str -> list of str.
    """
    text = caption.translate(_LETTERS)
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())  # what _WORD finds, but sooner
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(_LETTERS)
    # NFKC takes Thai's and Lao's vowel AM apart, which many fonts then draw wrongly.
    return _WORD.findall(text.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3"))


def is_character(word):
    """Whether a word is a character of a script without blanks between words."""
    return _STARTS_AS_CHARACTER.match(word) is not None


def parted(words):
    """For each word whether a blank is before it: between two words neither of which is a character.

    list of str -> list of bool, False for the first word
    """
    characters = list(map(is_character, words))
    return [False] * bool(words) + [not (before or after) for before, after in itertools.pairwise(characters)]


def join_words(words):
    """Write words as a caption, so that `split_words` finds the same words in it. list of str -> str."""
    return "".join(" " * blank + word for blank, word in zip(parted(words), words, strict=True))


def character_scripts(words):
    """The names of the scripts whose characters are among the words. list of str -> list of str."""
    text = "".join(words)
    return [name for name, letters in _CHARACTER_SCRIPTS.items() if re.search(f"[{letters}]", text)]
