"""The demo data set: scenes that the project draws itself, in COCO 2014's layout, and the score of captions for them.

A scene is a textured ground with one or two objects; each has a noun, a colour, a pattern, a place and a box. The
captions name all but the box, so that a predicted caption can be checked word by word against the scene.

What tells one attribute from another is chosen for an InceptionV3 of random weights, through which colours and textures
come across and outlines hardly do: a box differs from a ball by what is between its stripes, too.
"""

import collections
import itertools
import pathlib
import re

import files
from command_line import UserError

import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 1  # of scenes, captions and drawing: what another version drew is drawn anew
SPLIT = "train2014"
SIZES = [(320, 240), (320, 256), (288, 288), (256, 320)]  # width, height in pixels
JPEG_QUALITY = 95

COLOURS = {"red": (216, 34, 32), "yellow": (252, 210, 8), "blue": (36, 84, 226), "purple": (164, 72, 208)}
GROUND_COLOURS = {  # the darkest and the lightest
    "grass": ((38, 88, 24), (128, 186, 66)),
    "sand": ((188, 150, 96), (244, 218, 168)),
    "water": ((20, 104, 150), (130, 206, 224)),
    "snow": ((196, 212, 234), (253, 253, 255)),
}
SECOND_COLOURS = {"ball": (246, 246, 240), "box": (30, 26, 24)}  # between the stripes, and a box's edge
PATTERN_PERIODS = {"plain": 25, "striped": 25, "dotted": 21, "checkered": 29}  # pixels
PATTERNS = {"plain": "plain", "striped": "stripes", "dotted": "dots", "checkered": "checks"}  # and its word in captions
# Where the room that an object leaves is split, across and down. Close to the edge: there one object is seen alone.
PLACES = {"left": (0.04, 0.5), "right": (0.96, 0.5), "top": (0.5, 0.04), "bottom": (0.5, 0.96), "middle": (0.5, 0.5)}
PAIRS = [("left", "right"), ("top", "bottom")]  # the first is named first, as one reads
PAIR_SHARE = 0.7  # of the scenes hold two objects

PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATIONS = {  # the places of what stands before and behind the words
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
CAPTIONS_OF_ONE = [
    "{a} lies on the {ground} {at_a}",
    "there is {a} {at_a} on the {ground}",
    "{at_a} of the {ground} is {a}",
    "{a} {at_a} of the {ground}",
    "{at_a} there is {a} on the {ground}",
]
CAPTIONS_OF_TWO = [
    "{a} lies on the {ground} {a_to_b} {b}",
    "on the {ground} {a} is {a_to_b} {b}",
    "{b_to_a} {a} there is {b} on the {ground}",
    "on the {ground} there are {a} {at_a} and {b} {at_b}",
    "{at_a} of the {ground} is {a} and {at_b} is {b}",
]


# --- The data set on disk -----------------------------------------------------------------------------------------


def draw_demo(folder, count, seed, replace=True):
    """Draw `count` scenes below `folder` in COCO 2014's layout; what is there already is not drawn again.

    Writes annotations/captions_train2014.json (COCO's keys), annotations/scenes_train2014.json (see `read_scenes`) and
    train2014/COCO_train2014_<image id>.jpg. Several hosts may draw into one folder.

    Args:
      replace: bool, whether scenes of another count or seed make way.

    Raises:
      UserError: the folder holds something else, or cannot be written.
    """
    images = pathlib.Path(folder, SPLIT)
    captions_path, scenes_path = annotation_path(folder, "captions"), annotation_path(folder, "scenes")
    scenes = [compose_scene(image_id, seed) for image_id in range(1, count + 1)]
    info = {"description": "scenes drawn by demo_scenes.py", "version": VERSION, "seed": seed}

    # Looked for before the scenes: another host that draws here at this moment writes those first.
    others = captions_path.exists() or (images.is_dir() and any(images.iterdir()))
    if scenes_path.exists():
        clear_other_demo(folder, {"info": info, "scenes": scenes}, replace)
    elif others:
        raise UserError(f"{folder} holds another data set: name another folder for the demo with --coco_dir")
    # The scenes come first and the captions last: a folder with scenes is the demo's, one with captions is whole.
    if not scenes_path.exists():
        files.write_json(scenes_path, {"info": info, "scenes": scenes})
    files.remove_leftovers(images, 0 if replace else files.STALE)
    missing = [scene for scene in scenes if not (images / scene["file_name"]).exists()]
    for scene in tqdm(missing, desc="drawing scenes", unit=" images", disable=not missing):
        with files.replacing(images / scene["file_name"]) as temporary:
            Image.fromarray(draw_scene(scene, seed)).save(temporary, quality=JPEG_QUALITY, subsampling=0)
    if not captions_path.exists():
        files.write_json(captions_path, coco_captions(info, scenes))


def annotation_path(folder, kind):
    return pathlib.Path(folder, "annotations", f"{kind}_{SPLIT}.json")


def clear_other_demo(folder, wanted, replace):
    """Delete the demo in `folder` if its scenes are not those of `wanted`; its own files and no others."""
    scenes_path = annotation_path(folder, "scenes")
    found = files.read_json(scenes_path, "delete that file and the folder with the demo's images")
    if found == wanted:
        return
    if not replace:
        raise UserError(f"{folder} holds scenes of other settings: delete it or name another folder with --coco_dir")
    annotation_path(folder, "captions").unlink(missing_ok=True)
    for scene in found["scenes"]:
        pathlib.Path(folder, SPLIT, scene["file_name"]).unlink(missing_ok=True)
    scenes_path.unlink()


def coco_captions(info, scenes):
    """The scenes' captions as in COCO's captions_train2014.json."""
    images = [
        {"id": scene["image_id"]} | {key: scene[key] for key in ("file_name", "width", "height")} for scene in scenes
    ]
    captions = [(scene["image_id"], caption) for scene in scenes for caption in write_captions(scene)]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions, start=1)]
    return {"info": info, "licenses": [], "images": images, "annotations": annotations}


