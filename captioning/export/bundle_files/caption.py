"""Caption images with the models of this folder.

python caption.py photo.jpg more_photos/ [--beam_width 3] [--captions 5 [--sample]] [--figure attention.png]
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import zlib

import numpy as np
from image_reader import MOST_FILE_PIXELS, open_image, upright_rgb
from PIL import Image, ImageDraw, ImageFont, ImageOps

FOLDER = pathlib.Path(__file__).resolve().parent
PAD, UNK, START, END = range(4)  # the first words of the vocabulary
# Of what Pillow reads: kinds of image files, which are looked for in folders
FORMATS = "AVIF BMP DIB GIF HEIF ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()
DRAWS = 5  # captions drawn at most for each one wanted, as none is to come twice
WIDTH, GAP, COLUMNS, LINE = 224, 4, 5, 26  # of a figure: pixels of a column and between two, columns, pixels of text


def main(argv):
    files = FOLDER / "captioner.json", FOLDER / "vocabulary.json"
    settings, vocabulary = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, and folders of them at any depth")
    for name, value in settings["decoding"].items():
        how = {"action": argparse.BooleanOptionalAction} if value is True or value is False else {"type": type(value)}
        parser.add_argument(f"--{name}", default=value, help=f"(default: {value})", **how)
    parser.add_argument("--figure", metavar="PNG", help="draw where the model looked, for one image")
    parser.add_argument("--attention_map", choices=("weights", "evidence"), default="weights", help="what it draws")
    options = parser.parse_args(argv)
    with contextlib.suppress(ImportError):
        __import__("pillow_heif").register_heif_opener()
    Image.MAX_IMAGE_PIXELS = MOST_FILE_PIXELS // 2  # Pillow refuses twice as many
    paths = find_images(options.images)
    least = min(options.beam_width, options.max_words, options.captions, len(paths))
    if least < 1 or (options.figure and len(paths) > 1):
        parser.error("--beam_width, --max_words, --captions are 1 or more; an image is needed, only one with --figure")
    if not (options.temperature > 0 and 0 < options.top_p <= 1 and min(options.seed, options.repeat_block) >= 0):
        parser.error("--temperature is above 0, --top_p above 0 and up to 1, --seed and --repeat_block 0 or more")
    given = [name for name, value in settings["decoding"].items() if getattr(options, name) != value]
    if not options.sample and ("temperature" in given or "top_p" in given):
        parser.error("--temperature and --top_p say how captions are drawn: give --sample too")
    if options.sample and "beam_width" in given and options.beam_width > 1:
        parser.error("--sample draws captions and --beam_width searches for them: give one of the two")
    if not options.sample and options.beam_width < options.captions:
        options.beam_width = options.captions
        print(f"--beam_width is {options.captions}, to find as many captions", file=sys.stderr)
    encode, decode = (load_model(name, settings["format"]) for name in ("encoder", "decoder"))
    failed = 0
    for path in paths:
        try:
            encoded = encode(pixels=read_pixels(path, settings["sizes"]["image"])[np.newaxis])
            find = sample_captions if options.sample else beam_search
            found = [said for said, _ in find(encoded, decode, options, path.name)]
            captions = [[vocabulary[i] for i in said if i != END] for said in found]
            for words in captions:
                print(printable(f"{path}: {join_words(words, settings['characters'])}"), flush=True)
            if len(found) < options.captions:
                print(printable(f"{path}: no more than {len(found)} different captions were found"), file=sys.stderr)
            if options.figure:  # of the first caption
                maps = find_maps(encoded, load_model("evidence", settings["format"]), found[0][: len(captions[0])])
                draw_attention(path, captions[0], maps[options.attention_map]).save(options.figure)
        except Exception as error:  # Pillow raises errors of many classes
            print(printable(f"{path}: {type(error).__name__}: {error}"), file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def find_images(names):
    """The files that are named, and the image files in the folders that are named. list of str -> list of paths"""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = {}
    for name in names:
        paths = [pathlib.Path(name)]
        if os.path.isdir(name):
            walk = os.walk(name, onerror=lambda error: print(printable(str(error)), file=sys.stderr))
            paths = sorted(pathlib.Path(place, file) for place, _, files in walk for file in files)
            # Files that begin with ._ hold what macOS notes beside images.
            paths = [path for path in paths if path.suffix.lower() in known and not path.name.startswith("._")]
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def printable(text):
    """A text that no terminal takes for orders: what cannot be seen is written as Python would, as in \\x1b."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def load_model(name, runtime):
    """A model of this folder, as a function of arrays by name that returns a dict of arrays by name."""
    if runtime == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx")
        outputs = [output.name for output in session.get_outputs()]
        return lambda **inputs: dict(zip(outputs, session.run(outputs, inputs), strict=True))
    from ai_edge_litert.interpreter import Interpreter

    path = FOLDER / ("encoder.tflite" if name == "encoder" else "decoder.tflite")  # the latter has evidence in it
    return Interpreter(str(path), num_threads=min(os.cpu_count(), 4)).get_signature_runner(name)


