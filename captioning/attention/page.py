"""The page of attention: an HTML file that lights each image where the model looked for each word of its caption.

Its reader switches between two maps of each word: attention weights and evidence.

The file needs nothing but a browser. Images, attention, style and script are all inside, and its Content Security
Policy lets the browser fetch nothing and run no other script. Many images become several files that link each other.
"""

import base64
import contextlib
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import pathlib
import re
import string
import urllib.parse
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from captioning.attention.maps import peak_over_mean, scale_light
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.features.image_reader import open_image, upright_rgb, upright_size
from captioning.words import is_character, parted
from support.files import replacing

PAGE_FILES = pathlib.Path(__file__).parent / "page_files"
_MARK = '<meta name="generator" content="attention page">'  # tells our own pages from other files of such a name
_HEAD_BYTES = 1000  # of a file, in which _MARK is to be found

_PAGE_BYTES = 15_000_000  # a page of `page_size` images stays below this, whatever the images are
_END_BYTES = 50_000  # kept free for the script and the links between pages
_LONGEST_SIDE = 720  # pixels of an embedded image
_SHORTEST_SIDE = 64  # pixels, below which an image is not shrunk further to save bytes
_JPEG_QUALITIES = (88, 78, 66, 54, 42)  # tried in turn until the image is small enough

_SHADES = 10  # steps from the faintest word to the darkest
_FAINTEST = 0.01  # probability at and below which a word is shown in the faintest shade
_NEIGHBOURS = 2  # pages on each side of this one that are linked by number, besides the first and the last