def read_scenes(folder):
    """What each drawn image shows.

    Returns:
      dict of image id to scene: image_id, file_name, width, height (pixels), ground, and objects, a list of one or two
      dicts of noun, colour, pattern, place and box, [x, y, w, h] in pixels from the upper left corner as in COCO.

    Raises:
      UserError: the file is missing or damaged.
    """
    found = files.read_json(annotation_path(folder, "scenes"), "run python data_utils.py --dataset demo")
    return {scene["image_id"]: scene for scene in found["scenes"]}


# --- A scene and its captions -------------------------------------------------------------------------------------


def compose_scene(image_id, seed):
    """The scene of an image, drawn from (seed, image_id); see `read_scenes`. No two objects are of one colour."""
    rng = np.random.default_rng((seed, image_id, 0))
    width, height = SIZES[rng.integers(len(SIZES))]
    ground = pick(rng, GROUND_COLOURS)
    places = PAIRS[rng.integers(len(PAIRS))] if rng.random() < PAIR_SHARE else [pick(rng, PLACES)]
    colours = rng.permutation(list(COLOURS)).tolist()
    objects = []
    for place, colour in zip(places, colours, strict=False):
        noun, pattern = pick(rng, SECOND_COLOURS), pick(rng, PATTERNS)
        box = place_box(rng, place, width, height)
        objects.append({"noun": noun, "colour": colour, "pattern": pattern, "place": place, "box": box})
    name = f"COCO_{SPLIT}_{image_id:012d}.jpg"
    scene = {"image_id": image_id, "file_name": name, "width": width, "height": height}
    return scene | {"ground": ground, "objects": objects}


def pick(rng, choices):
    return list(choices)[rng.integers(len(choices))]


def place_box(rng, place, width, height):
    """[x, y, w, h] in pixels of an object at `place`; less than half the image, so that two never touch."""
    size = round(rng.uniform(0.42, 0.46) * min(width, height))
    across, down = PLACES[place] + rng.uniform(-0.04, 0.04, 2)
    return [round(across * (width - size)), round(down * (height - size)), size, size]


def write_captions(scene):
    """Five captions of a scene, each of which names every object with all its attributes, and the ground.

    The object on the left or at the top always comes first: which of two a caption begins with could not be foreseen.
    The noun comes before colour and pattern: it is then what the captioner has to look for first.
    """
    first, last = scene["objects"][0], scene["objects"][-1]
    words = {"ground": scene["ground"], "a": name_object(first), "at_a": PLACE_PHRASES[first["place"]]}
    if first is last:
        templates = CAPTIONS_OF_ONE
    else:
        phrases = {places: phrase for phrase, places in RELATIONS.items()}
        words |= {"b": name_object(last), "at_b": PLACE_PHRASES[last["place"]]}
        words["a_to_b"] = phrases[first["place"], last["place"]]
        words["b_to_a"] = phrases[last["place"], first["place"]]
        templates = CAPTIONS_OF_TWO
    return [template.format(**words).capitalize() + "." for template in templates]


def name_object(thing):
    colour, pattern = thing["colour"], PATTERNS[thing["pattern"]]
    return f"a {thing['noun']} " + (f"in plain {colour}" if pattern == "plain" else f"with {colour} {pattern}")


# --- Drawing ------------------------------------------------------------------------------------------------------