def read_rgb(path, smallest, shrunk=None):
    """An image of any kind, upright, in sRGB, on white. A large JPEG file comes smaller, which saves time."""
    with open_image(path) as opened:
        image = upright_rgb(opened, smallest, shrunk)
    if "cut" in image.info:
        print(printable(f"{path}: the file lacks its end"), file=sys.stderr)
    return image


def read_pixels(path, side):
    image = read_rgb(path, side, (side, side))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))  # (side, side, 3)


def beam_search(encoded, decode, options, name=""):
    """The likeliest captions that `beam_width` beams (K) keep in view: list of (words (L,), log-probability)."""
    image, width = {name: encoded[name] for name in ("encoded_features", "keys")}, options.beam_width
    hidden = np.repeat(encoded["hidden"], width, 0)  # (K, units)
    scores = np.float32([0] + [-1e6] * (width - 1))  # (K,); all beams are alike, so only one begins
    words, ended = np.full((width, 1), START, np.int32), np.zeros((width, 1), bool)  # (K, t + 1), (K, 1)
    while not ended.all() and words.shape[1] <= options.max_words:
        step = decode(words=words[:, -1:], hidden=hidden, **image)
        for row, said in zip(step["log_probs"], words, strict=True):
            row[find_repeats(said, options.repeat_block)] = -1e9
        candidates = scores[:, np.newaxis] + np.where(ended, np.float32(0), step["log_probs"])  # (K, V)
        ranks = np.where(ended, -np.inf, candidates)  # (K, V)
        ranks[ended[:, 0], PAD] = 1  # an ended beam goes on with <pad> alone, and keeps its place
        best = np.argsort(-ranks, axis=None, kind="stable")[:width]  # (K,)
        beam, word = np.divmod(best.astype(np.int32), ranks.shape[1])  # (K,) each
        scores, hidden, words = candidates.flat[best], step["next_hidden"][beam], np.column_stack((words[beam], word))
        ended = np.isin(words[:, -1:], (END, PAD))  # (K, 1)
    lengths = (words[:, 1:] != PAD).sum(1).astype(np.float32)  # (K,)
    usable = (ended[:, 0] | ~ended.any()) & (scores > -5e5)  # (K,); some beams never began
    best = np.argsort(np.where(usable, -scores / lengths**options.length_penalty, np.inf), kind="stable")
    best = best[: min(options.captions, usable.sum())]
    return [(words[i, 1 : 1 + int(lengths[i])], float(scores[i])) for i in best]


def sample_captions(encoded, decode, options, name):
    """Captions whose words are drawn by their probabilities, none twice: list of (words (L,), log-probability)."""
    image, found = {part: encoded[part] for part in ("encoded_features", "keys")}, {}
    # As script 3 of the project draws them: an image of this name gets the same captions in any folder.
    generator = np.random.default_rng((options.seed, zlib.crc32(os.fsencode(name))))
    for chances in generator.random((DRAWS * options.captions, options.max_words), np.float32):
        hidden, words, score = encoded["hidden"], [START], 0.0
        for chance in chances:
            step = decode(words=np.int32([words[-1:]]), hidden=hidden, **image)
            hidden, log_probs = step["next_hidden"], step["log_probs"][0]
            log_probs[find_repeats(np.int32(words), options.repeat_block)] = -1e9
            words.append(draw_word(log_probs, chance, options.temperature, options.top_p))
            score += float(log_probs[words[-1]])  # of the model, at temperature 1
            if words[-1] == END:
                break
        found.setdefault(tuple(word for word in words[1:] if word != END), (np.int32(words[1:]), score))
        if len(found) == options.captions:
            break
    return list(found.values())