# Characters that cannot be seen or not be written, and those that turn the direction of the text around them
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@dataclasses.dataclass(frozen=True)
class PageCaption:
    """One caption below an image.

    Attributes:
      generated: the caption, its words' log-probabilities and attention weights.
      label: tells the image's captions apart, for example "greedy" or "epoch 3". "" where there is only one.
      note: shown beside the label, for example "CIDEr 0.83".
      boxes: for a word's position in the caption, the boxes of what the word names: list of [x, y, width, height] in
        pixels of the upright image, x and y of the upper left corner.
    """

    generated: GeneratedCaption
    label: str = ""
    note: str = ""
    boxes: Mapping[int, Sequence[Sequence[float]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PageImage:
    """An image of the page.

    Attributes:
      heading: shown above the image; the file's name, as a rule.
      path: path of the image file.
      captions: captions, shown side by side.
      note: shown beside the heading.
      is_list: bool, whether the captions are shown as a list instead, the first one large. Their labels are then for
        screen readers alone.
    """

    heading: str
    path: pathlib.Path
    captions: Sequence[PageCaption]
    note: str = ""
    is_list: bool = False


def write_pages(folder, title, images, table=(), page_size=100, file_name="index.html", intro=""):
    """Write the images to one page, or to several that link each other.

    The pages appear together when all are written. Further pages that an earlier call left are removed.

    Args:
      folder: path of the folder; made where it is missing.
      title: str, the pages' heading.
      images: iterable of PageImage. No more than `page_size` of them are held in memory.
      table: list of rows, the first one the column names, shown on the first page; empty for none.
      page_size: int, images per page.
      file_name: str, name of the first page. Those of the others are made from it: index_2.html, index_3.html, ...
      intro: str, a paragraph below the heading.

    Returns:
      list of pathlib.Path of the pages.

    Raises:
      UserError: a page cannot be written.
    """
    first = pathlib.Path(folder, file_name)
    images = iter(images)
    paths, temporaries = [], []
    with contextlib.ExitStack() as stack:  # the first page is renamed last: it never links to one that is not there
        more = True
        while more:
            on_page = list(itertools.islice(images, page_size))
            more = len(on_page) == page_size
            if not on_page and paths:
                break
            paths.append(_page_path(first, len(paths) + 1))
            temporaries.append(stack.enter_context(replacing(paths[-1])))
            header = (title, intro, table) if len(paths) == 1 else (f"{title}, page {len(paths)}", "", ())
            _write_page(temporaries[-1], on_page, header, page_size)
        for number, temporary in enumerate(temporaries, 1):  # only now is it known how many there are
            with temporary.open("a", encoding="utf-8", newline="\n") as file:
                file.write(_page_end(first, number, len(temporaries)))
    remove_further_pages(first, len(paths))
    return paths


# --- Pages --------------------------------------------------------------------------------------------------------


def _page_path(first, number):
    """The path of a page, from that of the first one and the page's number, which starts at 1."""
    return first if number == 1 else first.with_name(f"{first.stem}_{number}{first.suffix}")


def remove_further_pages(first, count):
    """Delete the pages with numbers above `count`. Files that are no page of ours stay."""
    numbered = re.compile(f"{re.escape(first.stem)}_([1-9][0-9]*){re.escape(first.suffix)}")
    for path in first.parent.iterdir():
        match = numbered.fullmatch(path.name)
        if match and int(match[1]) > max(count, 1) and is_page(path):
            with contextlib.suppress(OSError):
                path.unlink()


def is_page(path):
    try:
        with path.open("rb") as file:
            return _MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _write_page(path, images, header, page_size):
    """Write a page without its end, see `_page_end`, so that `page_size` images fit in `_PAGE_BYTES`.

    header: (title, introduction, table).
    """
    start = _page_start(*header)
    max_bytes = (_PAGE_BYTES - _END_BYTES - len(start.encode())) // page_size  # for an image
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(start)
        if not images:
            file.write("<p>No images.</p>\n")
        for number, image in enumerate(images, 1):
            file.write(_image_html(image, number, max_bytes))


def read_page_file(name):
    return (PAGE_FILES / name).read_text(encoding="utf-8")


def _page_script():
    return read_page_file("light.js") + read_page_file("page.js")


def _page_start(title, intro, table):
    """The page's text before its first image."""
    introduction = f"<p>{_to_html(intro)}</p>\n" if intro else ""
    introduction += _table_html(table) if table else ""
    style = read_page_file("page.css")
    return string.Template(read_page_file("page.html").split("$images")[0]).substitute(
        policy=_content_policy(style, _page_script()),
        mark=_MARK,
        title=_to_html(title),
        style=style,
        introduction=introduction,
        guide=read_page_file("guide.html"),
        controls=read_page_file("controls.html"),
    )


def _page_end(first, number, count):
    """The page's text after its last image: the links to the other pages, and the script."""
    end = string.Template(read_page_file("page.html").split("$images")[1])
    return end.substitute(pages=_navigation_html(first, number, count), script=_page_script())


def _content_policy(style, script):
    """The Content Security Policy: only this very style and this very script, images only from inside the file."""
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()  # noqa: E731
    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _navigation_html(first, number, count):
    """Links to the previous page, to the next one, and to others by their numbers."""
    if count == 1:
        return ""
    near = range(number - _NEIGHBOURS, number + _NEIGHBOURS + 1)
    items = [_page_link(first, number - 1, "Previous")] if number > 1 else []
    last = 0
    for other in sorted({1, count, *(page for page in near if 1 <= page <= count)}):
        if other > last + 1:
            items.append("<span>…</span>")
        items.append(
            f'<span aria-current="page">{other}</span>' if other == number else _page_link(first, other, other)
        )
        last = other
    if number < count:
        items.append(_page_link(first, number + 1, "Next"))
    return '<nav aria-label="Pages"><ol>' + "".join(f"<li>{item}</li>" for item in items) + "</ol></nav>"


def _page_link(first, number, text):
    address = urllib.parse.quote(_page_path(first, number).name, errors="surrogateescape")
    return f'<a href="./{address}">{text}</a>'


def _table_html(rows):
    """A table, whose first row names the columns, and whose first column names the rows."""
    names, *body = [[_to_html(cell) for cell in row] for row in rows]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in names)
    lines = [f"<thead><tr>{head}</tr></thead>\n<tbody>"]
    for name, *cells in body:
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    table = "\n".join(lines)
    return f'<div class="table" role="region" aria-label="Table" tabindex="0"><table>{table}</tbody></table></div>\n'


# --- An image ----------------------------------------------------------------------------------------------------


def _image_html(image, number, max_bytes):
    """An image with its captions, as HTML of at most `max_bytes` if that is possible."""
    one, of_several, of_list = ("div", "div", ""), ("div", "div", " several"), ("ol", "li", " list")
    outer, inner, kind = one if len(image.captions) == 1 else of_list if image.is_list else of_several
    embedded, size, problem = _read_image(image.path)
    captions = "".join(f"<{inner}>{_caption_html(caption, size)}</{inner}>" for caption in image.captions)
    before = f'<article aria-labelledby="image-{number}">\n<h2 id="image-{number}">'
    before += f"<bdi>{_to_html(image.heading)}</bdi>{_note_html(image.note)}</h2>\n"
    after = f'\n<p class="status"></p>\n<{outer} class="captions{kind}">{captions}</{outer}>\n'
    after += _references_html(image.captions) + "</article>\n"
    if embedded is None:
        frame = f'<div class="frame"><p>The image cannot be shown: {_to_html(problem)}</p></div>'
    else:
        frame = _frame_html(embedded, _alt_text(image.captions), max_bytes - len((before + after).encode()))
    return before + frame + after


def _read_image(path):
    """An image file, scaled down to what the page shows.

    Returns:
      (Pillow image, (width, height) of the upright file in pixels, "") or, where the file cannot be read,
      (None, None, str why)
    """
    try:
        with open_image(path) as opened:
            size = upright_size(opened)
            image = upright_rgb(opened, _LONGEST_SIDE)
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
            return image, size, ""
    except FileNotFoundError:
        return None, None, "the file is gone"
    except Exception as error:  # Pillow's decoders raise errors of many classes on damaged files
        return None, None, f"{type(error).__name__}: {error}"


def _frame_html(image, description, max_bytes):
    """An image as HTML of at most `max_bytes`, if that is possible."""
    before = '<div class="frame"><img src="data:image/jpeg;base64,'
    after = f'" alt="{_to_html(description)}" width="{image.width}" height="{image.height}" decoding="async"></div>'
    most = (max_bytes - len((before + after).encode())) * 3 // 4  # base64 makes four bytes of three
    return before + base64.b64encode(_encode_jpeg(image, most)).decode() + after


def _encode_jpeg(image, most):
    """An image as JPEG of at most `most` bytes, if that is possible: first its quality goes down, then its size.

    Of the file only the pixels are in the result. So the page does not tell where a photograph was taken.
    """
    image.info.clear()
    while True:
        for quality in _JPEG_QUALITIES:
            data = io.BytesIO()
            image.save(data, "JPEG", quality=quality)
            if data.tell() <= most:
                return data.getvalue()
        if max(image.size) <= _SHORTEST_SIDE:
            return data.getvalue()
        image = image.resize([max(side * 3 // 4, 1) for side in image.size], Image.Resampling.LANCZOS)


def _alt_text(captions):
    """What a screen reader says in place of an image."""
    return "; ".join(f"{c.label}: {c.generated.caption}" if c.label else c.generated.caption for c in captions)


def _note_html(note):
    return f'<span class="note">{_to_html(note)}</span>' if note else ""


def _references_html(captions):
    references = next((c.generated.references for c in captions if c.generated.references), ())
    if not references:
        return ""
    lines = "".join(f'<li dir="auto">{_to_html(reference)}</li>' for reference in references)
    return f'<div class="references"><h3>References</h3><ul>{lines}</ul></div>\n'


def _caption_html(caption, size):
    """A caption as one button per word.

    Args:
      size: (width, height) of the upright image in pixels, which its boxes refer to. None if it cannot be read.
    """
    about = f"<b>{_to_html(caption.label)}</b>" if caption.label else ""
    about += _note_html(caption.note)
    name = f" ({caption.label})" if caption.label else ""
    blanks = parted(caption.generated.words)
    words = "".join("\n" * blank + _word_html(caption, position, size) for position, blank in enumerate(blanks))
    if words:
        body = f'<button type="button" class="play" aria-pressed="false" aria-label="Play{_to_html(name)}"></button>'
        body += f'<div role="toolbar" aria-label="Words{_to_html(name)}">{words}</div>'
    else:
        body = "<div>(no words)</div>"
    about = f'<div class="about">{about}</div>' if about else ""
    return f'{about}<div class="caption" dir="auto">{body}</div>'


def _word_html(caption, position, size):
    """A word as a button. Its attributes hold what the page's script needs.

    data-weights, data-evidence and their peaks: see `_map_attributes`; no evidence where it is not known.
    data-joined: there where the word is a character that has no blanks beside it.
    data-boxes: JSON of boxes [x, y, width, height] in shares of the image's width and height.
    data-sure: see `_shade`.
    """
    generated = caption.generated
    word = _to_html(generated.words[position])
    data = _map_attributes("weights", generated.attention_weights, position)
    if generated.evidence is not None:
        data += " " + _map_attributes("evidence", generated.evidence, position)
    data += " data-joined" * is_character(generated.words[position])
    boxes = _relative_boxes(caption.boxes.get(position, ()), size)
    if boxes:
        data += f' data-boxes="{json.dumps(boxes)}"'
    title = word
    log_prob = float(generated.log_probs[position]) if position < len(generated.log_probs) else math.nan
    if not math.isnan(log_prob):
        probability = math.exp(min(log_prob, 0.0))
        title += f": probability {probability:.2f}" if probability >= 0.005 else ": probability under 0.01"
        data += f' data-sure="{_shade(probability)}"'
    return f'<button type="button" class="word" {data} title="{title}" aria-label="{title}">{word}</button>'


def _map_attributes(name, maps, position):
    """A word's map as attributes of its button.

    data-<name>: the word's light, a byte each, in base64. 0 is the least of the caption's maps, 255 the most.
    data-<name>-peak: the largest value of the word's map over its mean.
    """
    maps = np.nan_to_num(np.asarray(maps, np.float64)).clip(0)  # (words, P)
    levels = np.rint(scale_light(maps)[position] * 255).astype(np.uint8)  # (P,)
    data = f'data-{name}="{base64.b64encode(levels.tobytes()).decode()}"'
    return data + (f' data-{name}-peak="{peak_over_mean(maps[position]):.1f}"' if maps[position].any() else "")


def _shade(probability):
    """How dark a word is: 0 (_FAINTEST or less likely) to _SHADES (certain), in even steps of the logarithm."""
    share = 1 - math.log(max(probability, _FAINTEST)) / math.log(_FAINTEST)
    return round(_SHADES * share)


def _relative_boxes(boxes, size):
    """Boxes in shares of the image's width and height, cut off at its edges."""
    if size is None:
        return []
    width, height = size
    shares = []
    for x, y, w, h in (box for box in boxes if all(map(math.isfinite, box))):
        left, right = (min(max(edge / width, 0.0), 1.0) for edge in (x, x + w))
        top, bottom = (min(max(edge / height, 0.0), 1.0) for edge in (y, y + h))
        shares.append([round(share, 4) for share in (left, top, right - left, bottom - top)])
    return shares


# --- Text ---------------------------------------------------------------------------------------------------------


def _to_html(text):
    """Any text as HTML in which it shows as it is. What cannot be seen is written as Python would, as in \\u2028."""
    return html.escape(_INVISIBLE.sub(_escape_character, str(text)))


def _escape_character(match):
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8; see os.fsdecode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
