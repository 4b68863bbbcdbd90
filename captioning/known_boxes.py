"""The boxes of what captions name, where a data set knows them: the demo's scenes, and COCO's instances_*.json."""

import pathlib

from captioning.attention_accuracy import coco_groundings, demo_groundings
from captioning.demo_scenes import read_scenes


def find_groundings(captions, config):
    """The words that name objects with known boxes, in the demo's scenes or in COCO's instances.

    Args:
      captions: list of PredictedCaptions with image ids.

    Returns:
      (list of Groundings, or None where no boxes are known; dict of what else is to be reported)

    Raises:
      UserError: the scenes or the instances are damaged, or those of other images.
    """
    if config.dataset == "demo":
        return demo_groundings(captions, read_scenes(config.coco_dir)), {}
    instances = instances_path(captions, config)
    if config.dataset != "coco" or not instances.exists():
        return None, {}
    groundings, absent = coco_groundings(captions, instances)
    return groundings, {"absent": absent}


def instances_path(captions, config):
    """Where COCO's instances of the captioned images are: those of the split in whose folder the images lie."""
    annotations, split = pathlib.Path(config.coco_dir, "annotations"), config.coco_split
    if captions and captions[0].path.is_relative_to(config.coco_dir):
        split = captions[0].path.relative_to(config.coco_dir).parts[0]
    return annotations / f"instances_{split}.json"


def boxes_by_position(groundings):
    """dict of image id to dict of a word's position in the caption to the boxes of what it names."""
    boxes = {}
    for grounding in groundings:
        for position in grounding.positions:
            boxes.setdefault(grounding.image_id, {})[position] = grounding.boxes
    return boxes
