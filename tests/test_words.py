import json
import pathlib
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.vocabulary import build_vocabulary
from captioning.words import CHARACTER, character_scripts, is_character, join_words, split_words

FIELD_INPUTS = pathlib.Path(__file__).parents[2] / "shared" / "field_inputs"

ENGLISH = {  # caption: its words, with blanks between
    " 'Two' DOGS' tails,it's  5 p.m.!": "two dogs tails it's 5 p m",
    "rock''n'roll 'stop' 'go' '' a_b": "rock''n'roll stop go a b",
    "the man\u2019s and the man\u02bcs and the man\uff07s": "the man's and the man's and the man's",
    "\u2018a dog\u2019 iPad\u2122 \u00bd cup, 3\u00b2": "a dog ipad 1 2 cup 32",
    "Ein Hündchen, STRASSE und Straße\n...": "ein hündchen strasse und straße",
    "cafe\u0301 caf\u00e9 \uff24\uff4f\uff47 \ufb01sh": "café café dog fish",
    "foot\u00adball\u200b\ufeffteam \u2764\ufe0f 1\ufe0f\u20e3": "football team 1\u20e3",
    "ΟΔΟΣ İZMİR кот": "οδος i\u0307zmi\u0307r кот".replace("οδος", "οδο\u03c2"),
    "\u0301a \ud800 b \u2028c": "a b c",
    "مردی می\u200cخواهد\u200c بدود": "مردی می\u200cخواهد بدود",
    "\u05db\u05dc\u05d1\u200f, צ\u05f3יפס": "כלב צ'יפס",
    "अवन\u094d\u200d क्\u200cष हिन्दी": "अवन\u094d\u200d क्\u200cष हिन्दी",
    "개가 풀밭을 달린다.": "개가 풀밭을 달린다",
}
CHARACTERS = {  # caption: its words, with bars between; how they are written
    "一只狗，在草地上。": ("一|只|狗|在|草|地|上", "一只狗在草地上"),
    "3个人穿Ｔ恤 and hats, 人々": ("3|个|人|穿|t|恤|and|hats|人|々", "3个人穿t恤and hats人々"),
    "ｺｰﾋｰをか\u3099飲む ガ": ("コ|ー|ヒ|ー|を|が|飲|む|ガ", "コーヒーをが飲むガ"),
    "ผู้ชายขี่ม้า น้ำ ๑๒": ("ผู้|ช|า|ย|ขี่|ม้|า|น้ำ|๑|๒", "ผู้ชายขี่ม้าน้ำ๑๒"),
    "ໝານ້ຳ": ("ຫ|ມ|າ|ນ້ຳ", "ຫມານ້ຳ"),
    "ស្ត្រី\u200bខ្មែរ្": ("ស្ត្រី|ខ្មែ|រ", "ស្ត្រីខ្មែរ"),
    "အင်္ဂလိပ်": ("အ|င်္ဂ|လိ|ပ်", "အင်္ဂလိပ်"),
    "葛\U000e0100城 𠮷": ("葛|城|𠮷", "葛城𠮷"),
}


@pytest.mark.parametrize("caption", ENGLISH)
def test_words_are_letters_digits_and_inner_apostrophes_in_one_form(caption):
    words = split_words(caption)
    assert words == ENGLISH[caption].split(" ")
    assert join_words(words) == ENGLISH[caption]
    assert not character_scripts(words)


@pytest.mark.parametrize("caption", CHARACTERS)
def test_scripts_without_blanks_have_characters_as_words_and_are_written_without_blanks(caption):
    words, written = CHARACTERS[caption]
    assert split_words(caption) == words.split("|")
    assert join_words(words.split("|")) == written
    assert split_words(written) == words.split("|")
    assert character_scripts(split_words(caption))


def test_nothing_is_no_word():
    assert split_words("") == split_words(" '' !\u200d\u0301") == []
    assert join_words([]) == ""
    assert join_words(["<unk>", "dog"]) == "<unk> dog"


LETTERS = st.sampled_from("aB1'’\u200c\u200d\u0301 ,ß狗一ーカﾊﾞกัำ้เລຳខ្ែកာင်္क्षسم나")


@given(st.text(st.one_of(LETTERS, st.characters()), max_size=12))
def test_a_caption_of_words_has_these_words(text):
    words = split_words(text)
    assert split_words(" ".join(words)) == words
    assert all(re.match(r"\w", word) and not re.search(r"\s", word) for word in words)
    assert words == [word.lower() for word in words]
    assert all(unicodedata.is_normalized("NFC", word) for word in words)
    if "\u0e4d" not in text and "\u0ecd" not in text:  # these and the letter behind them are one vowel, once joined
        assert split_words(join_words(words)) == words


def test_the_scripts_are_those_of_unicodes_names():
    """No letter of these scripts is left out, and none of another is in."""
    names = "THAI|LAO|MYANMAR|KHMER|HIRAGANA|KATAKANA|CJK UNIFIED IDEOGRAPH|CJK COMPATIBILITY IDEOGRAPH"
    others = "KATAKANA-HIRAGANA|IDEOGRAPHIC|HANGZHOU|VERTICAL IDEOGRAPHIC|MASU|KHMER SYMBOL"
    others += "|HENTAIGANA"
    ours = re.compile(f"[{CHARACTER}]")
    for letter in filter(str.isalnum, map(chr, range(sys.maxunicode + 1))):
        name = unicodedata.name(letter, "")
        if ours.match(letter):
            assert re.match(f"{names}|{others}", name), name
        else:
            assert not re.match(names, name), name


# --- Files as people have them


def read_captions(name):
    path = FIELD_INPUTS / name
    if not path.exists():
        pytest.skip(f"../shared/field_inputs/{name} is not here")
    return [record["caption"] for record in json.loads(path.read_text(encoding="utf-8"))["annotations"]]


@pytest.mark.parametrize("name", ["coco_chinese.json", "coco_thai.json"])
def test_captions_without_blanks_become_characters_and_captions_again(name):
    captions = read_captions(name)
    words = build_vocabulary(captions, 5000)[4:]
    assert all(is_character(word) for word in words)
    assert all(len(re.sub(r"\W", "", word)) == 1 for word in words)
    assert [join_words(split_words(caption)) for caption in captions] == [text.rstrip("。") for text in captions]


def test_a_persian_word_with_a_joiner_is_one_word():
    captions = read_captions("coco_persian.json")
    assert {"می\u200cخواهد", "می\u200cدود"} <= set(build_vocabulary(captions, 5000))
    assert [join_words(split_words(caption)) for caption in captions] == captions


def test_both_apostrophes_make_the_same_word():
    assert set(build_vocabulary(read_captions("coco_apostrophes.json"), 5000)[4:]) == {"the", "man's", "dog", "runs"}
