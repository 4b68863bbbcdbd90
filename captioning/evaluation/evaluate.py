"""Captions of a whole split, scored by the field's metrics and, where boxes are known, by where the model looked."""

import dataclasses
import math
import pathlib

import numpy as np

from captioning.attention.boxes import boxes_by_position, find_groundings
from captioning.attention.page import PageCaption, PageImage, write_pages
from captioning.captioner import caption_cached, explain_references, greedy_settings, sampling_settings
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.demo import scores as demo_scores
from captioning.demo.scenes import read_scenes
from captioning.evaluation.attention_accuracy import attention_accuracy
from captioning.evaluation.diversity import Diversity, describe_diversity
from captioning.evaluation.metrics import (
    METRICS,
    cider_by_image,
    describe_form,
    format_score,
    format_table,
    note_few_images,
    score_best,
    score_captions,
    write_metrics,
)
from captioning.settings import make_config
from support.errors import UserError, printable

_EVALUATED_WIDTHS = (1, 3, 5)  # beam widths that are compared
# Settings of decoding, besides the beam width
_DECODING = ("length_penalty", "repeat_block", "max_words", "captions_per_image")
_IMAGES_OF_A_GROUP = 12  # of the page: of the best, of the middle and of the worst score


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The captions of a split by one way of decoding.

    Attributes:
      captions: list of GeneratedCaptions, the first of each image.
      texts: dict of image id to list of str, all captions of the image.
      groundings: list of Groundings, empty where no boxes are known.
      ciders: dict of image id to CIDEr, on the project's own tokens.
      metrics: dict of scores, as they go into the metrics file.
    """

    captions: list
    texts: dict
    groundings: list
    ciders: dict
    metrics: dict


def evaluate(captioner, images, split, output, config):
    """Caption every image greedily and with beams, and print and write the scores of each run, and a page.

    Where the settings ask for several captions of an image, or for drawn ones, these are a run too. Its scores are of
    the first captions; behind them come those of the best ones, and how much the captions differ: see `score_best` and
    `Diversity`.

    Args:
      captioner: Captioner
      images: list of ImageToCaption with references and cached features.
      split: str, the name of the split, which goes into the names of the files, as `_name_files` tells.
      output: pathlib.Path of the folder to write to.
      config: Config; the settings of decoding.
    """
    with_boxes = _can_use_boxes(images, config)
    ways = _ways_to_decode(config)
    runs = {run: _caption_and_score(captioner, images, way, with_boxes) for run, way in ways.items()}
    taught = _score_references(captioner, images, config) if with_boxes else {}
    scored = _describe_scored(captioner, images, split, config)
    metrics = {run: evaluated.metrics for run, evaluated in runs.items()}
    texts = {run: {i: group[0] for i, group in evaluated.texts.items()} for run, evaluated in runs.items()}
    rows = _rows_of_table(metrics)
    table = [["", *METRICS]]
    table += [[run, *(format_score(name, scores.get(name)) for name in METRICS)] for run, scores in rows.items()]
    name = _name_files(split, config)
    how = ", ".join(f"{key} {value}" for key, value in scored.items())
    few = note_few_images(len(images))
    write_metrics(output, name, texts, scored | ({"cider_note": few} if few else {}) | metrics | taught)
    pages = write_pages(
        output,
        f"Best, middle and worst captions of the {split} split",
        _score_pages(runs, images),
        table,
        file_name=f"evaluation_{name}.html",
        intro=f"These images have the best, the middle and the worst CIDEr of all {len(images)}, greedy. "
        f"Scored: {how}. {few}".rstrip(),
    )
    print(printable(f"scored: {how}"))
    print(format_table(rows))
    if few:
        print(f"note: {few}")
    for run, by_image in texts.items():
        print(f"{run}: {describe_form(list(by_image.values()))}")
        _print_diversity(run, runs[run], metrics[run])
    _print_scenes(metrics)
    for run, values in (metrics | taught).items():
        _print_attention(run, values.get("attention"))
    print(f"metrics_{name}.json and the captions in COCO's results format are in {printable(output)}")
    print(f"open {printable(pages[0])} to look at the best, the middle and the worst captions")


def _ways_to_decode(config):
    """The runs that are compared, dict of name to Config: beams of several widths, and what the settings ask for.

    Several captions, or drawn ones, are those of the settings' own run.
    """
    widths = sorted({*_EVALUATED_WIDTHS, config.beam_width})
    name = lambda width: "greedy" if width == 1 else f"beam {width}"  # noqa: E731
    ways = {name(width): dataclasses.replace(greedy_settings(config), beam_width=width) for width in widths}
    return ways | {"sample" if config.sample == "yes" else name(config.beam_width): config}


def _name_files(split, config):
    """What the names of a split's files have in common: the split, and the settings of decoding that are no defaults.

    The default is that of the data set's preset. A beam width is named where it adds a run to _EVALUATED_WIDTHS. So two
    ways of decoding have files of their own, such as metrics_test_length_penalty0.5.json.
    """
    default = make_config({"dataset": config.dataset})
    differing = lambda names: [name for name in names if getattr(config, name) != getattr(default, name)]  # noqa: E731
    named = differing(_DECODING) + (["beam_width"] if config.beam_width not in _EVALUATED_WIDTHS else [])
    parts = [split, *(f"{name}{getattr(config, name)}" for name in named)]
    if config.sample == "yes":
        drawn, usual = sampling_settings(config), sampling_settings(default)
        parts += ["sample", *(f"{name}{value}" for name, value in drawn.items() if value != usual[name])]
    return "_".join(parts)


def _describe_scored(captioner, images, split, config):
    """What was scored, and how it was decoded, but for the beam width, which each run has. dict of str to value."""
    return {
        "dataset": config.dataset,
        "split": split,
        "images": len(images),
        "checkpoint": str(pathlib.Path(config.run_dir, captioner.checkpoint)),
        "checkpoint_digest": captioner.identity,
        **{name: getattr(config, name) for name in _DECODING},
        **({"sample": "yes", **sampling_settings(config)} if config.sample == "yes" else {}),
    }


def _can_use_boxes(images, config):
    """Whether the boxes of what captions name are known. Those that cannot be used are told in one line."""
    no_map = np.zeros((0, 1))  # there are no words
    blank = [GeneratedCaption(image.path, image.name, [], np.zeros(0), no_map, image.image_id) for image in images]
    try:
        return find_groundings(blank, config)[0] is not None
    except UserError as error:
        print(f"note: boxes cannot be used, so attention is not scored by them: {error}")
        return False


def _caption_and_score(captioner, images, config, with_boxes):
    """The captions of all images as the settings say, and their scores. Returns Evaluated."""
    captions, texts = [], {}
    for caption in caption_cached(captioner, images, config, with_evidence=True):
        texts[caption.image_id] = [each.caption for each in (caption, *caption.others)]
        captions.append(dataclasses.replace(caption, others=()))  # whose maps would take much memory
    references = {image.image_id: image.references for image in images}
    first = {i: group[0] for i, group in texts.items()}
    metrics = score_captions(first, references)
    metrics |= {"sample": "yes"} if config.sample == "yes" else {"beam_width": config.beam_width}
    metrics["form"] = dataclasses.asdict(describe_form(list(first.values())))
    if config.captions_per_image > 1:
        metrics["captions_per_image"] = config.captions_per_image
        metrics["best"] = score_best(texts, references)
        metrics["diversity"] = dataclasses.asdict(describe_diversity(list(texts.values())))
    groundings = []
    if config.dataset == "demo":
        scenes = read_scenes(config.coco_dir)
        theirs = [scenes[caption.image_id] for caption in captions]
        metrics["scenes"] = demo_scores.score_captions([caption.caption for caption in captions], theirs)
    if with_boxes:
        groundings, known = find_groundings(captions, config)
        metrics["attention"] = attention_accuracy(groundings) | known
    return Evaluated(captions, texts, groundings, cider_by_image(first, references), metrics)


def _score_references(captioner, images, config):
    """Where the model looks while it is made to say the references, as {"references": {"attention": scores}}."""
    groundings, known = find_groundings(explain_references(captioner, images, config), config)
    return {"references": {"attention": attention_accuracy(groundings) | known}}


def _rows_of_table(metrics):
    """The scores of each run, and behind them those of the best of several captions. dict of str to dict of scores."""
    rows = {}
    for run, scores in metrics.items():
        rows[run] = scores
        if "best" in scores:
            rows[f"{run}, best of {scores['captions_per_image']}"] = scores["best"]
    return rows


# --- The page ---------------------------------------------------------------------------------------------------


def _score_pages(runs, images):
    """PageImages of the best, the middle and the worst score of the first run, all runs' captions side by side."""
    first = next(iter(runs.values()))
    by_score = sorted(images, key=lambda image: -first.ciders[image.image_id])
    size = min(_IMAGES_OF_A_GROUP, math.ceil(len(by_score) / 3))
    middle = (len(by_score) - size) // 2
    groups = {"best": by_score[:size], "middle": by_score[middle : middle + size], "worst": by_score[-size:]}
    captions = {name: {caption.image_id: caption for caption in run.captions} for name, run in runs.items()}
    boxes = {name: boxes_by_position(run.groundings) for name, run in runs.items()}
    shown = set()
    for group, members in groups.items():
        for image in members:
            if image.name in shown:  # the groups of a small split overlap
                continue
            shown.add(image.name)
            page_captions = [
                PageCaption(
                    captions[name][image.image_id],
                    name,
                    f"CIDEr {run.ciders[image.image_id]:.2f}",
                    boxes[name].get((image.image_id, captions[name][image.image_id].caption), {}),
                )
                for name, run in runs.items()
            ]
            yield PageImage(f"{group}: {image.path.name}", image.path, page_captions)


