"""Caption pictures with the models of this folder, without TensorFlow.

python caption.py photo.jpg more_photos/ [--beam_width 3]
python caption.py photo.jpg --figure attention.png
"""

import argparse
import json
import pathlib
import sys
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FOLDER = pathlib.Path(__file__).resolve().parent
PAD, UNK, START, END = range(4)  # the first words of the vocabulary
BANNED = np.float32(-1e9)  # log-probability of a word that may not be said
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
    if options.beam_width < 1 or options.max_words < 1 or (options.figure and len(paths) != 1):
        parser.error("--beam_width and --max_words are 1 or more, and --figure is for one picture")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    encode, decode = load_model("encoder", settings["format"]), load_model("decoder", settings["format"])
    failed = 0
    for path in paths:
        try:
            pixels = load_image(path, settings["sizes"]["image"])  # (size, size, 3)
        except Exception as error:  # on damaged files Pillow raises errors of many classes
            print(f"{path} cannot be read as an image ({error})", file=sys.stderr)
            failed += 1
            continue
        found, _, attention_weights = beam_search(encode(pixels=pixels[np.newaxis]), decode, options)
        words = [vocabulary[i] for i in found if i not in (PAD, END)]
        print(f"{path}: {' '.join(words)}", flush=True)
        if options.figure:
            draw_attention(path, words, attention_weights, options.figure)
    return 1 if failed else 0


def find_pictures(names):
    """The files that are named, and the picture files in the folders that are named. list of str -> list of paths."""
    paths = []
    for path in map(pathlib.Path, names):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        paths += inside if inside == [path] else [p for p in inside if p.suffix.lower() in Image.registered_extensions()]
    return list(dict.fromkeys(paths))


def load_model(name, runtime):
    """A model of this folder as a function: arrays by name -> dict of arrays by name."""
    if runtime == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx")
        outputs = [output.name for output in session.get_outputs()]
        return lambda **inputs: dict(zip(outputs, session.run(outputs, inputs), strict=True))
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(FOLDER / f"{name}.tflite"), num_threads=2).get_signature_runner()


def load_image(path, size):
    """A picture of any kind, upright, on white, squeezed to a square. -> uint8 (size, size, 3)"""
    with Image.open(path) as image:
        if image.format == "EPS":
            raise OSError("PostScript is a program, and programs in pictures are not run")
        image.draft("RGB", (size, size))  # a large JPEG file is now decoded at 1/2, 1/4 or 1/8 of its size
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def beam_search(encoded, decode, options):
    """The likeliest caption of those that `beam_width` beams (K) keep in view; one beam is greedy decoding.

    Returns:
      words int (L,), with <end>; log_probs float (L,), natural; attention_weights float (L, locations)
    """
    width, hidden = options.beam_width, np.repeat(encoded["hidden"], options.beam_width, 0)  # (K, units)
    picture = {name: encoded[name] for name in ("encoded_features", "keys")}  # (1, locations, ...)
    scores = np.float32([0] + [-1e6] * (width - 1))  # (K,); all beams are alike, so only one begins
    words = np.full((width, 1), START, np.int32)  # (K, t + 1)
    log_probs = np.zeros((width, 0), np.float32)  # (K, t)
    attention_weights = np.zeros((width, 0, picture["keys"].shape[1]), np.float32)  # (K, t, locations)
    for _ in range(options.max_words):
        ended = np.isin(words[:, -1], (END, PAD))  # (K,)
        if ended.all():
            break
        step = decode(words=words[:, -1:], hidden=hidden, **picture)
        next_log_probs = forbid(step["log_probs"].copy(), words, options.repeat_block)  # (K, V)
        next_log_probs[ended] = 0
        candidates = scores[:, np.newaxis] + next_log_probs  # (K, V)
        ranks = candidates.copy()
        ranks[ended] = -np.inf
        ranks[ended, PAD] = 1  # an ended beam goes on with <pad> alone, and keeps its place
        best = np.argsort(-ranks, axis=None, kind="stable")[:width]  # (K,)
        beam, word = np.divmod(best, ranks.shape[1])  # (K,) each
        scores, hidden = candidates.flat[best], step["next_hidden"][beam]
        words = np.concatenate((words[beam], word[:, np.newaxis].astype(np.int32)), 1)
        log_probs = np.concatenate((log_probs[beam], next_log_probs.flat[best][:, np.newaxis]), 1)
        attention_weights = np.concatenate((attention_weights, step["attention_weights"][:, np.newaxis]), 1)[beam]
    ended = np.isin(words[:, -1], (END, PAD))
    lengths = (words[:, 1:] != PAD).sum(1).astype(np.float32)  # (K,)
    ranks = np.where(ended | ~ended.any(), scores / lengths**options.length_penalty, -np.inf)
    best = ranks.argmax()
    length = int(lengths[best])
    return words[best, 1 : 1 + length], log_probs[best, :length], attention_weights[best, :length]


def forbid(log_probs, words, length):
    """Ban words that are never said, and those that would say a sequence of `length` words twice; 0 allows that."""
    log_probs[:, [PAD, UNK, START]] = BANNED
    for row, said in zip(log_probs, words, strict=True):
        for start in range(len(said) - length + 1 if length else 0):
            if (said[start : start + length - 1] == said[len(said) - length + 1 :]).all():
                row[said[start + length - 1]] = BANNED
    return log_probs


def draw_attention(path, words, attention_weights, target):
    """Write a PNG file: the picture, and for each word the picture lit where the model looked."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    image = image.resize((WIDTH, min(max(round(WIDTH * image.height / image.width), 1), 3 * WIDTH)))
    pixels, side = np.asarray(image, np.float32), round(attention_weights.shape[1] ** 0.5)
    rows, height = -(-(len(words) + 1) // COLUMNS), image.height + LINE
    figure = Image.new("RGB", (COLUMNS * WIDTH, rows * height), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(16)
    for number, word in enumerate(["", *words]):
        corner = number % COLUMNS * WIDTH, number // COLUMNS * height
        light = np.ones(image.size[::-1], np.float32)  # (height, width)
        if number:
            grid = np.pad(attention_weights[number - 1].reshape(side, side), 2, "edge")
            light = Image.fromarray(grid).resize(image.size, Image.Resampling.BICUBIC, (2, 2, 2 + side, 2 + side))
            light = np.asarray(light).clip(0) / max(np.max(light), 1e-12)
        panel = Image.fromarray((pixels * (0.2 + 0.8 * light[..., np.newaxis])).astype(np.uint8))
        figure.paste(panel, (corner[0], corner[1] + LINE))
        pen.text((corner[0] + WIDTH / 2, corner[1] + LINE / 2), word, "black", font, anchor="mm")
    figure.save(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
