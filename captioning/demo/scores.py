"""How much of what captions say about demo scenes is true, and which object each noun means."""

import collections
import dataclasses
import itertools
import re

from captioning.demo.scenes import COLOURS, GROUND_COLOURS, PATTERNS, PLACE_PHRASES, RELATIONS, SECOND_COLOURS

# For each kind of attribute the words or phrases of captions, and what they mean.
_WORDS = {
    "relation": RELATIONS,
    "place": {phrase: place for place, phrase in PLACE_PHRASES.items()},
    "ground": {ground: ground for ground in GROUND_COLOURS},
    "noun": {noun: noun for noun in SECOND_COLOURS},
    "colour": {colour: colour for colour in COLOURS},
    "pattern": {word: pattern for pattern, word in PATTERNS.items()},
}
_ANY_WORD = re.compile("|".join(rf"(?P<{kind}>\b(?:{'|'.join(words)})\b)" for kind, words in _WORDS.items()))


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption says.

    Attributes:
      objects: list of lists of (kind, value), the kinds being noun, colour, pattern and place. Words that belong to no
        noun make an object without one.
      noun_positions: list of int or None, where each object's noun is among the caption's words.
      relations: list of ((place, place), (index, index)), the places that a relation gives to two of the objects.
      grounds: list of str.
    """

    objects: list
    noun_positions: list
    relations: list
    grounds: list


def score_captions(captions, scenes):
    """Measure how much of generated captions is true.

    Each described object is matched to a true one, or to none. It is right if everything that the caption says of it is
    true: noun, colour, pattern and place, which a relation may give. An object without a match is wrong in everything.
    So are words that belong to no noun. A caption without objects counts as one wrong object.

    Args:
      captions: list of str, generated.
      scenes: list of Scene, one for each caption.

    Returns:
      dict of shares in 0..1. "objects" is the share of described objects that are right. "noun", "colour", "pattern",
      "place", "relation" and "ground" are the shares of these words that are true. "mentioned" is the share of true
      objects that have a match. Kinds that no caption names are left out.
    """
    right, named = collections.Counter(), collections.Counter()
    for caption, scene in zip(captions, scenes, strict=True):
        description = _describe(caption)
        matches = _match_objects(description.objects, scene.objects)
        named["objects"] += max(1, len(matches))
        named["mentioned"] += len(scene.objects)
        right["mentioned"] += sum(match is not None for match in matches)
        for described, match in zip(description.objects, matches, strict=True):
            right["objects"] += _is_right(described, match)
            for kind, value in described:
                named[kind] += 1
                right[kind] += _is_true(kind, value, match)
        for ground in description.grounds:
            named["ground"] += 1
            right["ground"] += ground == scene.ground
        for places, indices in description.relations:
            named["relation"] += 1
            right["relation"] += all(_is_true("place", places[i], matches[index]) for i, index in enumerate(indices))
    return {kind: right[kind] / total for kind, total in named.items()}


def locate_nouns(caption, scene):
    """Find where the nouns of a caption are to be seen. str, Scene -> list of (position among its words, box).

    There is one for each described object that is matched to a true one.
    """
    description = _describe(caption)
    matches = _match_objects(description.objects, scene.objects)
    pairs = zip(description.noun_positions, matches, strict=True)
    return [(position, match.box) for position, match in pairs if match is not None]


def _describe(caption):
    """Read what a caption says. str -> Description."""
    text = caption.lower()
    found = [(match.lastgroup, _WORDS[match.lastgroup][match[0]], match.start()) for match in _ANY_WORD.finditer(text)]
    kinds = [kind for kind, _, _ in found]
    # If the first place precedes its noun, as in "on the left is a ball", so do all places of the caption.
    places_first = "place" in kinds and "noun" not in kinds[: kinds.index("place")]
    objects, positions, relations, grounds = collections.defaultdict(list), {}, [], []
    last = -1  # the number of the last noun; words before the first noun belong to the object -1
    for kind, value, start in found:
        if kind == "noun":
            last += 1
            positions[last] = len(text[:start].split())
        if kind == "ground":
            grounds.append(value)
        elif kind == "relation":
            # "A is above B". Before the first noun it is "above A is B".
            indices = (last, last + 1) if last >= 0 else (1, 0)
            relations.append((value, indices))
            for place, index in zip(value, indices, strict=True):
                objects[index].append(("place", place))
        else:
            objects[last + 1 if kind == "place" and places_first else last].append((kind, value))
    order = {index: n for n, index in enumerate(objects)}
    relations = [(places, tuple(order[index] for index in indices)) for places, indices in relations]
    return Description(list(objects.values()), [positions.get(index) for index in objects], relations, grounds)


def _match_objects(described, true):
    """Match described objects to true ones, each true one to at most one described.

    The match makes as many described objects right as possible, and then as many of their attributes. An object
    without a noun has no match.

    list of lists of (kind, value), list of SceneObject -> list of SceneObject or None, one for each described object
    """

    def fit(matches):
        pairs = list(zip(described, matches, strict=True))
        right = sum(_is_right(attributes, match) for attributes, match in pairs)
        true_attributes = sum(_is_true(kind, value, match) for attributes, match in pairs for kind, value in attributes)
        return right, true_attributes, sum(match is not None for match in matches)

    # Each true object takes the place of a described one. Places beyond the last described one mean: not described.
    candidates = []
    for places in itertools.permutations(range(max(len(described), len(true))), len(true)):
        matches = dict(zip(places, true, strict=True))
        candidates.append(
            [matches.get(place) if "noun" in dict(attributes) else None for place, attributes in enumerate(described)]
        )
    return max(candidates, key=fit)


def _is_right(described, match):
    """Whether everything that is said of a described object is true of its match."""
    return match is not None and all(_is_true(kind, value, match) for kind, value in described)


def _is_true(kind, value, match):
    return match is not None and getattr(match, kind) == value
