"""The demo data set: scenes that the project draws itself, in COCO 2014's layout.

A scene is a textured ground with one or two objects. An object has a noun, a colour, a pattern, a place and a box. The
captions name all of these but the box, so that a generated caption can be checked word by word against its scene.

The attributes suit an InceptionV3 with random weights, which tells colours and textures apart but hardly outlines. A
box and a ball therefore also differ in the colour between their stripes.
"""

import dataclasses
import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.errors import FileError, UserError, mended_by
from support.files import STALE, read_json, remove_leftovers, replacing, write_json

_VERSION = 1  # raise it with every change to scenes, captions or drawing: older files are then drawn again
_SPLIT = "train2014"
_SIZES = [(320, 240), (320, 256), (288, 288), (256, 320)]  # width, height in pixels
_JPEG_QUALITY = 95

COLOURS = {"red": (216, 34, 32), "yellow": (252, 210, 8), "blue": (36, 84, 226), "purple": (164, 72, 208)}
GROUND_COLOURS = {  # the darkest and the lightest colour of each
    "grass": ((38, 88, 24), (128, 186, 66)),
    "sand": ((188, 150, 96), (244, 218, 168)),
    "water": ((20, 104, 150), (130, 206, 224)),
    "snow": ((196, 212, 234), (253, 253, 255)),
}
SECOND_COLOURS = {"ball": (246, 246, 240), "box": (30, 26, 24)}  # between the stripes, and at a box's edge
_PATTERN_PERIODS = {"plain": 25, "striped": 25, "dotted": 21, "checkered": 29}  # pixels
# Each pattern's word in captions.
PATTERNS = {"plain": "plain", "striped": "stripes", "dotted": "dots", "checkered": "checks"}
# How much of an image's free space lies left of an object, and how much above it. Two objects are close to opposite
# edges: InceptionV3 then sees each of them alone somewhere.
_PLACES = {"left": (0.04, 0.5), "right": (0.96, 0.5), "top": (0.5, 0.04), "bottom": (0.5, 0.96), "middle": (0.5, 0.5)}
_PAIRS = [("left", "right"), ("top", "bottom")]  # places of two objects; captions name the first one first
_PAIR_SHARE = 0.7  # share of the scenes that have two objects

PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATIONS = {  # the places of the objects named before and after these words
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
_CAPTIONS_OF_ONE = [
    "{a} lies on the {ground} {at_a}",
    "there is {a} {at_a} on the {ground}",
    "{at_a} of the {ground} is {a}",
    "{a} {at_a} of the {ground}",
    "{at_a} there is {a} on the {ground}",
]
_CAPTIONS_OF_TWO = [
    "{a} lies on the {ground} {a_to_b} {b}",
    "on the {ground} {a} is {a_to_b} {b}",
    "{b_to_a} {a} there is {b} on the {ground}",
    "on the {ground} there are {a} {at_a} and {b} {at_b}",
    "{at_a} of the {ground} is {a} and {at_b} is {b}",
]


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """An object of a scene. Its box is [x, y, w, h] in pixels from the upper left corner, as in COCO."""

    noun: str
    colour: str
    pattern: str
    place: str
    box: list[int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an image shows: a ground with one or two objects. Width and height are in pixels."""

    image_id: int
    file_name: str
    width: int
    height: int
    ground: str
    objects: list[SceneObject]


# --- The data set on disk -----------------------------------------------------------------------------------------


def draw_demo(folder, count, seed, replace=True):
    """Draw scenes in COCO 2014's layout. What is there already is not drawn again.

    Writes annotations/captions_train2014.json (COCO's keys), annotations/scenes_train2014.json (see `read_scenes`) and
    train2014/COCO_train2014_<image id>.jpg. Several hosts may draw into one folder at the same time.

    Args:
      count: int, the number of scenes.
      seed: int. The same seed draws the same scenes.
      replace: bool, whether scenes of another count or seed are deleted first.

    Raises:
      UserError: the folder holds something else, or scenes that must not be replaced, or it cannot be written.
    """
    images = pathlib.Path(folder, _SPLIT)
    captions_path, scenes_path = _annotation_path(folder, "captions"), _annotation_path(folder, "scenes")
    scenes = [_compose_scene(image_id, seed) for image_id in range(1, count + 1)]
    info = {"description": "scenes drawn by demo_scenes.py", "version": _VERSION, "seed": seed}
    wanted = {"info": info, "scenes": [dataclasses.asdict(scene) for scene in scenes]}

    # The scenes are written first and the captions last. A folder with scenes is therefore a demo's, and one with
    # captions is complete. Look for other files before looking for scenes: a host that starts to draw in between
    # cannot be mistaken for another data set.
    has_others = captions_path.exists() or (images.is_dir() and any(images.iterdir()))
    if scenes_path.exists():
        _clear_other_demo(folder, wanted, replace)
    elif has_others:
        raise UserError(f"{folder} holds another data set: name another folder for the demo with --coco_dir")
    if not scenes_path.exists():
        write_json(scenes_path, wanted)
    remove_leftovers(images, 0 if replace else STALE)
    missing = [scene for scene in scenes if not (images / scene.file_name).exists()]
    for scene in tqdm(missing, desc="drawing scenes", unit=" images", disable=not missing):
        with replacing(images / scene.file_name) as temporary:
            Image.fromarray(_draw_scene(scene, seed)).save(temporary, quality=_JPEG_QUALITY, subsampling=0)
    if not captions_path.exists():
        write_json(captions_path, _coco_captions(info, scenes))


def _annotation_path(folder, kind):
    return pathlib.Path(folder, "annotations", f"{kind}_{_SPLIT}.json")


@mended_by("delete that file and the folder with the demo's images")
def _clear_other_demo(folder, wanted, replace):
    """Delete the demo in `folder`, and no other files, if its scenes are not those of `wanted`."""
    scenes_path = _annotation_path(folder, "scenes")
    found = read_json(scenes_path, dict)
    if found == wanted:
        return
    if not replace:
        raise UserError(f"{folder} holds scenes of other settings: delete it or name another folder with --coco_dir")
    try:
        images = [pathlib.Path(folder, _SPLIT, pathlib.Path(scene["file_name"]).name) for scene in found["scenes"]]
    except (KeyError, TypeError):
        raise FileError(scenes_path, "is damaged (it does not list scenes)") from None
    _annotation_path(folder, "captions").unlink(missing_ok=True)
    for image in images:
        image.unlink(missing_ok=True)
    scenes_path.unlink()


def _coco_captions(info, scenes):
    """The content of captions_train2014.json, with COCO's keys."""
    images = [
        {"id": scene.image_id, "file_name": scene.file_name, "width": scene.width, "height": scene.height}
        for scene in scenes
    ]
    captions = [(scene.image_id, caption) for scene in scenes for caption in _write_captions(scene)]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions, start=1)]
    return {"info": info, "licenses": [], "images": images, "annotations": annotations}


@mended_by("run python data_utils.py --dataset demo")
def read_scenes(folder):
    """Read what each drawn image of a data set's folder shows. path -> dict of image id to Scene.

    Raises:
      UserError: the file of scenes is missing or damaged.
    """
    path = _annotation_path(folder, "scenes")
    found = read_json(path, dict)
    try:
        objects = [[SceneObject(**thing) for thing in scene["objects"]] for scene in found["scenes"]]
        scenes = [Scene(**scene | {"objects": some}) for scene, some in zip(found["scenes"], objects, strict=True)]
    except (KeyError, TypeError):
        raise FileError(path, "is damaged (it does not list scenes)") from None
    return {scene.image_id: scene for scene in scenes}


# --- A scene and its captions -------------------------------------------------------------------------------------


def _compose_scene(image_id, seed):
    """Make up a scene. It depends on the image id and the seed alone, and no two of its objects have one colour."""
    rng = np.random.default_rng((seed, image_id, 0))
    width, height = _SIZES[rng.integers(len(_SIZES))]
    ground = _pick(rng, GROUND_COLOURS)
    places = _PAIRS[rng.integers(len(_PAIRS))] if rng.random() < _PAIR_SHARE else [_pick(rng, _PLACES)]
    colours = rng.permutation(list(COLOURS)).tolist()
    objects = []
    for place, colour in zip(places, colours, strict=False):
        noun, pattern = _pick(rng, SECOND_COLOURS), _pick(rng, PATTERNS)
        objects.append(SceneObject(noun, colour, pattern, place, _place_box(rng, place, width, height)))
    return Scene(image_id, f"COCO_{_SPLIT}_{image_id:012d}.jpg", width, height, ground, objects)


def _pick(rng, choices):
    return list(choices)[rng.integers(len(choices))]


def _place_box(rng, place, width, height):
    """The box [x, y, w, h] of an object, in pixels. Its sides are less than half the image's: two never touch."""
    size = round(rng.uniform(0.42, 0.46) * min(width, height))
    across, down = _PLACES[place] + rng.uniform(-0.04, 0.04, 2)
    return [round(across * (width - size)), round(down * (height - size)), size, size]


def _write_captions(scene):
    """Write five captions of a scene. Each names the ground, and every object with all its attributes.

    The object on the left or at the top always comes first, since a captioner could not foresee the order otherwise.
    The noun comes before colour and pattern, so that a captioner has to find the object first.
    """
    first, last = scene.objects[0], scene.objects[-1]
    words = {"ground": scene.ground, "a": _name_object(first), "at_a": PLACE_PHRASES[first.place]}
    if first is last:
        templates = _CAPTIONS_OF_ONE
    else:
        phrases = {places: phrase for phrase, places in RELATIONS.items()}
        words |= {"b": _name_object(last), "at_b": PLACE_PHRASES[last.place]}
        words["a_to_b"] = phrases[first.place, last.place]
        words["b_to_a"] = phrases[last.place, first.place]
        templates = _CAPTIONS_OF_TWO
    return [template.format(**words).capitalize() + "." for template in templates]


def _name_object(thing):
    pattern = PATTERNS[thing.pattern]
    return f"a {thing.noun} " + (f"in plain {thing.colour}" if pattern == "plain" else f"with {thing.colour} {pattern}")


# --- Drawing ------------------------------------------------------------------------------------------------------


def _draw_scene(scene, seed):
    """Draw a scene, always the same image for the same seed. Returns uint8 (height, width, 3)."""
    rng = np.random.default_rng((seed, scene.image_id, 1))
    image = _draw_ground(rng, scene.ground, scene.width, scene.height)
    for thing in scene.objects:
        _draw_object(rng, thing, image)
    return np.clip(image, 0, 255).astype(np.uint8)


def _draw_ground(rng, ground, width, height):
    """Draw a ground's texture. Returns float32 (height, width, 3), most values in 0..255."""
    rows = np.arange(height, dtype=np.float32)[:, None]  # (height, 1)
    slow = _draw_noise(rng, width, height, 50, 40)
    if ground == "grass":
        shade = 0.65 * _draw_noise(rng, width, height, 2, 9) + 0.35 * slow
    elif ground == "sand":
        shade = 0.3 + 0.16 * np.sin((rows + 26 * slow) / 2.6) + 0.5 * _draw_noise(rng, width, height, 1, 1)
    elif ground == "water":
        waves = np.sin((rows + 40 * _draw_noise(rng, width, height, 48, 24)) / 2.2)
        shade = 0.15 + 0.25 * waves + 0.5 * _draw_noise(rng, width, height, 14, 3)
    else:
        shade = 0.75 * slow + 0.35 * _draw_noise(rng, width, height, 2, 2)
    dark, light = np.float32(GROUND_COLOURS[ground])
    return dark + (light - dark) * shade[:, :, None]  # (height, width, 3)


def _draw_noise(rng, width, height, cell_width, cell_height):
    """Draw random values in 0..1 that change smoothly from cell to cell. Returns float32 (height, width)."""
    coarse = rng.random((height // cell_height + 2, width // cell_width + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _draw_object(rng, thing, image):
    """Draw a SceneObject and its shadow into an image, float32 (height, width, 3), which is changed in place."""
    x, y, size, _ = thing.box
    left, top = max(x - 4, 0), max(y - 4, 0)
    patch = image[top : y + size + 12, left : x + size + 12]  # the shadow needs 4 and 12 pixels around the box
    # Distances from the object's middle, in pixels.
    down, across = np.ogrid[: patch.shape[0], : patch.shape[1]]  # (rows, 1), (1, columns)
    down, across = (np.float32(down + top - y - (size - 1) / 2), np.float32(across + left - x - (size - 1) / 2))

    other = np.float32(SECOND_COLOURS[thing.noun])
    share = _share_of_colour(rng, thing.pattern, across, down)  # (rows, columns)
    if thing.noun == "box":
        share = share * _coverage("box", across, down, 0.78 * size)
        light = 1.1 - 0.2 * (down + 0.5 * across) / size  # (rows, columns)
    else:
        light = 1.12 - 1.1 * ((across / size + 0.18) ** 2 + (down / size + 0.2) ** 2)  # (rows, columns)
    paint = other + (COLOURS[thing.colour] - other) * share[:, :, None]  # (rows, columns, 3)
    patch *= 1 - 0.45 * _coverage(thing.noun, across - 4, down - 5, size, edge=8)[:, :, None]
    patch += (paint * light[:, :, None] - patch) * _coverage(thing.noun, across, down, size)[:, :, None]


def _coverage(noun, across, down, size, edge=1):
    """How far each pixel lies inside an object's outline.

    Args:
      noun: str, which tells the outline.
      across, down: (1, columns) and (rows, 1), distances from the outline's middle in pixels.
      size: float, width and height of the outline in pixels.
      edge: float, width in pixels of the passage from inside to outside.

    Returns:
      (rows, columns), 1 inside and 0 outside.
    """
    distance = np.hypot(across, down) if noun == "ball" else np.maximum(np.abs(across), np.abs(down))
    return np.clip((size / 2 - distance) / edge + 0.5, 0, 1)


def _share_of_colour(rng, pattern, across, down):
    """A pattern over pixels at these distances: (rows, columns), 1 where the object has its own colour, otherwise 0."""
    period = _PATTERN_PERIODS[pattern]
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
