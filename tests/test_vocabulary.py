import collections

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from captioning.vocabulary import (
    END,
    PAD,
    SPECIAL_WORDS,
    START,
    UNK,
    build_vocabulary,
    encode_captions,
    read_vocabulary,
)
from captioning.words import split_words
from strategies import SENTENCES
from support.errors import UserError
from support.files import write_json

CAPTIONS = [
    wording.format(colour, thing)
    for colour in ("red", "green", "blue", "white")
    for thing in ("dog", "cat", "boat")[: len(colour) - 2]  # so that some words are more frequent than others
    for wording in ("A {} {}.", "There is a {} {} here", "a {} {} on the left, it's near", "The {} {}", "{} {} alone")
]


def simple_words(caption):
    return "".join(letter if letter.isalpha() or letter == "'" else " " for letter in caption.lower()).split()


def test_captions_become_token_ids_and_back():
    vocabulary = build_vocabulary(CAPTIONS, 5000)
    assert vocabulary[:4] == ["<pad>", "<unk>", "<start>", "<end>"]
    encoded = encode_captions(CAPTIONS, vocabulary)
    for caption, token_ids in zip(CAPTIONS, encoded, strict=True):
        assert (token_ids[0], token_ids[-1]) == (START, END)
        assert [vocabulary[i] for i in token_ids[1:-1]] == simple_words(caption)


def test_the_vocabulary_is_the_most_frequent_words_up_to_vocab_size():
    vocabulary = build_vocabulary(CAPTIONS, 10)
    assert len(vocabulary) == 10
    counts = collections.Counter(word for caption in CAPTIONS for word in simple_words(caption))
    assert [counts[word] for word in vocabulary[4:]] == sorted(counts.values(), reverse=True)[:6]
    unknown = [UNK in token_ids for token_ids in encode_captions(CAPTIONS, vocabulary)]
    assert unknown == [not set(simple_words(caption)) <= set(vocabulary) for caption in CAPTIONS]
    assert any(unknown)


def test_words_are_counted_and_of_scripts_without_blanks_characters():
    assert [len(split_words(caption)) for caption in ("a dog's tail", "!?", "", "一只狗 and น้ำ")] == [3, 0, 0, 5]


def test_of_equally_frequent_words_the_later_in_the_alphabet_comes_first():
    assert build_vocabulary(["b 狗 a", "c é 狗"], 5000)[4:] == ["狗", "é", "c", "b", "a"]
    assert build_vocabulary(["b 狗 a", "c é 狗"], 6)[4:] == ["狗", "é"]


def test_without_captions_there_is_nothing_to_encode():
    assert encode_captions([], list(SPECIAL_WORDS)) == []


def test_a_vocabulary_is_read_as_it_was_written(tmp_path):
    vocabulary = build_vocabulary(CAPTIONS, 12)
    write_json(tmp_path / "vocabulary.json", vocabulary)
    assert read_vocabulary(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: dict.fromkeys(words),
        lambda words: [*words, 7],
        lambda words: words[4:],
        lambda words: [*words, words[-1]],
        lambda words: [],
        lambda words: None,
    ],
)
def test_a_damaged_vocabulary_is_one_line(tmp_path, damage):
    path = tmp_path / "vocabulary.json"
    write_json(path, damage([*SPECIAL_WORDS, "a", "dog"]))
    with pytest.raises(UserError, match="vocabulary.json is damaged .*"):
        read_vocabulary(path)


@pytest.mark.slow
@given(st.lists(SENTENCES.filter(lambda text: text.isascii() or text.isprintable()), max_size=5), st.integers(5, 12))
@example(["<start> start <END> [UNK] <pad> <unk> ''"], 12)
def test_any_captions_become_token_ids_and_the_same_words_again(captions, vocab_size):
    captions = [text for text in captions if split_words(text)]
    assume(captions)
    vocabulary = build_vocabulary(captions, vocab_size)
    assert vocabulary[:4] == list(SPECIAL_WORDS)
    assert len(set(vocabulary)) == len(vocabulary) <= vocab_size

    for caption, token_ids in zip(captions, encode_captions(captions, vocabulary), strict=True):
        assert (token_ids[0], token_ids[-1]) == (START, END)
        assert not {PAD, START, END} & set(token_ids[1:-1])
        known = [word if word in vocabulary else "<unk>" for word in split_words(caption)]
        assert [vocabulary[i] for i in token_ids[1:-1]] == known
