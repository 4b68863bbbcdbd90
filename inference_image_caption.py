"""Script 3: caption validation images, or your own, and plot where the model looked for each word.

python inference_image_caption.py [--image FILE_OR_FOLDER ... | --evaluate] [--output DIR] [--<field> VALUE ...]
"""

import dataclasses
import json
import os
import pathlib
import sys
import warnings

import demo_scenes
from caption_metrics import format_table, score_captions, write_metrics
from command_line import UserError, parse_command_line, run_script
from data_utils import (
    END,
    LOCATIONS,
    PAD,
    dataset_option,
    extract_features,
    extract_precision,
    feature_network,
    feature_path,
    image_path,
    load_prepared,
    read_feature,
    upright_rgb,
)
from files import read_json, replacing, write_bytes
from model import CNN_Encoder, RNN_Decoder, build_captioner, decode_captions
from train_image_caption_model import check_run_fits

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from PIL import Image

GRID = int(LOCATIONS**0.5)
PLOT_SIZE = 480  # pixels, the longer side of a panel
EXTRACTED = 1000  # images whose features are held in memory before they are captioned
EVALUATED_WIDTHS = (1, 3, 5)  # beam widths that --evaluate compares


def add_options(parser):
    parser.add_argument(
        "--image", nargs="+", metavar="FILE_OR_FOLDER", help="caption these pictures instead of validation images"
    )
    parser.add_argument("--evaluate", action="store_true", help="caption and score the whole validation split")
    parser.add_argument("--output", metavar="DIR", help="where captions and figures go (default: <run_dir>/captions)")


def main(argv):
    config, options = parse_command_line(argv, __doc__, add_options)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    output = pathlib.Path(options.output or pathlib.Path(config.run_dir, "captions"))

    captioner = load_captioner(config)
    if options.evaluate:
        evaluate(captioner, output, config)
        return
    if options.image:
        images = own_images(options.image)
        batches = extract_batches(images, config)
    else:
        images = choose_images(validation_images(captioner, config), config)
        batches = cached_batches(images, config)
    captions = [caption for batch in batches for caption in caption_batch(captioner, *batch, config)]

    for number, caption in enumerate(captions, 1):
        print_caption(caption)
        plot_attention(caption, output / f"{number:03d}_{caption['path'].stem}.png")
    write_captions(captions, output / "captions.jsonl")
    print(f"captions.jsonl and {len(captions)} attention figures are in {output}")
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
    saved = tf.train.latest_checkpoint(folder / "best")
    command = f"python train_image_caption_model.py {dataset_option(config)}".strip()
    if not saved:
        raise UserError(f"no trained model is in {folder}: run {command} first, or give its --run_dir")
    vocabulary = read_json(folder / "vocabulary.json", f"run {command} again")
    check_run_fits(folder, config, vocabulary)
    encoder, decoder = build_captioner(config, len(vocabulary))
    restored = tf.train.Checkpoint(encoder=encoder, decoder=decoder).restore(saved)
    restored.assert_existing_objects_matched().expect_partial()
    return Captioner(encoder, decoder, vocabulary)


def validation_images(captioner, config):
    """The validation images that data_utils.py prepared, each with its "path"."""
    prepared = load_prepared(config)
    check_run_fits(pathlib.Path(config.run_dir), config, prepared.vocabulary)
    return [{**image, "path": image_path(image, config)} for image in prepared.validation]


def choose_images(images, config):
    """`plot_images` of the images, a choice that depends on the seed alone."""
    count = min(config.plot_images, len(images))
    return [images[i] for i in np.random.default_rng(config.seed).choice(len(images), count, replace=False)]


def own_images(names):
    """The image files that are named, and those in the folders that are named, at any depth."""
    images = []
    for name in map(pathlib.Path, names):
        if name.is_dir():
            inside = sorted(path for path in name.rglob("*") if path.suffix.lower() in Image.registered_extensions())
            images += [{"path": path} for path in inside]
        else:
            images.append({"path": name})
    if not images:
        raise UserError(f"no image file is in {', '.join(names)}: name image files or folders behind --image")
    return images


def cached_batches(images, config):
    """(images, features (B, P, F)) of images whose features data_utils.py cached, `decode_batch` at a time."""
    paths = [str(feature_path(image, config)) for image in images]
    dataset = tf.data.Dataset.from_tensor_slices(paths).map(read_feature, num_parallel_calls=os.cpu_count())
    for number, features in enumerate(dataset.batch(config.decode_batch).prefetch(1)):
        start = number * config.decode_batch
        yield images[start : start + config.decode_batch], features  # (B, P, F)


