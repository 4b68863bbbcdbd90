"""Script 3: caption validation images, or your own, and plot where the model looked for each word.

python inference_image_caption.py [--image FILE_FOLDER_OR_URL ... | --evaluate | --export DIR] [--output DIR]
    [--<field> VALUE ...]
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import textwrap
import warnings

import demo_scenes
from attention_accuracy import attention_accuracy, coco_looks, demo_looks
from caption_metrics import format_table, score_captions, write_metrics
from command_line import UserError, parse_command_line, run_script
from data_utils import (
    END,
    LOCATIONS,
    PAD,
    dataset_option,
    extract_features,
    extraction_graphs,
    feature_network,
    feature_path,
    image_path,
    load_prepared,
    parallel_map,
    read_feature,
    read_vocabulary,
    upright_rgb,
)
from downloads import download_all
from export_model import export_captioner
from files import locked, remove_leftovers, replacing, write_bytes
from model import CNN_Encoder, RNN_Decoder, build_captioner, decode_captions, has_ended
from train_image_caption_model import check_run_fits, checkpoints, restore_newest

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from PIL import Image

GRID = int(LOCATIONS**0.5)
PANEL_WIDTH, GAP, LINE, LETTER = 190, 6, 24, 8  # pixels of a figure: of a panel, between panels, of text
DPI = 80
EXTRACTED = 1000  # images whose features are held in memory before they are captioned
SHORT = 20  # words, within which most captions end
EVALUATED_WIDTHS = (1, 3, 5)  # beam widths that --evaluate compares
LARGEST = 50_000_000  # bytes of a picture fetched from an address


def add_options(parser):
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="FILE_FOLDER_OR_URL",
        help="caption these pictures instead of validation images; http and https addresses are fetched",
    )
    parser.add_argument("--evaluate", action="store_true", help="score the captions of the whole split")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: validation)")
    parser.add_argument(
        "--export", metavar="DIR", help="write the captioner as a TensorFlow SavedModel, and no captions"
    )
    parser.add_argument("--output", metavar="DIR", help="where captions and figures go (default: <run_dir>/captions)")


def main(argv):
    config, options = parse_command_line(argv, __doc__, add_options)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    output = pathlib.Path(options.output or pathlib.Path(config.run_dir, "captions"))

    captioner = load_captioner(config)
    if options.export:
        network = feature_network(dataclasses.replace(config, extract_precision="float32"))  # for any machine
        export_captioner(captioner, network, config, options.export)
        print(f"the SavedModel is in {options.export}")
        return
    with locked(output):
        remove_leftovers(output)
        if options.evaluate:
            evaluate(captioner, split_images(options.split, config), output, config)
            return
        if options.image:
            images = own_images(options.image, output / "downloads")
            batches = extract_batches(fetch_own(images, config), config)
        else:
            images = choose_images(split_images(options.split, config), config)
            batches = cached_batches(images, config)
        captions = [caption for batch in batches for caption in caption_batch(captioner, *batch, config)]

        for number, caption in enumerate(captions, 1):
            print_caption(caption)
            if number <= config.figures:
                plot_attention(caption, output / f"{number:03d}_{caption['path'].stem}.png")
        write_captions(captions, output / "captions.jsonl")
        print(f"captions.jsonl and {min(len(captions), config.figures)} attention figures are in {output}")
        if len(captions) > config.figures:
            print(f"{len(captions)} images are captioned: --figures {len(captions)} draws all of them")
        if len(captions) < len(images):
            sys.exit(1)


# --- Model and images -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Captioner:
    encoder: CNN_Encoder
    decoder: RNN_Decoder
    vocabulary: list


def load_captioner(config):
    """Restore the best checkpoint of `run_dir`.

    Raises:
      UserError: nothing was trained there, or with other settings.
    """
    folder = pathlib.Path(config.run_dir)
    command = f"python train_image_caption_model.py {dataset_option(config)}".strip()
    if not checkpoints(folder / "best"):
        raise UserError(f"no trained model is in {folder}: run {command} first, or give its --run_dir")
    vocabulary = read_vocabulary(folder / "vocabulary.json", f"delete {folder} and run {command} again")
    check_run_fits(folder, config, vocabulary)
    encoder, decoder = build_captioner(config, len(vocabulary))
    restore_newest(tf.train.Checkpoint(encoder=encoder, decoder=decoder), folder / "best")
    return Captioner(encoder, decoder, vocabulary)


def split_images(split, config):
    """The images of the validation or test split that data_utils.py prepared, each with its "path"."""
    prepared = load_prepared(config)
    check_run_fits(pathlib.Path(config.run_dir), config, prepared.vocabulary)
    images = getattr(prepared, split)
    if not images:
        raise UserError(f"{config.data_dir} has no {split} split: leave out --split, or prepare --dataset karpathy")
    return [{**image, "path": image_path(image, config)} for image in images]


def choose_images(images, config):
    """`plot_images` of the images, a choice that depends on the seed alone."""
    count = min(config.plot_images, len(images))
    return [images[i] for i in np.random.default_rng(config.seed).choice(len(images), count, replace=False)]


def own_images(names, downloads):
    """The image files that are named, those in the folders that are named, at any depth, and those of addresses.

    Returns:
      list of dicts of "path" and, of an address, "address"; its path is in the folder `downloads`, see `fetch_own`.
    """
    images = []
    for name in names:
        path = pathlib.Path(name)
        if re.match("[a-z][a-z0-9+.-]*://", name, re.IGNORECASE):
            images.append({"path": downloads / local_name(name), "address": name})
        elif path.is_dir():
            found = sorted(path for path in path.rglob("*") if path.suffix.lower() in Image.registered_extensions())
            images += [{"path": path} for path in found]
        else:
            images.append({"path": path})
    if not images:
        raise UserError(f"no image file is in {', '.join(names)}: name image files or folders behind --image")
    return list({image["path"]: image for image in images}.values())


def local_name(address):
    """A file name for an address: letters and digits of its last part, and a digest that no other address has."""
    last = re.sub("[^A-Za-z0-9]+", "_", address.split("?")[0].rsplit("/", 1)[-1])
    return f"{last[-40:]}_{hashlib.sha256(os.fsencode(address)).hexdigest()[:16]}"


def fetch_own(images, config):
    """Download the pictures of addresses, anew in each run; those that cannot be had are named and left out."""
    jobs = [(image["address"], image["path"]) for image in images if "address" in image]
    for _, path in jobs:
        with contextlib.suppress(OSError):
            path.unlink()
    limits = {"attempts": 2, "timeout": 10.0, "limit": LARGEST, "give_up": None}
    failed = dict(download_all(jobs, config.download_workers, progress=False, **limits))
    for image in images:
        if image["path"] in failed:
            print(f"{image['address']} cannot be fetched ({failed[image['path']]})")
    return [image for image in images if image["path"] not in failed]


def cached_batches(images, config):
    """(images, features (B, P, F)) of images whose features data_utils.py cached, `decode_batch` at a time."""
    paths = [str(feature_path(image, config)) for image in images]
    for number, features in enumerate(parallel_map(read_feature, paths).batch(config.decode_batch).prefetch(1)):
        start = number * config.decode_batch
        yield images[start : start + config.decode_batch], features  # (B, P, F)


def extract_batches(images, config):
    """(images, features (B, P, F)) of image files, about `decode_batch` at a time, but whole batches of extraction.

    Those that cannot be read are named and left out.
    """
    network = feature_network(config)
    by_path = {image["path"]: image for image in images}
    paths = list(by_path)
    together = max(config.decode_batch // config.extract_batch, 1)
    for start in range(0, len(paths), EXTRACTED):
        with extraction_graphs(config):
            extracted = list(extract_features(network, paths[start : start + EXTRACTED], config.extract_batch))
        for i in range(0, len(extracted), together):
            done, features, failed = zip(*extracted[i : i + together], strict=True)
            for path, reason in itertools.chain(*failed):
                print(f"{shown_name(by_path[path])}: {reason}" if "address" in by_path[path] else reason)
            readable = [by_path[path] for path in itertools.chain(*done)]
            if readable:
                yield readable, np.concatenate(features)  # (B, P, F)


# --- Captions ---------------------------------------------------------------------------------------------------


decode = tf.function(decode_captions, reduce_retracing=True)


def caption_batch(captioner, images, features, config):
    """Caption images from their features (B, P, F).

    Returns:
      list of B dicts: what `images` holds, with "words" (<end> left out), "caption", "log_probability" (natural) and
      "attention_weights", (words, P).
    """
    features = tf.convert_to_tensor(features)
    # Greedily, few captions are long, and the others need not wait for them. With beams a longer one may yet win.
    most = min(SHORT, config.max_words) if config.beam_width == 1 else config.max_words
    decoded = decode_batch(captioner, features, most, config)
    unfinished = [i for i, (ids, _, _) in enumerate(decoded) if not has_ended(ids)]
    if unfinished and most < config.max_words:
        longer = decode_batch(captioner, tf.gather(features, unfinished), config.max_words, config)
        for i, result in zip(unfinished, longer, strict=True):
            decoded[i] = result

    captions = []
    for image, (ids, log_probability, weights) in zip(images, decoded, strict=True):
        said = [captioner.vocabulary[i] for i in ids if i not in (PAD, END)]
        captions.append(
            {
                **image,
                "words": said,
                "caption": " ".join(said),
                "log_probability": float(log_probability),
                "attention_weights": weights[: len(said)],
            }
        )
    return captions


def decode_batch(captioner, features, max_words, config):
    """list of B (word ids (L,), log-probability, attention weights (L, P)), each as decode_captions returns it."""
    decoded = decode(
        captioner.encoder,
        captioner.decoder,
        features,
        max_words,
        config.beam_width,
        config.length_penalty,
        config.repeat_block,
    )
    return list(zip(*(part.numpy() for part in decoded), strict=True))


def shown_name(image):
    return image.get("address", str(image["path"]))


def print_caption(caption):
    print(shown_name(caption))
    for reference in caption.get("references", []):
        print(f"  real       {reference}")
    print(f"  predicted  {caption['caption']}")


def write_captions(captions, path):
    """Write one JSON line per image: image, image_id, caption, words, log_probability, attention_weights (words, P)."""
    lines = []
    for caption in captions:
        record = {"image": shown_name(caption)}
        record |= {
            name: caption[name] for name in ("image_id", "caption", "words", "log_probability") if name in caption
        }
        record["attention_weights"] = caption["attention_weights"].astype(np.float64).round(6).tolist()
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode(errors="backslashreplace"))  # JSON's escape for names not in UTF-8


# --- Scores -----------------------------------------------------------------------------------------------------


def evaluate(captioner, images, output, config):
    """Caption every image greedily and with beams, and print and write the field's metrics of each run."""
    references = {image["image_id"]: image["references"] for image in images}
    texts, metrics = {}, {}
    for width in sorted({*EVALUATED_WIDTHS, config.beam_width}):
        run = "greedy" if width == 1 else f"beam {width}"
        settings = dataclasses.replace(config, beam_width=width)
        batches = cached_batches(images, settings)
        captions = [caption for batch in batches for caption in caption_batch(captioner, *batch, settings)]
        texts[run] = {caption["image_id"]: caption["caption"] for caption in captions}
        metrics[run] = score_captions(texts[run], references)
        metrics[run] |= score_attention(captions, config)
    write_metrics(output, config.coco_split, texts, metrics)
    print(format_table(metrics))
    for run, values in metrics.items():
        for kind in ("scenes", "attention"):
            if kind in values:
                known = ((name, value) for name, value in values[kind].items() if value is not None)
                print(f"{run}, {kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in known))
    print(f"metrics.json and the captions in COCO's results format are in {output}")


def score_attention(captions, config):
    """What is known of where things are: "attention", the share of object words whose attention peak is inside the
    object's box, and, of the demo, "scenes", see demo_scenes.score_captions."""
    if config.dataset == "demo":
        scenes = demo_scenes.read_scenes(config.coco_dir)
        texts, theirs = [c["caption"] for c in captions], [scenes[c["image_id"]] for c in captions]
        attention = attention_accuracy(demo_looks(captions, scenes), spread)
        return {"scenes": demo_scenes.score_captions(texts, theirs), "attention": attention}
    instances = pathlib.Path(config.coco_dir, "annotations", f"instances_{config.coco_split}.json")
    if config.dataset != "coco" or not instances.exists():
        return {}
    looks, absent = coco_looks(captions, instances)
    return {"attention": attention_accuracy(looks, spread) | {"absent": absent}}


def spread(weights, size):
    """As `upsample`, but dark outside the image, so that a border cell's peak is not drawn to the very edge."""
    return upsample(weights, size, "constant")


# --- Figures ----------------------------------------------------------------------------------------------------


def plot_attention(caption, path):
    """Draw the image, and for each word the image lit where the model looked, as a PNG file, without a display.

    Args:
      caption: dict with "path", "words" and "attention_weights" (words, P).

    Raises:
      UserError: the image file is gone or damaged.
    """
    try:
        with Image.open(caption["path"]) as opened:
            image = upright_rgb(opened, PANEL_WIDTH)
            scale = min(PANEL_WIDTH / image.width, 3 * PANEL_WIDTH / image.height)
            image = image.resize([max(round(side * scale), 1) for side in image.size], reducing_gap=2.0)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{caption['path']} cannot be drawn ({error}): run python data_utils.py to fetch it") from error
    pixels = np.asarray(image, np.float32) / 255  # (height, width, 3)
    panels = [("", pixels)]
    for word, weights in zip(caption["words"], caption["attention_weights"], strict=True):
        light = upsample(weights, image.size)
        panels.append((word, pixels * (0.2 + 0.8 * light[..., np.newaxis])))

    rows = -(-len(panels) // (5 if image.width > 1.2 * image.height else 6))
    columns = -(-len(panels) // rows)
    width, height = PANEL_WIDTH + GAP, image.height + LINE + GAP
    title = textwrap.wrap(caption["caption"], columns * width // LETTER) or ["(no words)"]
    size = np.array([columns * width, rows * height + len(title) * LINE])
    figure = Figure(size / DPI, DPI)  # without axes, whose layout takes longer than all the rest
    figure.text(0.5, 1 - GAP / size[1], "\n".join(title), ha="center", va="top", fontsize=12)
    for number, (word, panel) in enumerate(panels):
        corner = np.array([number % columns * width, (rows - 1 - number // columns) * height])  # from the lower left
        figure.figimage(panel, *(corner + (width - image.width) // 2 * np.array([1, 0])))
        figure.text(*(corner + (width / 2, image.height + 6)) / size, word, ha="center", fontsize=12)
    with replacing(path) as temporary:
        figure.savefig(temporary, pil_kwargs={"compress_level": 1})  # 6, as usual, takes a fifth of a second


def upsample(weights, size, border="edge"):
    """An attention map as light over an image. (P,), (width, height) -> float (height, width), its peak 1."""
    grid = np.pad(np.asarray(weights, np.float32).reshape(GRID, GRID), 2, border)
    inside = (2, 2, 2 + GRID, 2 + GRID)
    smooth = np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC, box=inside)).clip(0)
    return smooth / max(smooth.max(), 1e-12)


if __name__ == "__main__":
    run_script(main)
