"""The form of captions, whatever they say: how many differ, how long they are, and how many break off."""

import dataclasses

from captioning.words import split_words

# Articles, prepositions and conjunctions of English, behind which something must come.
OPEN_WORDS = frozenset(
    "a an the about above across against along among and around as at because before behind below beneath beside "
    "between beyond but by during for from if in inside into like near of off on onto or over past than that through "
    "to toward towards under until upon when where which while with within without".split()
)


@dataclasses.dataclass(frozen=True)
class CaptionForm:
    """What the captions of a split look like.

    Attributes:
      captions: int, how many there are.
      distinct: int, how many different ones.
      mean_length: float, words.
      broken_endings: int, captions whose last word is an article, a preposition or a conjunction, or that have no word.
    """

    captions: int
    distinct: int
    mean_length: float
    broken_endings: int

    def __str__(self):
        return (
            f"{self.distinct} of {self.captions} captions differ; {self.mean_length:.1f} words each; "
            f"{self.broken_endings} break off"
        )


def describe_form(captions):
    """The CaptionForm of some captions. list of str -> CaptionForm."""
    words = [split_words(caption) for caption in captions]
    return CaptionForm(
        captions=len(captions),
        distinct=len(set(captions)),
        mean_length=sum(map(len, words)) / max(len(words), 1),
        broken_endings=sum(not each or each[-1] in OPEN_WORDS for each in words),
    )
