"""Does the model look at what it names? Peaks of attention maps against the boxes of demo scenes and of MS-COCO."""

import collections

from command_line import UserError
from demo_scenes import locate_nouns
from files import read_json

import numpy as np

LARGEST_SIDE = 10_000  # pixels: no data set has larger images, and a mask of one must fit in memory

IRREGULAR_PLURALS = {
    "child": "children",
    "knife": "knives",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "woman": "women",
}
SYNONYMS = {  # and the COCO category meant
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


# --- Accuracy -----------------------------------------------------------------------------------------------------


def attention_accuracy(looks, upsample):
    """How often a map's peak lies in a box of what its word names.

    A pixel belongs to a box if its middle is inside. Where several pixels share the peak, as in a level map, the share
    of them that lies inside counts.

    Args:
      looks: list of (attention weights (P,), (width, height) of the image in pixels, list of boxes [x, y, w, h] in
        pixels from the upper left corner as in COCO), one per word that names an object.
      upsample: inference_image_caption.upsample, which imports this module: (P,), (width, height) -> (height, width).

    Returns:
      dict of "words", the number of looks; "inside", the share of words whose peak is in one of the boxes; "chance",
      the mean share of the image's pixels in them, which a peak anywhere would reach. Shares are in 0..1, and None
      without words.
    """
    inside, chance = [], []
    for weights, size, boxes in looks:
        light, covered = upsample(weights, size), cover(size, boxes)  # (height, width)
        inside.append(covered[light == light.max()].mean())
        chance.append(covered.mean())
    return {
        "words": len(inside),
        "inside": float(np.mean(inside)) if inside else None,
        "chance": float(np.mean(chance)) if chance else None,
    }


def cover(size, boxes):
    """Which pixels lie in at least one of the boxes. (width, height), list of [x, y, w, h] -> bool (height, width)."""
    width, height = size
    down, across = np.ogrid[0.5:height, 0.5:width]  # the pixels' middles
    covered = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        covered |= (x <= across) & (across < x + w) & (y <= down) & (down < y + h)
    return covered


# --- Demo ---------------------------------------------------------------------------------------------------------


def demo_looks(captions, scenes):
    """The looks of captions of demo images, one per noun that is matched to an object of the scene.

    Args:
      captions: list of dicts with "image_id", "caption", "words" and "attention_weights" (words, P).
      scenes: dict of image id to scene, as demo_scenes.read_scenes returns.

    Returns:
      list of looks, see `attention_accuracy`.

    Raises:
      UserError: a captioned image is none of the scenes.
    """
    looks = []
    for caption in captions:
        if caption["image_id"] not in scenes:
            raise UserError(
                f"no scene is known for image {caption['image_id']}: run python data_utils.py --dataset demo again"
            )
        scene = scenes[caption["image_id"]]
        for position, box in locate_nouns(caption["caption"], scene):
            looks.append((caption["attention_weights"][position], (scene["width"], scene["height"]), [box]))
    return looks


# --- MS-COCO ------------------------------------------------------------------------------------------------------


def coco_looks(captions, instances_path):
    """The looks of captions of COCO images, one per word, or two as in "teddy bear", that names a category.

    The boxes are all those of the category in the image, and two words' map is the mean of both. Records that cannot be
    used are counted, and an example of each kind is printed.

    Args:
      captions: list of dicts with "image_id", "words" and "attention_weights" (words, P).
      instances_path: path of COCO's instances_*.json for the captioned images.

    Returns:
      (list of looks, see `attention_accuracy`; int, "absent": words that name a category without a box in the image)

    Raises:
      UserError: the file is missing, is not JSON, has not COCO's keys, or lists none of the captioned images.
    """
    wanted = {caption["image_id"] for caption in captions}
    names, sizes, boxes = read_instances(instances_path, wanted)
    phrases = name_phrases(names)
    looks, absent = [], 0
    for caption in captions:
        for start, end, name in find_mentions(caption["words"], phrases):
            found = boxes.get((caption["image_id"], name))
            if found:
                weights = np.mean(caption["attention_weights"][start:end], axis=0)  # (P,)
                looks.append((weights, sizes[caption["image_id"]], found))
            else:
                absent += 1
    return looks, absent


def read_instances(path, wanted):
    """Read COCO's instances for the image ids in `wanted`.

    Returns:
      (set of category names; dict of image id to (width, height) in pixels; dict of (image id, category name) to list
      of boxes [x, y, w, h] in pixels)

    Raises:
      UserError: as for `coco_looks`.
    """
    mend = "put COCO's own file there, or delete it to evaluate without attention accuracy"
    data = read_json(path, mend)
    keys = ("categories", "images", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise UserError(f'{path} has not the lists "categories", "images" and "annotations" of COCO instances: {mend}')

    bad = collections.defaultdict(list)
    names, sizes, boxes = {}, {}, collections.defaultdict(list)
    for record in data["categories"]:
        if has_types(record, id=int, name=str) and record["name"].split():
            names[record["id"]] = " ".join(record["name"].lower().split())
        else:
            bad["a category without id or name"].append(record)
    for record in data["images"]:
        if not has_types(record, id=int, width=int, height=int):
            bad["an image without id, width or height"].append(record)
        elif not 1 <= min(record["width"], record["height"]) <= max(record["width"], record["height"]) <= LARGEST_SIDE:
            bad["an image of an impossible size"].append(record)
        elif record["id"] in wanted:
            sizes[record["id"]] = (record["width"], record["height"])
    for record in data["annotations"]:
        if not has_types(record, image_id=int, category_id=int) or not is_box(record.get("bbox")):
            bad["an annotation without image_id, category_id or a box"].append(record)
        elif record["category_id"] not in names:
            bad["an annotation of a category that is not listed"].append(record)
        elif record["image_id"] in sizes:
            boxes[record["image_id"], names[record["category_id"]]].append(record["bbox"])

    for problem, examples in bad.items():
        print(f"{path}: {len(examples)} left out, {problem}, such as {repr(examples[0])[:160]}")
    if wanted and not sizes:
        raise UserError(f"{path} lists none of the captioned images: {mend}")
    return set(names.values()), sizes, dict(boxes)


def has_types(record, **types):
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in types.items())


def is_box(box):
    """Whether a value is [x, y, w, h] of finite numbers, with an area."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(number) in (int, float) and -1e6 < number < 1e6 for number in box)
        and min(box[2:]) > 0
    )


def name_phrases(names):
    """What stands for each category: a set of names -> dict of tuple of words, singular or plural, to name."""
    meanings = {phrase: name for phrase, name in SYNONYMS.items() if name in names} | {name: name for name in names}
    plurals = {tuple(plural(phrase).split()): name for phrase, name in meanings.items()}
    return plurals | {tuple(phrase.split()): name for phrase, name in meanings.items()}


def plural(phrase):
    before, blank, noun = phrase.rpartition(" ")
    if noun in IRREGULAR_PLURALS:
        return before + blank + IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return phrase + "es"
    if noun.endswith("y") and not noun.endswith(("ay", "ey", "oy", "uy")):
        return phrase[:-1] + "ies"
    return phrase + "s"


def find_mentions(words, phrases):
    """Where a caption names categories: list of (first word, behind the last word, name), the longest phrase first."""
    longest = max(map(len, phrases), default=0)
    mentions, position = [], 0
    while position < len(words):
        ends = range(min(position + longest, len(words)), position, -1)
        end = next((end for end in ends if tuple(words[position:end]) in phrases), None)
        if end:
            mentions.append((position, end, phrases[tuple(words[position:end])]))
        position = end or position + 1
    return mentions