def extract_batches(images, config):
    """(images, features (B, P, F)) of image files; those that cannot be read are named and left out."""
    network = feature_network(config)
    by_path = {image["path"]: image for image in images}
    paths = list(by_path)
    for start in range(0, len(paths), EXTRACTED):
        with extract_precision(config):
            extracted = list(extract_features(network, paths[start : start + EXTRACTED], config.extract_batch))
        for readable, features, failed in extracted:
            for _, reason in failed:
                print(reason)
            if readable:
                yield [by_path[path] for path in readable], features


# --- Captions ---------------------------------------------------------------------------------------------------


decode = tf.function(decode_captions, reduce_retracing=True)


def caption_batch(captioner, images, features, config):
    """Caption images from their features (B, P, F).

    Returns:
      list of B dicts: what `images` holds, with "words" (<end> left out), "caption", "log_probability" (natural) and
      "attention_weights", (words, P).
    """
    words, log_probabilities, attention_weights = decode(
        captioner.encoder,
        captioner.decoder,
        tf.convert_to_tensor(features),
        config.max_words,
        config.beam_width,
        config.length_penalty,
    )
    captions = []
    for image, ids, log_probability, weights in zip(
        images, words.numpy(), log_probabilities.numpy(), attention_weights.numpy(), strict=True
    ):
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


def print_caption(caption):
    print(caption["path"])
    for reference in caption.get("references", []):
        print(f"  real       {reference}")
    print(f"  predicted  {caption['caption']}")


def write_captions(captions, path):
    """Write one JSON line per image: image, image_id, caption, words, log_probability, attention_weights (words, P)."""
    lines = []
    for caption in captions:
        record = {"image": str(caption["path"])}
        record |= {
            name: caption[name] for name in ("image_id", "caption", "words", "log_probability") if name in caption
        }
        record["attention_weights"] = caption["attention_weights"].astype(np.float64).round(6).tolist()
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode())


# --- Scores -----------------------------------------------------------------------------------------------------


def evaluate(captioner, output, config):
    """Caption every validation image greedily and with beams, and print and write the field's metrics of each run."""
    images = validation_images(captioner, config)
    references = {image["image_id"]: image["references"] for image in images}
    texts, metrics = {}, {}
    for width in sorted({*EVALUATED_WIDTHS, config.beam_width}):
        run = "greedy" if width == 1 else f"beam {width}"
        settings = dataclasses.replace(config, beam_width=width)
        batches = cached_batches(images, settings)
        captions = [caption for batch in batches for caption in caption_batch(captioner, *batch, settings)]
        texts[run] = {caption["image_id"]: caption["caption"] for caption in captions}
        metrics[run] = score_captions(texts[run], references)
        if config.dataset == "demo":
            metrics[run]["scenes"] = score_demo(captions, config)
    write_metrics(output, config.coco_split, texts, metrics)
    print(format_table(metrics))
    for run, values in metrics.items():
        for name, share in values.get("scenes", {}).items():
            print(f"{run}, {name}: {share:.1%}")
    print(f"metrics.json and the captions in COCO's results format are in {output}")


def score_demo(captions, config):
    """Shares of what captions of the demo's scenes say that is true, see demo_scenes.score_captions."""
    scenes = demo_scenes.read_scenes(config.coco_dir)
    return demo_scenes.score_captions(
        [caption["caption"] for caption in captions], [scenes[caption["image_id"]] for caption in captions]
    )


# --- Figures ----------------------------------------------------------------------------------------------------


def plot_attention(caption, path):
    """Draw the image, and for each word the image lit where the model looked, as a PNG file, without a display.

    Args:
      caption: dict with "path", "words" and "attention_weights" (words, P).
    """
    with Image.open(caption["path"]) as opened:
        image = upright_rgb(opened, PLOT_SIZE)
    image.thumbnail((PLOT_SIZE, PLOT_SIZE))
    pixels = np.asarray(image, np.float32) / 255  # (height, width, 3)
    panels = [("", pixels)]
    for word, weights in zip(caption["words"], caption["attention_weights"], strict=True):
        light = upsample(weights, image.size)
        panels.append((word, pixels * (0.2 + 0.8 * light[..., np.newaxis])))

    columns = min(len(panels), 4 if image.width > image.height else 6)
    rows = -(-len(panels) // columns)
    width = 2.4
    height = width * image.height / image.width + 0.3
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (word, panel) in zip(axes, panels, strict=False):
        axis.imshow(panel)
        axis.set_title(word, fontsize=12)
    figure.suptitle(caption["caption"] or "(no words)", fontsize=12, wrap=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)


def upsample(weights, size):
    """An attention map as light over an image. (P,), (width, height) -> float (height, width), its peak 1."""
    grid = np.asarray(weights, np.float32).reshape(GRID, GRID)
    smooth = np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)).clip(0)
    return smooth / max(smooth.max(), 1e-12)


if __name__ == "__main__":
    run_script(main)
