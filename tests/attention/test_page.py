"""The page of attention: what is in the file, and what a real browser makes of it."""

import base64
import contextlib
import dataclasses
import hashlib
import html.parser
import io
import itertools
import json
import os
import pathlib
import re
import weakref

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFilter

from browser import emulate, find, hover, press, requested, settle, touch, wait_for
from captioning.attention import page as attention_page
from captioning.attention.maps import upsample
from captioning.attention.page import PageCaption, PageImage, write_pages
from captioning.decoder.generated_caption import GeneratedCaption

DOG = "a dog catches a frisbee".split()
HOSTILE = [
    "<img src=x onerror=alert(1)>.jpg",
    "</script><script>alert(1)</script>",
    "line\u2028end",
    "<!--",
    "\"'onclick=alert(1)//&amp;",
    "\u202egpj.exe",
    "a\x00b",
    "</style>",
]


# --- Pages to test with ---------------------------------------------------------------------------------------------


def write_photograph(path, size=(320, 240), noise=8, seed=0):
    """Soft blobs of colour, with noise."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(60, 256, (*size[::-1], 3), np.uint8)).filter(ImageFilter.GaussianBlur(12))
    pixels = np.asarray(soft, np.float32) * 1.2 + rng.normal(0, noise, (*size[::-1], 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def look_at(*places):
    """Attention weights (words, 64), each word's around one (row, column)."""
    rows, columns = np.mgrid[0:8, 0:8]
    maps = [np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2) + 0.01 for row, column in places]
    return np.stack([attention.ravel() / attention.sum() for attention in maps])  # (words, 64)


def make_caption(words, log_probs=None, path="dog.png", **rest):
    places = [(i % 8, 2 * i % 8) for i in range(len(words))]
    log_probs = np.log(np.linspace(0.9, 0.2, len(words) + 1)) if log_probs is None else log_probs
    maps = [look_at(*seen) if words else np.zeros((0, 64)) for seen in (places, [place[::-1] for place in places])]
    rest = {"evidence": maps[1], **rest}
    return GeneratedCaption(pathlib.Path(path), str(path), words, log_probs, maps[0], **rest)


def make_image(path, words=DOG, **rest):
    return PageImage(path.name, path, [PageCaption(make_caption(words))], **rest)