def draw_word(log_probs, chance, temperature, top_p):
    """A word of the nucleus: of the fewest words that together have a probability of top_p. (V,) -> int"""
    probabilities = np.exp((log_probs - log_probs.max()) / np.float32(temperature))  # (V,)
    probabilities /= probabilities.sum()
    falling = -np.sort(-probabilities)  # (V,)
    inside = falling[np.cumsum(falling) - falling < top_p] if top_p < 1 else [0]
    cumulative = np.cumsum(np.where(probabilities >= inside[-1], probabilities, 0))  # (V,)
    threshold = min(chance, np.float32(1 - 2**-23)) * cumulative[-1]
    return int(np.searchsorted(cumulative, threshold, side="right"))


def find_repeats(said, length):
    """The words that would say a sequence of `length` words twice; none for 0. int (T,) -> list of int"""
    starts, last = range(len(said) - length + 1 if length else 0), said[len(said) - length + 1 :]
    return [said[start + length - 1] for start in starts if (said[start : start + length - 1] == last).all()]


def find_maps(encoded, explain, words):
    """Attention weights and evidence, the locations that made the model say a word; each float (L, locations)."""
    weights, evidence = [], []
    for before, said in zip((START, *words), words, strict=False):
        step = explain(words=np.int32([[before]]), said=np.int32([[said]]), **encoded)
        encoded = encoded | {"hidden": step["next_hidden"]}
        weights.append(step["attention_weights"][0])
        evidence.append(step["evidence"][0])
    nothing = [[0.0]]  # a caption may have no words
    return {"weights": np.array(weights or nothing), "evidence": np.array(evidence or nothing)}


def join_words(words, characters):
    """A caption of words, with a blank between two if neither is one of the characters, as those of Chinese are."""
    alone = [re.match(f"[{characters}]", word) is None for word in words]
    blanks = (before and after for before, after in zip([False, *alone], alone, strict=False))
    return "".join(" " * blank + word for blank, word in zip(blanks, words, strict=True))


def find_font(text):
    """Pillow's own font, or where that lacks letters the one that fontconfig finds; says which letters neither has."""
    font = ImageFont.load_default(16)
    if find_missing(font, text):
        codes = " ".join(f"{ord(letter):x}" for letter in sorted(set(text)))
        command = ["fc-match", "-f", "%{file}\n%{index}", f":charset={codes}"]
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):  # there is no fontconfig
            found = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout.split("\n")
            font = ImageFont.truetype(found[0], 16, int(found[1]))  # joins Arabic's letters if Pillow has raqm
    if missing := find_missing(font, text):
        print(f"no font here has these letters, and the figure has boxes for them: {missing}", file=sys.stderr)
    return font


def find_missing(font, text):
    """The letters that a font draws as it draws what is no letter. Joiners have no shape."""
    box = bytes(font.getmask("\U0010fffe"))
    return "".join(each for each in sorted(set(text) - {"\u200c", "\u200d"}) if bytes(font.getmask(each)) == box)


def draw_attention(path, words, maps):
    """The image, and for each word the image lit where its map is high, as a Pillow image."""
    image = ImageOps.contain(read_rgb(path, WIDTH), (WIDTH - GAP, 3 * WIDTH))
    pixels, side, height = np.asarray(image, np.float32), round(maps.shape[1] ** 0.5), image.height + LINE + GAP
    figure = Image.new("RGB", (COLUMNS * WIDTH, (len(words) // COLUMNS + 1) * height), "white")
    pen, font = ImageDraw.Draw(figure), find_font("".join(words))
    figure.paste(image, (0, LINE))
    scaled = ((maps - maps.min()) / max(np.ptp(maps), 1e-12)) ** 0.5  # all words together, faint ones lifted
    for number, (word, light) in enumerate(zip(words, scaled, strict=False), 1):
        left, top = number % COLUMNS * WIDTH, number // COLUMNS * height
        grid = Image.fromarray(light.reshape(side, side))
        smooth = np.asarray(grid.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)  # (height, width)
        lit = pixels * (0.2 + 0.8 * smooth[..., np.newaxis])  # (height, width, 3)
        figure.paste(Image.fromarray(lit.astype(np.uint8)), (left, top + LINE))
        pen.text((left + WIDTH / 2, top + LINE / 2), word, "black", font, anchor="mm")
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
