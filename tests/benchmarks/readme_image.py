"""Draw README's images: a captioned image with attention weights and evidence, one row below the other.

PYTHONPATH=. python tests/benchmarks/readme_image.py OUT.jpg CAPTIONS.jsonl NAME [NAME ...]

CAPTIONS.jsonl is what script 3 leaves, with both maps of each image; NAME is the name of an image's file in it.
"""

import pathlib
import sys

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from captioning.attention.maps import scale_light, upsample
from captioning.features.image_files import open_image, upright_rgb
from captioning.inference.captions_file import read_records, restore_prediction

_WIDTH, _GAP, _LINE, _LETTERS = 120, 4, 26, 15  # pixels: of a panel, between panels, of a line of text, of its letters
_QUALITY = 88  # of the JPEG file


def main(argv):
    out, path, *names = argv
    captions = {pathlib.Path(record.image).name: restore_prediction(record) for record in read_records(path)}
    parts = [_draw_caption(captions[name]) for name in names]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(out, quality=_QUALITY)


def _draw_caption(caption):
    """An image with its words above, lit by attention weights and below that by evidence. -> Pillow image"""
    with open_image(caption.path) as opened:
        image = upright_rgb(opened, _WIDTH)
        image = image.resize((_WIDTH, round(_WIDTH * image.height / image.width)), reducing_gap=2.0)
    column, row = _WIDTH + _GAP, image.height + _LINE
    sheet = Image.new("RGB", (column * (len(caption.words) + 1), _LINE + 2 * row), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", _LETTERS)
    sheet.paste(image, (0, _LINE))
    for position, word in enumerate(caption.words, 1):
        pen.text((position * column + _WIDTH / 2, _LINE / 2), word, "black", font, anchor="mm")
    for number, (name, maps) in enumerate(
        (("attention weights", caption.attention_weights), ("evidence", caption.evidence))
    ):
        top = _LINE + number * row
        pen.text((column, top + image.height + _LINE / 2), name, "black", font, anchor="lm")
        for position, light in enumerate(scale_light(maps), 1):
            lit = np.asarray(image, np.float32) * (0.2 + 0.8 * upsample(light, image.size)[..., np.newaxis])
            sheet.paste(Image.fromarray(lit.astype(np.uint8)), (position * column, top))
    return sheet


if __name__ == "__main__":
    main(sys.argv[1:])
