"""Captions of a whole split, scored by the field's metrics and, where boxes are known, by where the model looked."""

import dataclasses
import pathlib

from captioning import demo_scores
from captioning.attention_accuracy import attention_accuracy, coco_groundings, demo_groundings
from captioning.captioner import cached_batches, caption_batch
from captioning.demo_scenes import read_scenes
from captioning.metrics import format_table, score_captions, write_metrics

EVALUATED_WIDTHS = (1, 3, 5)  # beam widths that are compared


def evaluate(captioner, pictures, split, output, config):
    """Caption every picture greedily and with beams, and print and write the scores of each run.

    Args:
      captioner: Captioner
      pictures: list of Pictures with references and cached features.
      split: str, the name of the split, which goes into the names of the files.
      output: pathlib.Path of the folder to write to.
    """
    references = {picture.image_id: picture.references for picture in pictures}
    texts, metrics = {}, {}
    for width in sorted({*EVALUATED_WIDTHS, config.beam_width}):
        run = "greedy" if width == 1 else f"beam {width}"
        settings = dataclasses.replace(config, beam_width=width)
        batches = cached_batches(pictures, settings)
        captions = [caption for batch in batches for caption in caption_batch(captioner, *batch, settings)]
        texts[run] = {caption.image_id: caption.caption for caption in captions}
        metrics[run] = score_captions(texts[run], references) | score_attention(captions, config)
    scored = {"dataset": config.dataset, "split": split, "images": len(pictures)}
    scored["checkpoint"] = str(pathlib.Path(config.run_dir, captioner.checkpoint))
    write_metrics(output, split, texts, scored | metrics)
    print(format_table(metrics))
    for run, values in metrics.items():
        for kind in ("scenes", "attention"):
            if kind in values:
                known = ((name, value) for name, value in values[kind].items() if value is not None)
                print(f"{run}, {kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in known))
    print(f"metrics_{split}.json and the captions in COCO's results format are in {output}")


def score_attention(captions, config):
    """Scores that need to know where things are.

    Args:
      captions: list of PredictedCaptions.

    Returns:
      dict, empty where nothing is known. "attention": the share of object words whose attention peaks inside the
      object's box, see attention_accuracy. "scenes", for the demo: how far captions are true, see demo_scores.
    """
    if config.dataset == "demo":
        scenes = read_scenes(config.coco_dir)
        theirs = [scenes[caption.image_id] for caption in captions]
        scores = demo_scores.score_captions([caption.caption for caption in captions], theirs)
        return {"scenes": scores, "attention": attention_accuracy(demo_groundings(captions, scenes))}
    instances = pathlib.Path(config.coco_dir, "annotations", f"instances_{config.coco_split}.json")
    if config.dataset != "coco" or not instances.exists():
        return {}
    groundings, absent = coco_groundings(captions, instances)
    return {"attention": attention_accuracy(groundings) | {"absent": absent}}
