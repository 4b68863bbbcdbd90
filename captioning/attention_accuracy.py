"""Does the model look at what it names? Attention peaks, compared with the boxes of demo scenes and of MS-COCO."""

import collections
import dataclasses

import numpy as np
from PIL import Image

from captioning.attention_maps import upsample
from captioning.data.captioned_images import RejectedRecords, clean_id
from captioning.demo_scores import locate_nouns
from captioning.words import split_words
from support.errors import UserError
from support.files import read_json

LARGEST_SIDE = 10_000  # pixels; no data set has larger images, and a map of this size still fits in memory
INSTANCES_REMEDY = "put COCO's own file there, or delete it to evaluate without attention accuracy"

IRREGULAR_PLURALS = {
    "child": "children",
    "knife": "knives",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "woman": "women",
}
SYNONYMS = {  # words and phrases that mean one of COCO's categories
    **dict.fromkeys(("man", "woman", "boy", "girl", "child", "kid", "baby", "lady", "guy"), "person"),
    **dict.fromkeys(("player", "skier", "snowboarder", "surfer", "skateboarder"), "person"),
    "bike": "bicycle",
    "motorbike": "motorcycle",
    **dict.fromkeys(("plane", "aeroplane"), "airplane"),
    "taxi": "car",
    "hydrant": "fire hydrant",
    "stoplight": "traffic light",
    "puppy": "dog",
    "kitten": "cat",
    "luggage": "suitcase",
    "ball": "sports ball",
    **dict.fromkeys(("racket", "racquet", "tennis racquet"), "tennis racket"),
    "hotdog": "hot dog",
    "doughnut": "donut",
    "sofa": "couch",
    "plant": "potted plant",
    "table": "dining table",
    **dict.fromkeys(("television", "television set"), "tv"),
    **dict.fromkeys(("phone", "cellphone", "mobile phone", "smartphone"), "cell phone"),
    "fridge": "refrigerator",
    **dict.fromkeys(("hairdryer", "hair dryer"), "hair drier"),
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
      evidence: (P,), or None where it is not known, see captioning/evidence.py.
      feature_norms: (P,), length of the feature at each location, or None where it is not known.
    """

    attention_weights: np.ndarray
    size: tuple[int, int]
    boxes: list[list[float]]
    image_id: int | str | None = None
    positions: range = range(0)
    evidence: np.ndarray | None = None
    feature_norms: np.ndarray | None = None


# --- Accuracy -----------------------------------------------------------------------------------------------------


def attention_accuracy(groundings):
    """Measure whether maps point at what the words name, beside the guesses that a reader must know.

    Maps: the evidence; the attention weights; the weights for a word of another picture; the length of the feature at
    each location, whatever the word; the middle of the picture; a level map, which is chance. Things "off the middle"
    are those of which no box covers the picture's middle.

    Args:
      groundings: list of Grounding, one for each word that names an object.

    Returns:
      dict of "words" and "words_off_middle", how many there are, and of "maps": for each map a dict of shares in 0..1,
      or None where there are no words. "inside": the map's peak is in one of the boxes; "mass_inside": the mean share
      of the map's sum in them (attention correctness, Liu et al., 2017, arXiv 1605.09553); and both again with
      "_off_middle".
    """
    scores = {}
    off_middle = [not covers_middle(grounding) for grounding in groundings]
    covered = [cover(grounding.size, grounding.boxes) for grounding in groundings]
    for name, maps in maps_to_compare(groundings).items():
        rows = np.array([score_map(*pair) for pair in zip(maps, covered, strict=True)]).reshape(-1, 2)  # (words, 2)
        scores[name] = named_means(rows, "") | named_means(rows[off_middle], "_off_middle")
    return {"words": len(groundings), "words_off_middle": sum(off_middle), "maps": scores}


def named_means(rows, ending):
    """The means of (words, 2) shares as a dict, None where there are no words."""
    means = rows.mean(axis=0).tolist() if len(rows) else (None, None)
    return {f"inside{ending}": means[0], f"mass_inside{ending}": means[1]}


def covers_middle(grounding):
    """Whether the pixel in the picture's middle lies in one of the boxes."""
    width, height = grounding.size
    return bool(cover(grounding.size, grounding.boxes)[height // 2, width // 2])


def maps_to_compare(groundings):
    """The maps that are measured: dict of name to list of (P,) arrays, one for each grounding.

    Evidence and feature lengths are left out where they are not known.
    """
    level = [
        np.full_like(grounding.attention_weights, 1 / len(grounding.attention_weights)) for grounding in groundings
    ]
    maps = {"evidence": [grounding.evidence for grounding in groundings]}
    maps["attention weights"] = [grounding.attention_weights for grounding in groundings]
    maps["weights of another picture"] = [other.attention_weights for other in others(groundings)]
    maps["feature length"] = [grounding.feature_norms for grounding in groundings]
    maps["middle"] = [middle_map(len(weights)) for weights in level]
    maps["level (chance)"] = level
    return {name: values for name, values in maps.items() if not any(value is None for value in values)}


def others(groundings):
    """For each grounding one of another picture: the next in the list, from halfway round it."""
    count = len(groundings)
    found = []
    for number, grounding in enumerate(groundings):
        candidates = (groundings[(number + count // 2 + step) % count] for step in range(count))
        found.append(next((other for other in candidates if other.image_id != grounding.image_id), grounding))
    return found


def middle_map(locations):
    """A map of the four locations around the middle of the grid."""
    side = round(locations**0.5)
    grid = np.zeros((side, side), np.float32)
    grid[(side - 1) // 2 : side // 2 + 1, (side - 1) // 2 : side // 2 + 1] = 1
    return grid.ravel() / grid.sum()


def score_map(weights, covered):
    """Measure one map.

    Args:
      weights: (P,)
      covered: bool (height, width), the pixels in the boxes. A pixel belongs to a box if its middle is inside.

    Returns:
      (share of the map's peak that lies inside: 0 or 1, or between where several pixels share the peak; share of the
      map's sum that lies inside)
    """
    height, width = covered.shape
    side = round(len(weights) ** 0.5)
    cells = Image.fromarray(covered.astype(np.float32)).resize((side, side), Image.Resampling.BOX)  # share of each cell
    mass = float(np.asarray(cells).ravel() @ weights / max(np.sum(weights), 1e-12))
    return float(covered[find_peak(weights, (width, height))].mean()), mass


def find_peak(weights, size):
    """Mark the pixels at which attention weights, as a map over the image, are highest.

    Args:
      weights: (P,).
      size: (width, height) of the image in pixels.

    Returns:
      bool (height, width). All pixels are marked if all weights are equal.
    """
    if np.ptp(weights) == 0:
        return np.ones(size[::-1], bool)  # (height, width)
    # Zeros around the grid keep the peak of an outermost location in its middle.
    light = upsample(weights, size, border="constant")  # (height, width)
    return light == light.max()


def cover(size, boxes):
    """Mark the pixels that lie in at least one box.

    Args:
      size: (width, height) in pixels.
      boxes: list of [x, y, w, h] in pixels.

    Returns:
      bool (height, width).
    """
    width, height = size
    down, across = np.ogrid[0.5:height, 0.5:width]  # (height, 1), (1, width): the pixels' middles
    covered = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        covered |= (x <= across) & (across < x + w) & (y <= down) & (down < y + h)  # (height, width)
    return covered


def make_grounding(predicted, positions, size, boxes):
    """The Grounding of the words of a PredictedCaption at `positions`. Maps of several words are averaged."""
    words = slice(positions.start, positions.stop)
    evidence = None if predicted.evidence is None else np.mean(predicted.evidence[words], axis=0)  # (P,)
    weights = np.mean(predicted.attention_weights[words], axis=0)  # (P,)
    return Grounding(weights, size, boxes, predicted.image_id, positions, evidence, predicted.feature_norms)


# --- Demo ---------------------------------------------------------------------------------------------------------


def demo_groundings(predictions, scenes):
    """Find the nouns in captions of demo images, and the boxes of the objects that they mean.

    Args:
      predictions: list of PredictedCaption with image ids.
      scenes: dict of image id to Scene, as `demo_scenes.read_scenes` returns it.

    Returns:
      list of Grounding, one for each noun that is matched to an object of the scene.

    Raises:
      UserError: a captioned image has no scene.
    """
    groundings = []
    for predicted in predictions:
        scene = scenes.get(predicted.image_id)
        if scene is None:
            raise UserError(
                f"no scene is known for image {predicted.image_id}: run python data_utils.py --dataset demo again"
            )
        for position, box in locate_nouns(predicted.caption, scene):
            size, positions = (scene.width, scene.height), range(position, position + 1)
            groundings.append(make_grounding(predicted, positions, size, [box]))
    return groundings


# --- MS-COCO ------------------------------------------------------------------------------------------------------


def coco_groundings(predictions, instances_path):
    """Find the words in captions of COCO images that name a category, and all boxes of that category in the image.

    A category may be named by several words, as in "teddy bear". Their attention weights are then averaged. Records of
    the file that cannot be used are left out. One line for each kind of record left out is printed.

    Args:
      predictions: list of PredictedCaption with image ids.
      instances_path: path of COCO's instances_*.json for the captioned images.

    Returns:
      (list of Grounding, one for each name of a category; int, how many more names there are whose category has no box
      in the image).

    Raises:
      UserError: the file is missing, is not JSON or not in COCO's layout, or lists none of the captioned images.
    """
    names, sizes, boxes = read_instances(instances_path, {predicted.image_id for predicted in predictions})
    phrases = name_phrases(names)
    groundings, num_absent = [], 0
    for predicted in predictions:
        for start, end, name in find_mentions(predicted.words, phrases):
            found = boxes.get((predicted.image_id, name))
            if found:
                groundings.append(make_grounding(predicted, range(start, end), sizes[predicted.image_id], found))
            else:
                num_absent += 1
    return groundings, num_absent


def read_instances(path, image_ids):
    """Read COCO's instances.

    Args:
      path: path of the JSON file.
      image_ids: set of the ids of the images to read.

    Returns:
      (set of category names; dict of image id to (width, height) in pixels; dict of (image id, category name) to list
      of boxes [x, y, w, h] in pixels).

    Raises:
      UserError: as in `coco_groundings`.
    """
    data = read_json(path, INSTANCES_REMEDY)
    keys = ("categories", "images", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise UserError(
            f'{path} does not have the lists "categories", "images" and "annotations" of COCO instances: '
            f"{INSTANCES_REMEDY}"
        )
    rejected = RejectedRecords(path)
    names = read_categories(data["categories"], rejected)
    known = {str(image_id): image_id for image_id in image_ids}
    sizes = read_sizes(data["images"], known, rejected)
    if image_ids and not sizes:
        raise UserError(f"{path} lists none of the captioned images{rejected.main_reason()}: {INSTANCES_REMEDY}")
    boxes = read_boxes(data["annotations"], names, known, sizes, rejected)
    rejected.report()
    return set(names.values()), sizes, boxes


def read_categories(records, rejected):
    """Read the list "categories": list of records, RejectedRecords -> dict of category id to name."""
    names = {}
    for record in records:
        if has_types(record, id=int, name=str) and split_words(record["name"]):
            names[record["id"]] = " ".join(split_words(record["name"]))
        else:
            rejected.add("a category without id or name", record)
    return names


def read_sizes(records, known, rejected):
    """Read the list "images".

    Args:
      records: list of records.
      known: dict of str of an id to the id, those of the images to read.
      rejected: RejectedRecords.

    Returns:
      dict of image id to (width, height) in pixels.
    """
    sizes = {}
    for record in records:
        if not has_types(record, width=int, height=int) or clean_id(record.get("id")) is None:
            rejected.add("an image without id, width or height", record)
        elif not all(1 <= record[side] <= LARGEST_SIDE for side in ("width", "height")):
            rejected.add("an image of an impossible size", record)
        elif (image_id := known.get(str(clean_id(record["id"])))) is not None:
            sizes[image_id] = (record["width"], record["height"])
    return sizes


def read_boxes(records, names, known, sizes, rejected):
    """Read the list "annotations". Crowds are left out: COCO's own evaluation ignores such regions.

    Args:
      records: list of records.
      names: dict of category id to name.
      known: as in `read_sizes`.
      sizes: dict of image id to size. Boxes of other images are left out.
      rejected: RejectedRecords.

    Returns:
      dict of (image id, category name) to list of boxes [x, y, w, h] in pixels.
    """
    boxes = collections.defaultdict(list)
    for record in records:
        image_id = clean_id(record.get("image_id")) if isinstance(record, dict) else None
        if image_id is None or not has_types(record, category_id=int) or not is_box(record.get("bbox")):
            rejected.add("an annotation without image_id, category_id or a box", record)
        elif record["category_id"] not in names:
            rejected.add("an annotation of a category that is not listed", record)
        elif (image_id := known.get(str(image_id))) in sizes and not record.get("iscrowd"):
            boxes[image_id, names[record["category_id"]]].append(record["bbox"])
    return dict(boxes)


def has_types(record, **types):
    """Whether a record is a dict with values of exactly these types under these names."""
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in types.items())


def is_box(box):
    """Whether a value is a list [x, y, w, h] of finite numbers, with an area above 0."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(number) in (int, float) and -1e6 < number < 1e6 for number in box)
        and min(box[2:]) > 0
    )


def name_phrases(names):
    """List everything that names a category.

    Args:
      names: set of the categories' names.

    Returns:
      dict of tuple of words, in the singular or the plural, to the category's name.
    """
    meanings = {phrase: name for phrase, name in SYNONYMS.items() if name in names} | {name: name for name in names}
    plurals = {tuple(plural(phrase).split()): name for phrase, name in meanings.items()}
    return plurals | {tuple(phrase.split()): name for phrase, name in meanings.items()}


def plural(phrase):
    """The plural of an English noun, or of a phrase that ends in one."""
    before, blank, noun = phrase.rpartition(" ")
    if noun in IRREGULAR_PLURALS:
        return before + blank + IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return phrase + "es"
    if noun.endswith("y") and not noun.endswith(("ay", "ey", "oy", "uy")):
        return phrase[:-1] + "ies"
    return phrase + "s"


def find_mentions(words, phrases):
    """Find where a caption names categories. Of several phrases that begin at one word, the longest counts.

    Args:
      words: list of str, the caption.
      phrases: dict of tuple of words to name.

    Returns:
      list of (start, end, name), `words[start:end]` being the phrase.
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