def _print_diversity(run, evaluated, scores):
    """A line of how much the captions of an image differ, where it has several, and of how many have fewer."""
    if count := scores.get("captions_per_image"):
        print(f"{run}, {count} captions of each image: {Diversity(**scores['diversity'])}")
        if few := sum(len(group) < count for group in evaluated.texts.values()):
            print(f"{run}: {few} images have fewer captions, as no more different ones were found")


def _print_scenes(metrics):
    """A line for each run of the demo: how far its captions are true."""
    for run, values in metrics.items():
        if scenes := values.get("scenes"):
            print(f"{run}, scenes: " + ", ".join(f"{name} {value:.3g}" for name, value in scenes.items()))


def _print_attention(name, scores):
    """A table of where the maps of a run point, in per cent, beside the guesses that a reader must know."""
    if not scores or not scores["words"]:
        return
    words, off_centre = scores["words"], scores["words_off_centre"]
    print(f"{name}: {words} words name a thing with a box, {off_centre} of them an off-centre thing")
    columns = ("inside", "inside_off_centre", "mass_inside", "mass_inside_off_centre")
    print(f"| {'map':26} | peak inside | off-centre | mass inside | off-centre |")
    print(f"| {'-' * 26} | ----------: | ---------: | ----------: | ---------: |")
    for map_name, values in scores["maps"].items():
        cells = ["-" if values[column] is None else f"{100 * values[column]:.1f}" for column in columns]
        print(f"| {map_name:26} | {cells[0]:>11} | {cells[1]:>10} | {cells[2]:>11} | {cells[3]:>10} |")