def draw_scene(scene, seed):
    """The picture of a scene, the same for the same seed: uint8 (height, width, 3)."""
    rng = np.random.default_rng((seed, scene["image_id"], 1))
    picture = draw_ground(rng, scene["ground"], scene["width"], scene["height"])
    for thing in scene["objects"]:
        draw_object(rng, thing, picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_ground(rng, ground, width, height):
    """float32 (height, width, 3) in about 0..255."""
    rows = np.arange(height, dtype=np.float32)[:, None]
    slow = draw_noise(rng, width, height, 50, 40)
    if ground == "grass":
        shade = 0.65 * draw_noise(rng, width, height, 2, 9) + 0.35 * slow
    elif ground == "sand":
        shade = 0.3 + 0.16 * np.sin((rows + 26 * slow) / 2.6) + 0.5 * draw_noise(rng, width, height, 1, 1)
    elif ground == "water":
        waves = np.sin((rows + 40 * draw_noise(rng, width, height, 48, 24)) / 2.2)
        shade = 0.15 + 0.25 * waves + 0.5 * draw_noise(rng, width, height, 14, 3)
    else:
        shade = 0.75 * slow + 0.35 * draw_noise(rng, width, height, 2, 2)
    dark, light = np.float32(GROUND_COLOURS[ground])
    return dark + (light - dark) * shade[:, :, None]


def draw_noise(rng, width, height, cell_width, cell_height):
    """Random values in 0..1 that change smoothly over cells of the given size in pixels: float32 (height, width)."""
    coarse = rng.random((height // cell_height + 2, width // cell_width + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def draw_object(rng, thing, picture):
    """Draw an object and its shadow into `picture`, float32 (height, width, 3)."""
    x, y, size, _ = thing["box"]
    left, top = max(x - 4, 0), max(y - 4, 0)  # 4 and 12 pixels around the box for the shadow
    patch = picture[top : y + size + 12, left : x + size + 12]
    # Pixels from the object's middle.
    down, across = np.ogrid[: patch.shape[0], : patch.shape[1]]
    down, across = (np.float32(down + top - y - (size - 1) / 2), np.float32(across + left - x - (size - 1) / 2))

    other = np.float32(SECOND_COLOURS[thing["noun"]])
    share = share_of_colour(rng, thing["pattern"], across, down)
    if thing["noun"] == "box":
        share = share * coverage("box", across, down, 0.78 * size)
        light = 1.1 - 0.2 * (down + 0.5 * across) / size
    else:
        light = 1.12 - 1.1 * ((across / size + 0.18) ** 2 + (down / size + 0.2) ** 2)
    paint = other + (COLOURS[thing["colour"]] - other) * share[:, :, None]
    patch *= 1 - 0.45 * coverage(thing["noun"], across - 4, down - 5, size, edge=8)[:, :, None]
    patch += (paint * light[:, :, None] - patch) * coverage(thing["noun"], across, down, size)[:, :, None]


def coverage(noun, across, down, size, edge=1):
    """1 inside an outline around the middle, 0 outside, with an edge that is `edge` pixels wide: (rows, columns)."""
    if noun == "ball":
        distance = np.hypot(across, down)
    else:
        distance = np.maximum(np.abs(across), np.abs(down))
    return np.clip((size / 2 - distance) / edge + 0.5, 0, 1)


def share_of_colour(rng, pattern, across, down):
    """1 where an object has its colour, 0 where it has the second one: (rows, columns)."""
    period = PATTERN_PERIODS[pattern]
    shift_across, shift_down = rng.random(2, dtype=np.float32)
    across, down = across / period + shift_across, down / period + shift_down
    if pattern == "plain":
        depth = np.ones(np.broadcast_shapes(across.shape, down.shape), np.float32)
    elif pattern == "striped":
        depth = np.abs(0.8 * (across + down) % 1 - 0.5) - 0.25
    elif pattern == "dotted":
        depth = 0.36 - np.hypot(across % 1 - 0.5, down % 1 - 0.5)
    else:
        depth = np.sin(np.pi * across) * np.sin(np.pi * down) / np.pi
    return np.clip(depth * period + 0.5, 0, 1)


# --- Scoring ------------------------------------------------------------------------------------------------------


WORDS = {
    "relation": RELATIONS,
    "place": {phrase: place for place, phrase in PLACE_PHRASES.items()},
    "ground": {ground: ground for ground in GROUND_COLOURS},
    "noun": {noun: noun for noun in SECOND_COLOURS},
    "colour": {colour: colour for colour in COLOURS},
    "pattern": {word: pattern for pattern, word in PATTERNS.items()},
}
ANY_WORD = re.compile("|".join(rf"(?P<{kind}>\b(?:{'|'.join(words)})\b)" for kind, words in WORDS.items()))


def score_captions(captions, scenes):
    """How far predicted captions are true.

    A described object is matched to the true one that it fits best, each true one to one described. It is right if all
    that the caption says of it (noun, colour, pattern, place, or place through a relation) is true. One that is matched
    to none is wrong in everything, as are words that belong to no noun; a caption without objects counts as one wrong.

    Args:
      captions: list of str, predicted.
      scenes: list of dicts, each caption's scene, see `read_scenes`.

    Returns:
      dict of shares in 0..1: objects (described ones that are right in everything said of them), noun, colour, pattern,
      place, relation, ground (of those named, the right ones), mentioned (true objects that a description is matched
      to). What no caption names is left out.
    """
    right, named = collections.Counter(), collections.Counter()
    for caption, scene in zip(captions, scenes, strict=True):
        description = describe(caption)
        matches = match_objects(description["objects"], scene["objects"])
        named["objects"] += max(1, len(matches))
        named["mentioned"] += len(scene["objects"])
        right["mentioned"] += sum(true is not None for true in matches)
        for said, true in zip(description["objects"], matches, strict=True):
            right["objects"] += is_right(said, true)
            for kind, value in said:
                named[kind] += 1
                right[kind] += is_true(kind, value, true)
        for ground in description["grounds"]:
            named["ground"] += 1
            right["ground"] += ground == scene["ground"]
        for places, indices in description["relations"]:
            named["relation"] += 1
            right["relation"] += all(
                is_true("place", place, matches[index]) for place, index in zip(places, indices, strict=True)
            )
    return {kind: right[kind] / total for kind, total in named.items()}


def locate_nouns(caption, scene):
    """Where the nouns of a caption are to be seen: list of (position among the caption's words, box) of the objects
    that are matched to a true one; see `score_captions`."""
    description = describe(caption)
    matches = match_objects(description["objects"], scene["objects"])
    pairs = zip(description["noun_positions"], matches, strict=True)
    return [(position, true["box"]) for position, true in pairs if true is not None]


def describe(caption):
    """What a caption says.

    Returns:
      dict of
        objects: list of lists of (kind, value), kinds noun, colour, pattern and place; one without a noun, of words
          that belong to no noun, is there too
        noun_positions: list of int, each object's noun among the caption's words, or None
        relations: list of ((place, place), (index, index)), what a relation says of two of the objects
        grounds: list of str
    """
    text = caption.lower()
    found = [(match.lastgroup, WORDS[match.lastgroup][match[0]], match.start()) for match in ANY_WORD.finditer(text)]
    kinds = [kind for kind, _, _ in found]
    # "On the left is a ball" against "a ball on the left": as the first place does, so do the others.
    places_first = "place" in kinds and "noun" not in kinds[: kinds.index("place")]
    objects, positions, relations, grounds = collections.defaultdict(list), {}, [], []
    last = -1
    for kind, value, start in found:
        if kind == "noun":
            last += 1
            positions[last] = len(text[:start].split())
        if kind == "ground":
            grounds.append(value)
        elif kind == "relation":
            # "A is above B", or "above A is B" where none stands before it.
            indices = (last, last + 1) if last >= 0 else (1, 0)
            relations.append((value, indices))
            for place, index in zip(value, indices, strict=True):
                objects[index].append(("place", place))
        else:
            objects[last + 1 if kind == "place" and places_first else last].append((kind, value))
    order = {index: n for n, index in enumerate(objects)}
    return {
        "objects": list(objects.values()),
        "noun_positions": [positions.get(index) for index in objects],
        "relations": [(places, tuple(order[index] for index in indices)) for places, indices in relations],
        "grounds": grounds,
    }


def match_objects(described, true):
    """For each described object the true one it is matched to, or None: so that most are right, then most of their
    attributes. One without a noun is matched to none."""

    def fit(matches):
        pairs = list(zip(described, matches, strict=True))
        right = sum(is_right(said, match) for said, match in pairs)
        attributes = sum(is_true(kind, value, match) for said, match in pairs for kind, value in said)
        return right, attributes, sum(match is not None for match in matches)

    candidates = []
    # Each true object takes a place among the described ones; places behind the last stand for "not described".
    for places in itertools.permutations(range(max(len(described), len(true))), len(true)):
        matches = dict(zip(places, true, strict=True))
        candidates.append(
            [matches.get(place) if "noun" in dict(said) else None for place, said in enumerate(described)]
        )
    return max(candidates, key=fit)


def is_right(said, true):
    return true is not None and all(is_true(kind, value, true) for kind, value in said)


def is_true(kind, value, true):
    return true is not None and true[kind] == value