class Page(html.parser.HTMLParser):
    """What a browser would make of the file: elements with their attributes, and text by element."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    def inside(self, tag):
        return "".join(data for name, data in self.text if name == tag)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    return write_photograph(tmp_path_factory.mktemp("images") / "dog.png")


# --- The file -------------------------------------------------------------------------------------------------------


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(tmp_path, photograph):
    page = Page(write_pages(tmp_path, "Dogs", [make_image(photograph)])[0])
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for rule, tag in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(page.inside(tag).encode()).digest()).decode()
        assert rules.pop(rule) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert [len(page.all(tag)) for tag in ("style", "script", "iframe", "object")] == [1, 1, 0, 0]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not re.search(r"https?:|\burl\(|@import", page.inside("style") + page.inside("script"))
    assert not page.open  # every element was closed


def test_templates_cannot_end_early():
    assert "</" not in attention_page.read_page_file("light.js") + attention_page.read_page_file("page.js")
    assert "<" not in attention_page.read_page_file("page.css")


def test_dots_are_written_as_safari_takes_them():
    """It ignores `text-decoration: underline dotted ...`, and words would show nothing of how sure the model was."""
    css = attention_page.read_page_file("page.css")
    assert set(re.findall(r"text-decoration: *([^;]*);", css)) <= {"none", "underline"}
    assert "text-decoration-style: dotted" in css and "text-decoration-color: color-mix" in css


def listed(path, *texts):
    """A PageImage with a list of captions, each of which looks elsewhere for its words."""
    captions = []
    for number, words in enumerate(texts):
        caption = make_caption(words)
        weights = np.roll(caption.attention_weights, 5 * number, axis=1)
        caption = dataclasses.replace(caption, attention_weights=weights)
        captions.append(PageCaption(caption, str(number + 1), f"-{number}.25"))
    return PageImage(path.name, path, captions, is_list=True)


def test_several_captions_may_be_a_list_with_the_maps_of_each(tmp_path, photograph):
    page = Page(write_pages(tmp_path, "Dogs", [listed(photograph, DOG, ["two", "dogs"], ["a", "cat"])])[0])
    assert [len(page.all("ol", **{"class": "captions list"})), len(page.all("li"))] == [1, 3]
    assert [found["aria-label"] for found in page.all("div", role="toolbar")] == [f"Words ({n})" for n in (1, 2, 3)]
    words = page.all("button", **{"class": "word"})
    assert len(words) == len(DOG) + 4
    first, _, *others = (words[i]["data-weights"] for i in (0, 1, len(DOG), len(DOG) + 2))
    assert len({first, *others}) == 3
    assert page.inside("span").count(".25") == 3
    one = Page(write_pages(tmp_path / "one", "Dogs", [listed(photograph, DOG)])[0])
    assert not one.all("ol") and len(one.all("div", **{"class": "captions"})) == 1


def test_names_and_words_are_text(tmp_path, photograph):
    name = os.fsdecode(b"caf\xe9 ") + HOSTILE[0]
    caption = make_caption(HOSTILE, references=HOSTILE)
    image = PageImage(name, photograph, [PageCaption(caption, HOSTILE[1], HOSTILE[0])], HOSTILE[1])
    plain = write_pages(
        tmp_path, "Dogs", [make_image(photograph, DOG, note="n")], [[["a", "b"], ["c", "d"]]], intro="i"
    )[0]
    expected = {tag for tag, _ in Page(plain).elements} | {"b", "bdi", "h3", "ul", "li"}
    path = write_pages(tmp_path, HOSTILE[0], [image], [[HOSTILE, HOSTILE]], intro=HOSTILE[1])[0]
    page = Page(path)
    assert {tag for tag, _ in page.elements} == expected
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [len(page.all(tag)) for tag in ("img", "script")] == [1, 1]
    shown = [HOSTILE[0], HOSTILE[1], "line\\u2028end", "<!--", HOSTILE[4], "\\u202egpj.exe", "a\\x00b", "</style>"]
    assert [word["title"].rsplit(": ", 1)[0] for word in page.all("button", **{"class": "word"})] == shown
    assert [text for tag, text in page.text if tag == "button"] == shown
    assert ("bdi", "caf\\xe9 " + HOSTILE[0]) in page.text
    assert ("title", HOSTILE[0]) in page.text


def test_any_lone_surrogate_can_be_written(tmp_path, photograph):
    path = write_pages(tmp_path, "\ud800", [make_image(photograph, ["\udfff", "\udc80"])])[0]
    assert "\\ud800" in path.read_text(encoding="utf-8")


def test_words_carry_attention_and_probability(tmp_path, photograph):
    caption = make_caption(DOG, np.log([1.0, 0.43, 0.1, 0.001, 0.5, 0.9]))
    page = Page(write_pages(tmp_path, "Dogs", [PageImage("dog", photograph, [PageCaption(caption)])])[0])
    words = page.all("button", **{"class": "word"})
    assert [word["data-sure"] for word in words] == ["10", "8", "5", "0", "8"]
    probabilities = ["1.00", "0.43", "0.10", "under 0.01", "0.50"]
    assert [word["title"] for word in words] == [
        f"{word}: probability {probability}" for word, probability in zip(DOG, probabilities, strict=True)
    ]
    assert all(word["title"] == word["aria-label"] for word in words)
    for name, maps in (("weights", caption.attention_weights), ("evidence", caption.evidence)):
        least, most = maps.min(), maps.max()  # of the whole caption
        for word, weights in zip(words, maps, strict=True):
            levels = np.frombuffer(base64.b64decode(word[f"data-{name}"]), np.uint8)
            np.testing.assert_allclose(levels / 255, np.sqrt((weights - least) / (most - least)), atol=0.003)
            assert float(word[f"data-{name}-peak"]) == pytest.approx(64 * weights.max(), abs=0.05)
    assert page.all("img")[0]["alt"] == "a dog catches a frisbee"


def test_captions_are_written_as_their_script_is(tmp_path, photograph):
    path = write_pages(tmp_path, "Dogs", [make_image(photograph, ["一", "狗", "and", "a", "dog"])])[0]
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert re.findall(r"</button>(\s*)<button[^>]*class=.word", text) == ["", "", "\n", "\n"]
    assert ["data-joined" in word for word in page.all("button", **{"class": "word"})] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert page.all("img")[0]["alt"] == "一狗and a dog"
    assert [box["dir"] for box in page.all("div", **{"class": "caption"})] == ["auto"]


@pytest.mark.parametrize("log_probs", [[], [np.nan] * 5, [-np.inf] * 5, [0.1] * 5])
def test_odd_numbers_do_no_harm(tmp_path, photograph, log_probs):
    weights = np.array([np.zeros(64), np.full(64, np.nan), np.full(64, -1.0), np.full(64, 1 / 64), np.eye(64)[3]])
    caption = GeneratedCaption(photograph, "dog", DOG, np.array(log_probs), weights)
    boxes = {0: [[np.nan, 0, 1, 1]], 1: [[-50, 0, 1000, 60]]}
    page = Page(write_pages(tmp_path, "Dogs", [PageImage("dog", photograph, [PageCaption(caption, boxes=boxes)])])[0])
    words = page.all("button", **{"class": "word"})
    assert [word.get("data-weights-peak") for word in words] == [None, None, None, "1.0", "64.0"]
    assert not any("data-evidence" in word for word in words)  # it is not known
    assert "data-boxes" not in words[0]
    assert json.loads(words[1]["data-boxes"]) == [[0, 0, 1, 0.25]]


def test_an_image_without_captions_and_a_caption_without_words(tmp_path, photograph):
    images = [PageImage("dog", photograph, []), make_image(photograph, [])]
    assert "(no words)" in write_pages(tmp_path, "Dogs", images)[0].read_text(encoding="utf-8")
    assert "No images." in write_pages(tmp_path, "Dogs", [])[0].read_text(encoding="utf-8")


def test_an_image_that_cannot_be_read_keeps_its_caption(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<b>no image")
    page = Page(write_pages(tmp_path, "Dogs", [make_image(broken), make_image(tmp_path / "gone.jpg")])[0])
    assert not page.all("img")
    assert len(page.all("button", **{"class": "word"})) == 10
    assert "the file is gone" in page.inside("p")
    assert "UnidentifiedImageError" in page.inside("p")


def test_images_are_upright_small_and_without_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    exif.get_ifd(0x8825)[1] = "N"  # where it was taken
    Image.new("RGB", (4000, 1000), "red").save(tmp_path / "phone.jpg", exif=exif)
    caption = PageCaption(make_caption(DOG), boxes={1: [[100, 1000, 500, 2000]]})
    page = Page(write_pages(tmp_path, "Dogs", [PageImage("dog", tmp_path / "phone.jpg", [caption])])[0])
    (image,) = page.all("img")
    embedded = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
    assert embedded.size == (180, 720) == (int(image["width"]), int(image["height"]))
    assert not embedded.getexif()
    assert json.loads(page.all("button", **{"class": "word"})[1]["data-boxes"]) == [[0.1, 0.25, 0.5, 0.5]]


@pytest.mark.parametrize("page_size", [1, 100, 10_000])
def test_the_worst_images_fit_their_share_of_a_page(tmp_path, page_size):
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    start = len(attention_page._page_start("Dogs", "", ()).encode())
    caption = PageCaption(make_caption(DOG * 4 if page_size <= 100 else []))
    image = PageImage("dog", tmp_path / "noise.png", [caption])
    size = write_pages(tmp_path, "Dogs", [image], page_size=page_size)[0].stat().st_size
    assert (
        size - start - attention_page._END_BYTES <= (15_000_000 - start - attention_page._END_BYTES) / page_size + 3000
    )


def test_pages_link_each_other_and_old_ones_go(tmp_path, photograph):
    (tmp_path / "index_9.html").write_text("somebody else's")
    made = []

    def images(count):
        for _ in range(count):
            image = make_image(photograph)
            made.append(weakref.ref(image))
            assert sum(reference() is not None for reference in made) <= 4  # a page's two, and the two to come
            yield image
            del image

    paths = write_pages(tmp_path, "Dogs", images(5), [["", "CIDEr"], ["greedy", "0.4"]], page_size=2)
    assert [path.name for path in paths] == ["index.html", "index_2.html", "index_3.html"]
    pages = [Page(path) for path in paths]
    assert [len(page.all("article")) for page in pages] == [2, 2, 1]
    assert [len(page.all("table")) for page in pages] == [1, 0, 0]
    assert [page.inside("title") for page in pages] == ["Dogs", "Dogs, page 2", "Dogs, page 3"]
    links = [[link["href"] for link in page.all("a")] for page in pages]
    assert links[1] == ["./index.html", "./index.html", "./index_3.html", "./index_3.html"]
    assert links[0] == ["./index_2.html", "./index_3.html", "./index_2.html"]

    assert len(write_pages(tmp_path, "Dogs", images(4), page_size=2)) == 2  # just two pages, no empty third one
    write_pages(tmp_path, "Dogs", images(1), page_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "index_9.html"]


def test_links_to_many_pages_are_few():
    items = attention_page._navigation_html(pathlib.Path("a b.html"), 50, 100)
    assert re.findall(r">(\d+|…|Previous|Next)<", items) == "Previous 1 … 48 49 50 51 52 … 100 Next".split()
    assert 'href="./a%20b.html"' in items


def test_what_ends_early_leaves_the_earlier_pages(tmp_path, photograph):
    write_pages(tmp_path, "Before", [make_image(photograph)])

    def images():
        yield make_image(photograph)
        yield make_image(photograph)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pages(tmp_path, "After", images(), page_size=1)
    (path,) = tmp_path.iterdir()
    assert Page(path).inside("title") == "Before"


def test_the_heat_map_is_inferno():
    table = re.search(r"const INFERNO = (\[.*?\]);", attention_page.read_page_file("light.js"), re.DOTALL)[1]
    ours = np.array(json.loads(re.sub(r",\s*\]", "]", table)))
    np.testing.assert_allclose(ours, 255 * matplotlib.colormaps["inferno"](np.linspace(0, 1, len(ours)))[:, :3], atol=3)


# --- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two pages; on the first a landscape with two captions and boxes, and a portrait with one of unknown evidence."""
    folder = tmp_path_factory.mktemp("page")
    wide = write_photograph(folder / "wide.png")
    high = write_photograph(folder / "high.png", (150, 200))
    greedy = make_caption(DOG, np.log([0.9, 0.43, 0.2, 0.05, 0.005, 0.9]), references=["A dog jumps."])
    beams = make_caption(["two", "dogs"])
    boxes = {DOG.index("dog"): [[80, 60, 160, 120]], DOG.index("frisbee"): [[0, 0, 32, 24], [160, 120, 16, 12]]}
    captions = [PageCaption(greedy, "greedy", "CIDEr 0.83", boxes), PageCaption(beams, "3 beams")]
    first = PageImage("wide.png", wide, captions)
    scores = [["", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"], ["greedy", 59.7, 16.3, 18.6, 43.8, 0.432]]
    second = PageImage("high.png", high, [PageCaption(make_caption(DOG, evidence=None))])
    return write_pages(folder, "Dogs", [first, second, make_image(wide)], scores, page_size=2)[0]


def open_page(browser, path):
    browser.get(path.as_uri())


def pixels(frame):
    """What is on the screen of an image, (height, width, 3), without its rounded corners."""
    frame.parent.execute_async_script("arguments[0].querySelector('img').decode().then(arguments[1])", frame)
    return np.asarray(Image.open(io.BytesIO(frame.screenshot_as_png)).convert("RGB"), np.float32)[8:-8, 8:-8]


def light_of(weights, size):
    """What a page shows for a word of the dog's caption: light from the caption's least weight to its largest.

    The evidence there has the same least and largest value.
    """
    maps = make_caption(DOG).attention_weights
    return upsample(np.sqrt((weights - maps.min()) / np.ptp(maps)), size)


def light_on(frame, weights):
    size = frame.size
    return light_of(weights, (size["width"], size["height"]))[8:-8, 8:-8, np.newaxis]


def active_words(browser):
    return [word.text for word in browser.find_elements("css selector", ".word.active")]


def assert_lit(browser, frame, bare, weights, darkness=0.8):
    """The image on the screen is the bare one, lit as in the PNG figures."""
    light = light_on(frame, weights)
    lit = pixels(frame)
    difference = np.abs(lit - bare * (1 - darkness * (1 - light)))
    assert difference.mean() < 1.5 and difference.max() < 12
    share = lit / bare.clip(1)
    brightest = light[..., 0] > 0.95 * light.max()
    assert share[brightest].mean() > 0.95 * (1 - darkness * (1 - light.max()))
    darkest = light[..., 0] < light.min() + 0.02
    assert share[darkest].mean() < 1.05 - darkness * (1 - light[darkest].mean())


@pytest.mark.slow
def test_a_mouse_lights_the_image(browser, page):
    open_page(browser, page)
    frame = find(browser, ".frame")
    bare = pixels(frame)
    caption = make_caption(DOG)
    for position in (2, 3):  # words without boxes, whose outlines would be in the way
        hover(browser, find(browser, ".word", position))
        assert active_words(browser) == [DOG[position]]
        assert_lit(browser, frame, bare, caption.attention_weights[position])
    status = find(browser, ".status").text
    assert status == f"a: probability 0.05, peak {64 * caption.attention_weights[3].max():.1f}×"
    hover(browser, find(browser, "h1"))
    assert active_words(browser) == []
    np.testing.assert_array_equal(pixels(frame), bare)
    hover(browser, find(browser, ".caption:has([aria-label*='3 beams']) .word", 1))  # the other caption, same image
    assert_lit(browser, frame, bare, caption.attention_weights[1])
    hover(browser, find(browser, "article:nth-of-type(2) .word", 2))  # only one image is lit at a time
    assert not overlay_of(browser)[..., 3].any()


@pytest.mark.slow
def test_keys_light_the_image(browser, page):
    open_page(browser, page)
    frame = find(browser, ".frame")
    bare = pixels(frame)
    browser.execute_script("arguments[0].focus()", find(browser, ".play"))
    caption = make_caption(DOG)
    press(browser, "TAB")
    seen = [active_words(browser)]
    for key in ("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "END", "ARROW_RIGHT", "HOME", "ARROW_LEFT"):
        press(browser, key)
        seen += [active_words(browser)]
    assert [word for (word,) in seen] == "a dog catches dog frisbee frisbee a a".split()
    assert_lit(browser, frame, bare, caption.attention_weights[0])
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"
    press(browser, "ESCAPE")
    np.testing.assert_array_equal(pixels(frame), bare)
    press(browser, "ENTER")
    assert active_words(browser) == ["a"]
    press(browser, "TAB", "TAB")  # past the other caption's button
    assert active_words(browser) == ["two"]


@pytest.mark.slow
def test_persian_goes_from_right_to_left_also_by_keys(browser, tmp_path):
    photograph, words = write_photograph(tmp_path / "dog.png"), ["سگی", "روی", "چمن"]
    open_page(browser, write_pages(tmp_path, "Dogs", [make_image(photograph, words)])[0])
    places = [find(browser, ".word", number).rect["x"] for number in range(3)]
    assert find(browser, ".play").rect["x"] > places[0] > places[1] > places[2]
    browser.execute_script("arguments[0].focus()", find(browser, ".word"))
    seen = [active_words(browser)]
    for key in ("ARROW_LEFT", "ARROW_LEFT", "ARROW_RIGHT"):
        press(browser, key)
        seen.append(active_words(browser))
    assert [word for (word,) in seen] == ["سگی", "روی", "چمن", "روی"]


@pytest.mark.slow
def test_a_finger_lights_the_image(browser, page):
    open_page(browser, page)
    frame, dog, catches = find(browser, ".frame"), find(browser, ".word", 1), find(browser, ".word", 2)
    bare = pixels(frame)
    touch(browser, dog)
    assert active_words(browser) == ["dog"]
    touch(browser, catches)
    assert_lit(browser, frame, bare, make_caption(DOG).attention_weights[2])
    touch(browser, catches)
    assert active_words(browser) == []
    touch(browser, dog)
    touch(browser, frame)
    assert active_words(browser) == []


RECORD = """
window.played = [];
new MutationObserver((changes) => {
  for (const { target } of changes)
    if (target.matches(".word.active")) window.played.push([target.textContent, performance.now()]);
}).observe(document.querySelector("article"), { subtree: true, attributeFilter: ["class"] });
"""


@pytest.mark.slow
@pytest.mark.parametrize("motion, fastest", [("no-preference", 300), ("reduce", 900)])
def test_play_runs_through_the_words(browser, page, motion, fastest):
    """No faster than so many milliseconds a word: on a busy machine a word may come late, and the next one in time."""
    emulate(browser, reduced_motion=motion)
    open_page(browser, page)
    frame, button = find(browser, ".frame"), find(browser, ".play")
    bare = pixels(frame)
    browser.execute_script(RECORD)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    wait_for(browser, "document.querySelector('.play').getAttribute('aria-pressed') === 'false'")
    settle(browser)
    played = browser.execute_script("return window.played")
    assert [word for word, _ in played] == DOG
    assert (played[-1][1] - played[0][1]) / (len(DOG) - 1) > fastest
    assert active_words(browser) == []
    np.testing.assert_array_equal(pixels(frame), bare)

    browser.execute_script("arguments[0].click(); arguments[0].click()", button)  # stops before the next word is due
    settle(browser, fastest + 350)
    assert active_words(browser) == ["a"]  # which stays lit
    assert_lit(browser, frame, bare, make_caption(DOG).attention_weights[0])
    button.click()
    hover(browser, find(browser, ".word", 4))  # a reader who points takes over
    assert button.get_attribute("aria-pressed") == "false"
    assert active_words(browser) == ["frisbee"]


def overlay_of(browser):
    """The pixels of the first image's overlay, (height, width, RGBA)."""
    script = """
        const canvas = document.querySelector(".frame canvas");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.height, canvas.width, Array.from(data)];"""
    height, width, values = browser.execute_script(script)
    return np.array(values, np.float32).reshape(height, width, 4)


@pytest.mark.slow
def test_less_motion_means_no_fade(browser, page):
    emulate(browser, reduced_motion="reduce")
    open_page(browser, page)
    browser.execute_script("document.querySelectorAll('.word')[1].focus()")
    light = light_of(make_caption(DOG).attention_weights[1], (240, 180))
    np.testing.assert_allclose(overlay_of(browser)[..., 3], 255 * 0.8 * (1 - light), atol=2)


@pytest.mark.slow
def test_slider_and_heat_map(browser, page):
    open_page(browser, page)
    frame, slider = find(browser, ".frame"), find(browser, "#darkness")
    maps = make_caption(DOG).attention_weights
    brightest = int(maps.max(axis=1).argmax())  # the word whose light reaches 1
    bare, weights = pixels(frame), maps[brightest]
    find(browser, ".word", brightest).click()
    slider.click()  # its middle
    settle(browser)
    assert slider.get_attribute("value") == "50"
    assert active_words(browser) == [DOG[brightest]]
    assert_lit(browser, frame, bare, weights, darkness=0.5)
    press(browser, "HOME")
    np.testing.assert_array_equal(pixels(frame), bare)
    press(browser, "END")
    assert_lit(browser, frame, bare, weights, darkness=1)

    choose(browser, "heat")
    overlay = overlay_of(browser)
    light = light_of(weights, (240, 180))
    np.testing.assert_allclose(overlay[..., 3], 255 * 0.75, atol=1)
    assert np.abs(overlay[light > 0.999][:, :3] - (252, 255, 164)).max() < 4
    heat = 255 * matplotlib.colormaps["inferno"](light)[..., :3]
    assert np.abs(overlay[..., :3] - heat).max() < 20
    heated = pixels(frame)
    light = light_on(frame, weights)[..., 0]
    assert heated[light > 0.9].mean() > heated[(light > 0.4) & (light < 0.6)].mean() > heated[light < 0.1].mean()
    assert find(browser, ".scale").is_displayed()
    choose(browser, "light")
    assert_lit(browser, frame, bare, weights, darkness=1)


def choose(browser, value):
    """Click a choice of the bar."""
    find(browser, f"label:has([value={value}])").click()
    settle(browser)


def chosen_map(browser):
    return [found.get_attribute("value") for found in browser.find_elements("css selector", "[name=map]:checked")]


@pytest.mark.slow
def test_attention_and_evidence_are_switched_and_the_choice_is_remembered(browser, page):
    open_page(browser, page)
    frame, caption = find(browser, ".frame"), make_caption(DOG)
    bare = pixels(frame)
    assert chosen_map(browser) == ["weights"]
    find(browser, ".word", 3).click()
    settle(browser)
    assert_lit(browser, frame, bare, caption.attention_weights[3])
    choose(browser, "evidence")
    assert active_words(browser) == [DOG[3]]  # the word stays, its map is another
    assert_lit(browser, frame, bare, caption.evidence[3])
    peak = 64 * caption.evidence[3].max()
    assert find(browser, ".status").text == f"a: probability 0.05, peak {peak:.1f}×"
    find(browser, ".play").click()  # a caption that is played shows it too
    find(browser, ".play").click()
    settle(browser)
    assert_lit(browser, frame, bare, caption.evidence[0])
    for other in (page, page.with_name("index_2.html")):
        open_page(browser, other)
        assert chosen_map(browser) == ["evidence"]
    open_page(browser, page)
    find(browser, ".word", 2).click()
    settle(browser)
    assert_lit(browser, find(browser, ".frame"), bare, caption.evidence[2])
    choose(browser, "weights")
    open_page(browser, page)
    assert chosen_map(browser) == ["weights"]


@pytest.mark.slow
def test_a_caption_of_unknown_evidence_says_so(browser, page):
    open_page(browser, page)
    find(browser, "article:nth-of-type(2) .word", 2).click()
    settle(browser)
    status = find(browser, ".status", 1)
    assert status.text.startswith("catches: ") and status.text.endswith("×")
    choose(browser, "evidence")
    assert not overlay_of(browser)[..., 3].any()  # the bare image
    assert status.text.endswith(", no evidence was kept")


@pytest.mark.slow
def test_the_map_is_switched_by_keys(browser, page):
    open_page(browser, page)
    frame, caption = find(browser, ".frame"), make_caption(DOG)
    bare = pixels(frame)
    find(browser, ".word", 3).click()
    browser.execute_script("arguments[0].focus()", find(browser, "[name=map]"))
    press(browser, "ARROW_RIGHT")
    assert chosen_map(browser) == ["evidence"]
    assert_lit(browser, frame, bare, caption.evidence[3])
    outline = "return getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert browser.execute_script(outline) == "solid"
    press(browser, "TAB")  # one stop for each group
    assert browser.execute_script("return document.activeElement.name") == "show"


@pytest.mark.slow
@pytest.mark.parametrize("value", ["evidence", "heat"])
def test_a_click_in_the_bar_leaves_the_image_where_it_is(browser, page, value):
    emulate(browser, height=600)
    open_page(browser, page)
    script = f"""
        document.querySelector("article:nth-of-type(2) .play").scrollIntoView({{block: "start"}});
        const {{x, y, width, height}} = document.querySelector("label:has([value={value}])").getBoundingClientRect();
        return [x + width / 2, y + height / 2]"""
    x, y = browser.execute_script(script)
    top = "return document.querySelector('article:nth-of-type(2) .frame').getBoundingClientRect().top"
    before = browser.execute_script(top)
    for kind in ("mousePressed", "mouseReleased"):  # as Selenium's own click scrolls first
        event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    settle(browser)
    assert find(browser, f"[value={value}]").is_selected()
    assert browser.execute_script(top) == pytest.approx(before, abs=1)
    assert browser.execute_script("return scrollY") > 500


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["refused", "nonsense"])
def test_a_browser_that_keeps_nothing_shows_attention(browser, page, kept):
    broken = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    script = broken if kept == "refused" else "localStorage.setItem('attention page: map', 'nonsense')"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    open_page(browser, page)
    assert chosen_map(browser) == ["weights"]
    find(browser, ".word", 3).click()
    choose(browser, "evidence")
    assert chosen_map(browser) == ["evidence"] and active_words(browser) == [DOG[3]]
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.mark.slow
def test_boxes_are_outlined(browser, page):
    open_page(browser, page)
    frame = find(browser, ".frame")
    left, top, width, height = (frame.rect[side] for side in ("x", "y", "width", "height"))
    for position, expected in ((1, [[0.25, 0.25, 0.5, 0.5]]), (4, [[0, 0, 0.1, 0.1], [0.5, 0.5, 0.05, 0.05]]), (2, [])):
        find(browser, ".word", position).click()
        rects = [box.rect for box in browser.find_elements("css selector", ".box")]
        found = [
            [(r["x"] - left) / width, (r["y"] - top) / height, r["width"] / width, r["height"] / height] for r in rects
        ]
        np.testing.assert_allclose(np.array(found).reshape(-1, 4), np.array(expected).reshape(-1, 4), atol=0.01)


@pytest.mark.slow
def test_screen_readers_get_the_caption(browser, page):
    open_page(browser, page)
    assert find(browser, "img").accessible_name == "greedy: a dog catches a frisbee; 3 beams: two dogs"
    assert find(browser, "article:nth-of-type(2) img").accessible_name == "a dog catches a frisbee"
    word, toolbar = find(browser, ".word", 1), find(browser, "[role=toolbar]")
    assert (word.aria_role, word.accessible_name) == ("button", "dog: probability 0.43")
    assert (toolbar.aria_role, toolbar.accessible_name) == ("toolbar", "Words (greedy)")
    assert find(browser, ".play").accessible_name == "Play (greedy)"
    assert find(browser, "article").accessible_name.startswith("wide.png")
    assert find(browser, "#darkness").accessible_name == "Darkness"
    choices = browser.find_elements("css selector", "fieldset input")
    assert [name.accessible_name for name in choices] == ["Attention", "Evidence", "Light", "Heat map"]
    assert [group.accessible_name for group in browser.find_elements("css selector", "fieldset")] == [
        "Map",
        "The map is shown as",
    ]
    about = [find(browser, f"#{name.get_attribute('aria-describedby')}").text for name in choices[:2]]
    assert about[0].startswith("The weights by which") and about[1].startswith("Attention, times")
    assert "A dog jumps." in find(browser, ".references").text


CONTRASTS = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function luminance(colour) {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element) {
  const { backgroundColor } = getComputedStyle(element);
  const seeThrough = backgroundColor === "rgba(0, 0, 0, 0)" && element.parentElement;
  return seeThrough ? ground(element.parentElement) : backgroundColor;
}
const texts = "h1, h2, p, dt, dd, th, td, .word, .note, .references li, nav a, nav span, label span";
return [...document.querySelectorAll(texts)]
  .map((element) => [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a))
  .map(([light, dark]) => (light + 0.05) / (dark + 0.05));
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(browser, page, scheme):
    emulate(browser, color_scheme=scheme)
    open_page(browser, page)
    hover(browser, find(browser, ".word", 1))
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 30 and min(contrasts) >= 4.5
    dark = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 60)"
    assert browser.execute_script(dark) == (scheme == "dark")
    shades = [word.value_of_css_property("color") for word in browser.find_elements("css selector", ".word")[:5]]
    assert len(set(shades)) == 5


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scroll(browser, tmp_path, photograph):
    emulate(browser, 360, 740)
    words = [*HOSTILE, "w" * 200]
    wide = write_photograph(tmp_path / "wide.png", (2000, 40))
    captions = [PageCaption(make_caption(words), "greedy"), PageCaption(make_caption(words), "x" * 90, "y" * 90)]
    images = [PageImage("z" * 255, path, captions, "CIDEr 0.83") for path in (photograph, wide, tmp_path / "gone")]
    table = [["", *"abcdefghijkl"], ["greedy", *range(100_000, 100_012)]]
    for path in write_pages(tmp_path, "t" * 100, images, table, page_size=1):
        open_page(browser, path)
        browser.execute_script("document.querySelectorAll('.word')[8].focus()")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        find(browser, "label:has([value=heat])").click()
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
def test_each_caption_of_a_list_lights_the_image_with_its_own_map(browser, tmp_path, photograph, width):
    emulate(browser, width, 900)
    texts = (DOG, ["two", "dogs"], [*DOG, "w" * 200], ["a", "cat"], DOG[:3])
    image = listed(photograph, *texts)
    open_page(browser, write_pages(tmp_path, "Dogs", [image])[0])
    lights = []
    for number, words in enumerate(texts):
        word = find(browser, f"li:nth-of-type({number + 1}) .word", 1)
        hover(browser, word)
        assert active_words(browser) == [words[1]]
        lights.append(pixels(find(browser, ".frame")))
    assert all(np.abs(a - b).max() > 20 for a, b in itertools.combinations(lights, 2))
    tops = [row.rect["y"] for row in browser.find_elements("css selector", ".list li")]
    assert tops == sorted(tops) and len(set(tops)) == 5  # one below the other
    assert browser.execute_script("return document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_hostile_names_show_and_do_nothing(browser, tmp_path, photograph):
    image = PageImage(HOSTILE[0], photograph, [PageCaption(make_caption(HOSTILE), HOSTILE[1])], HOSTILE[1])
    open_page(browser, write_pages(tmp_path, HOSTILE[1], [image], [[HOSTILE, HOSTILE]], intro=HOSTILE[0])[0])
    hover(browser, find(browser, ".word"))
    assert find(browser, ".word").text == HOSTILE[0]
    assert find(browser, "h1").text == HOSTILE[1] == browser.title
    assert find(browser, "h2 bdi").text == HOSTILE[0]
    assert find(browser, ".status").text.startswith(HOSTILE[0])
    assert len(browser.find_elements("css selector", "img, script")) == 2


@pytest.mark.slow
def test_the_policy_holds(browser, page):
    open_page(browser, page)
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    fetched = browser.execute_async_script(
        "fetch('https://example.org/').then(() => arguments[0]('fetched'), (error) => arguments[0](String(error)))"
    )
    settle(browser)
    assert "fetched" not in fetched
    assert browser.execute_script("return window.ran") is None
    messages = [entry["message"] for entry in browser.get_log("browser")]  # and out of the log, which must be empty
    assert all("Content Security Policy" in message for message in messages) and len(messages) >= 2


@pytest.mark.slow
def test_nothing_is_requested(browser, page):
    browser.get_log("performance")
    open_page(browser, page)
    for position in (1, 4):
        hover(browser, find(browser, ".word", position))
    find(browser, ".play").click()
    addresses = requested(browser)
    assert page.as_uri() in addresses
    assert all(address == page.as_uri() or address.startswith("data:") for address in addresses)
    assert len(browser.find_elements("css selector", "header nav, main ~ nav")) == 2  # above the images and below
    find(browser, "nav li:last-child a").click()
    assert browser.current_url == page.with_name("index_2.html").as_uri()
    find(browser, "main ~ nav li:first-child a").click()
    assert browser.current_url == page.as_uri()


@pytest.mark.slow
def test_without_javascript_the_captions_can_be_read(browser, page):
    with contextlib.ExitStack() as stack:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        stack.callback(browser.execute_cdp_cmd, "Emulation.setScriptExecutionDisabled", {"value": False})
        open_page(browser, page)
        assert find(browser, ".word", 1).text == "dog"
        assert "JavaScript" in find(browser, "noscript").text
        assert not find(browser, ".controls").is_displayed()


@pytest.mark.slow
def test_a_page_of_a_hundred_photographs(browser, tmp_path):
    photograph = write_photograph(tmp_path / "noisy.png", (640, 480), noise=60)
    images = (
        PageImage(f"{i}.jpg", photograph, [PageCaption(make_caption(DOG * 3), label) for label in ("greedy", "beams")])
        for i in range(100)
    )
    (path,) = write_pages(tmp_path, "Dogs", images)
    assert 5_000_000 < path.stat().st_size < 15_000_000
    open_page(browser, path)
    loaded = "const [it] = performance.getEntriesByType('navigation'); return it.loadEventEnd"
    assert browser.execute_script(loaded) < 30_000  # milliseconds; about 1,000, unless the machine is busy
    broken = "return [...document.images].filter((image) => !image.naturalWidth).length"
    assert (len(browser.find_elements("css selector", "article")), browser.execute_script(broken)) == (100, 0)
    hover(browser, find(browser, ".word", 1))
    assert active_words(browser) == ["dog"]
