"""The boxes of what captions name, where a data set knows them: the demo's scenes, and COCO's instances_*.json."""

import dataclasses
import pathlib

import numpy as np

from captioning.data.coco import read_instances
from captioning.demo.scenes import read_scenes
from captioning.demo.scores import locate_nouns
from support.errors import UserError


def find_groundings(captions, config):
    """The words that name objects with known boxes, in the demo's scenes or in COCO's instances.

    Args:
      captions: list of GeneratedCaptions with image ids.

    Returns:
      (list of Groundings, or None where no boxes are known; dict of what else is to be reported)

    Raises:
      UserError: the scenes or the instances are damaged, or are those of other images.
    """
    if config.dataset == "demo":
        return _demo_groundings(captions, read_scenes(config.coco_dir)), {}
    instances = _instances_path(captions, config)
    if config.dataset != "coco" or not instances.exists():
        return None, {}
    groundings, absent = _coco_groundings(captions, instances)
    return groundings, {"absent": absent}


def _instances_path(captions, config):
    """Where COCO's instances of the captioned images are: those of the split in whose folder the images lie."""
    annotations = pathlib.Path(config.coco_dir, "annotations")
    if captions and captions[0].path.is_relative_to(config.coco_dir):
        path = annotations / f"instances_{captions[0].path.relative_to(config.coco_dir).parts[0]}.json"
        if path.exists():
            return path
    return annotations / f"instances_{config.coco_split}.json"


def boxes_by_position(groundings):
    """dict of (image id, caption) to dict of a word's position in the caption to the boxes of what it names."""
    boxes = {}
    for grounding in groundings:
        for position in grounding.positions:
            boxes.setdefault((grounding.image_id, grounding.caption), {})[position] = grounding.boxes
    return boxes


_IRREGULAR_PLURALS = {
    "child": "children",
    "knife": "knives",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "woman": "women",
}
_SYNONYMS = {  # of COCO's categories
    "person": "man woman boy girl child kid baby lady guy player skier snowboarder surfer skateboarder".split(),
    "bicycle": ["bike"],
    "motorcycle": ["motorbike"],
    "airplane": ["plane", "aeroplane"],
    "car": ["taxi"],
    "fire hydrant": ["hydrant"],
    "traffic light": ["stoplight"],
    "dog": ["puppy"],
    "cat": ["kitten"],
    "suitcase": ["luggage"],
    "sports ball": ["ball"],
    "tennis racket": ["racket", "racquet", "tennis racquet"],
    "hot dog": ["hotdog"],
    "donut": ["doughnut"],
    "couch": ["sofa"],
    "potted plant": ["plant"],
    "dining table": ["table"],
    "tv": ["television", "television set"],
    "cell phone": ["phone", "cellphone", "mobile phone", "smartphone"],
    "refrigerator": ["fridge"],
    "hair drier": ["hairdryer", "hair dryer"],
}


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared as one value
class Grounding:
    """Where the model looked for a word that names an object, and where such objects are.

    Attributes:
      attention_weights: (P,).
      size: (width, height) of the image in pixels.
      boxes: list of [x, y, w, h] in pixels from the upper left corner, as in COCO.
      image_id: int or str
      positions: range, the positions in the caption of the word, or words, that name the object.
      evidence: (P,), or None where it is not known, see captioning/attention/evidence.py.
      feature_norms: (P,), norm of the feature at each location, or None where it is not known.
      caption: str, of which the word is.
    """

    attention_weights: np.ndarray
    size: tuple[int, int]
    boxes: list[list[float]]
    image_id: int | str | None = None
    positions: range = range(0)
    evidence: np.ndarray | None = None
    feature_norms: np.ndarray | None = None
    caption: str = ""


def _make_grounding(generated, positions, size, boxes):
    """The Grounding of the words of a GeneratedCaption at `positions`. Maps of several words are averaged."""
    words = slice(positions.start, positions.stop)
    evidence = None if generated.evidence is None else np.mean(generated.evidence[words], axis=0)  # (P,)
    weights = np.mean(generated.attention_weights[words], axis=0)  # (P,)
    about = generated.image_id, positions, evidence, generated.feature_norms, generated.caption
    return Grounding(weights, size, boxes, *about)


# --- Demo ---------------------------------------------------------------------------------------------------------


def _demo_groundings(predictions, scenes):
    """The nouns in captions of demo images, where they are matched to objects of the scene.

    list of GeneratedCaptions, dict of image id to Scene -> list of Groundings. UserError where an image has no scene.
    """
    groundings = []
    for generated in predictions:
        scene = scenes.get(generated.image_id)
        if scene is None:
            raise UserError(
                f"no scene is known for image {generated.image_id}: run python data_utils.py --dataset demo again"
            )
        size = scene.width, scene.height
        for position, box in locate_nouns(generated.caption, scene):
            groundings.append(_make_grounding(generated, range(position, position + 1), size, [box]))
    return groundings


# --- MS-COCO ------------------------------------------------------------------------------------------------------


def _coco_groundings(predictions, instances_path):
    """The words in captions of COCO images that name a category, with all boxes of that category in the image.

    A category may be named by several words, as in "teddy bear". Records of the file that cannot be used are left out.
    One line for each kind of record left out is printed.

    Args:
      predictions: list of GeneratedCaptions with image ids.
      instances_path: path of COCO's instances_*.json for the captioned images.

    Returns:
      (list of Groundings; int, how many more words name a category that has no box in the image)

    Raises:
      UserError: the file is missing, is not JSON or not in COCO's layout, or lists none of the captioned images.
    """
    names, sizes, boxes = read_instances(instances_path, {generated.image_id for generated in predictions})
    phrases = _name_phrases(names)
    groundings, num_absent = [], 0
    for generated in predictions:
        for start, end, name in _find_mentions(generated.words, phrases):
            found = boxes.get((generated.image_id, name))
            if found:
                groundings.append(_make_grounding(generated, range(start, end), sizes[generated.image_id], found))
            else:
                num_absent += 1
    return groundings, num_absent


def _name_phrases(names):
    """All that names a category: dict of tuple of words, in the singular or the plural, to one of the `names`."""
    meanings = {phrase: name for name in names for phrase in _SYNONYMS.get(name, ())} | {name: name for name in names}
    plurals = {tuple(_plural(phrase).split()): name for phrase, name in meanings.items()}
    return plurals | {tuple(phrase.split()): name for phrase, name in meanings.items()}


def _plural(phrase):
    """The plural of an English noun, or of a phrase that ends in one."""
    before, blank, noun = phrase.rpartition(" ")
    if noun in _IRREGULAR_PLURALS:
        return before + blank + _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return phrase + "es"
    if noun.endswith("y") and not noun.endswith(("ay", "ey", "oy", "uy")):
        return phrase[:-1] + "ies"
    return phrase + "s"


def _find_mentions(words, phrases):
    """Where a caption names categories: list of (start, end, name), `words[start:end]` being the phrase.

    Of several phrases that begin at one word, the longest counts. phrases: as `_name_phrases` returns them.
    """
    longest = max(map(len, phrases), default=0)
    mentions, position = [], 0
    while position < len(words):
        ends = range(min(position + longest, len(words)), position, -1)
        end = next((end for end in ends if tuple(words[position:end]) in phrases), None)
        if end:
            mentions.append((position, end, phrases[tuple(words[position:end])]))
        position = end or position + 1
    return mentions
