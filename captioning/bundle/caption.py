"""Caption pictures with the models of this folder, without TensorFlow.

python caption.py photo.jpg more_photos/ [--beam_width 3]
python caption.py photo.jpg --figure attention.png
"""

import argparse
import json
import os
import pathlib
import sys
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FOLDER = pathlib.Path(__file__).resolve().parent
PAD, UNK, START, END = range(4)  # the first words of the vocabulary
BANNED = -1e9  # log-probability of a word that may not be said
WIDTH, COLUMNS, LINE = 224, 5, 26  # of a figure: pixels of a panel, panels in a row, pixels of a line of text


def main(argv):
    settings = json.loads((FOLDER / "captioner.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", help="picture files, and folders of them at any depth")
    for name, value in settings["decoding"].items():
        parser.add_argument(f"--{name}", type=type(value), default=value, metavar=str(value))
    parser.add_argument("--figure", metavar="PNG", help="draw where the model looked, for one picture")
    options = parser.parse_args(argv)
    paths = find_pictures(options.pictures)
    if options.beam_width < 1 or options.max_words < 1 or not paths or (options.figure and len(paths) > 1):
        parser.error("--beam_width and --max_words are 1 or more, there is a picture, and just one with --figure")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    encode, decode = (load_model(name, settings["format"]) for name in ("encoder", "decoder"))
    failed = 0
    for path in paths:
        try:
            encoded = encode(pixels=load_image(path, settings["sizes"]["image"])[np.newaxis])
            found, _, attention_weights = beam_search(encoded, decode, options)
            words = [vocabulary[i] for i in found if i != END]
            print(f"{path}: {' '.join(words)}", flush=True)
            if options.figure:
                draw_attention(path, words, attention_weights, options.figure)
        except Exception as error:  # Pillow raises errors of many classes
            print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def find_pictures(names):
    """The files that are named, and the picture files in the folders that are named. list of str -> list of paths"""
    paths = []
    for path in map(pathlib.Path, names):
        if path.is_dir():
            paths += sorted(p for p in path.rglob("*") if p.suffix.lower() in Image.registered_extensions())
        else:
            paths.append(path)
    return list(dict.fromkeys(paths))


def load_model(name, runtime):
    """A model of this folder, as a function of arrays by name that returns a dict of arrays by name."""
    if runtime == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx")
        outputs = [output.name for output in session.get_outputs()]
        return lambda **inputs: dict(zip(outputs, session.run(outputs, inputs), strict=True))
    from ai_edge_litert.interpreter import Interpreter

    threads = min(os.cpu_count() or 1, 4)
    return Interpreter(str(FOLDER / f"{name}.tflite"), num_threads=threads).get_signature_runner()


def load_image(path, size):
    """A picture squeezed to a square. -> uint8 (size, size, 3)"""
    return np.asarray(open_upright(path, size).resize((size, size), Image.Resampling.BILINEAR))


def open_upright(path, smallest):
    """A picture of any kind, upright, in RGB, on white. Large JPEG files come smaller, which saves time."""
    with Image.open(path) as image:
        if image.format == "EPS":
            raise OSError("PostScript is a program, and programs in pictures are not run")
        image.draft("RGB", (smallest, smallest))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def beam_search(encoded, decode, options):
    """The likeliest caption of those that `beam_width` beams (K) keep in view; one beam is greedy decoding.

    Returns words int (L,), with <end>; their log-probability, natural; attention_weights float (L, locations).
    """
    width, hidden = options.beam_width, np.repeat(encoded["hidden"], options.beam_width, 0)  # (K, units)
    picture = {name: encoded[name] for name in ("encoded_features", "keys")}  # (1, locations, ...)
    scores = np.float32([0] + [-1e6] * (width - 1))  # (K,); all beams are alike, so only one begins
    words = np.full((width, 1), START, np.int32)  # (K, t + 1)
    attention_weights = np.zeros((width, 0, picture["keys"].shape[1]), np.float32)  # (K, t, locations)
    ended = np.zeros(width, bool)  # (K,)
    while not ended.all() and words.shape[1] <= options.max_words:
        step = decode(words=words[:, -1:], hidden=hidden, **picture)
        log_probs = forbid(step["log_probs"], words, options.repeat_block)  # (K, V)
        candidates = scores[:, np.newaxis] + np.where(ended[:, np.newaxis], np.float32(0), log_probs)  # (K, V)
        ranks = np.where(ended[:, np.newaxis], -np.inf, candidates)
        ranks[ended, PAD] = 1  # an ended beam goes on with <pad> alone, and keeps its place
        best = np.argsort(-ranks, axis=None, kind="stable")[:width]  # (K,)
        beam, word = np.divmod(best.astype(np.int32), ranks.shape[1])  # (K,) each
        scores, hidden = candidates.flat[best], step["next_hidden"][beam]
        words = np.concatenate((words[beam], word[:, np.newaxis]), 1)
        attention_weights = np.concatenate((attention_weights, step["attention_weights"][:, np.newaxis]), 1)[beam]
        ended = np.isin(word, (END, PAD))
    lengths = (words[:, 1:] != PAD).sum(1).astype(np.float32)  # (K,)
    ranks = np.where(ended | ~ended.any(), scores / lengths**options.length_penalty, -np.inf)  # (K,)
    best = ranks.argmax()
    length = int(lengths[best])
    return words[best, 1 : 1 + length], float(scores[best]), attention_weights[best, :length]


def forbid(log_probs, words, length):
    """Ban the words that are never said, and those that would say a sequence of `length` words twice (0 allows it)."""
    log_probs[:, [PAD, UNK, START]] = BANNED
    for row, said in zip(log_probs, words, strict=True):
        for start in range(len(said) - length + 1 if length else 0):
            if (said[start : start + length - 1] == said[len(said) - length + 1 :]).all():
                row[said[start + length - 1]] = BANNED
    return log_probs


def draw_attention(path, words, attention_weights, target):
    """Write a PNG file: the picture, and for each word the picture lit where the model looked."""
    image = open_upright(path, WIDTH)
    image = image.resize((WIDTH, min(max(round(WIDTH * image.height / image.width), 1), 3 * WIDTH)))
    pixels, side = np.asarray(image, np.float32), round(attention_weights.shape[1] ** 0.5)
    rows, height = -(-(len(words) + 1) // COLUMNS), image.height + LINE
    figure = Image.new("RGB", (COLUMNS * WIDTH, rows * height), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(16)
    for number, word in enumerate(["", *words]):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * height
        light = np.ones(pixels.shape[:2], np.float32)  # (height, width)
        if number:
            grid = np.pad(attention_weights[number - 1].reshape(side, side), 2, "edge")
            grid = Image.fromarray(grid).resize(image.size, Image.Resampling.BICUBIC, (2, 2, 2 + side, 2 + side))
            light = np.asarray(grid).clip(0) / max(np.max(grid), 1e-12)
        lit = pixels * (0.2 + 0.8 * light[..., np.newaxis])  # (height, width, 3)
        figure.paste(Image.fromarray(lit.astype(np.uint8)), (left, top + LINE))
        pen.text((left + WIDTH / 2, top + LINE / 2), word, "black", font, anchor="mm")
    figure.save(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
