"""The captioner as a web page: the exported folder, and what a real browser makes of it."""

import base64
import dataclasses
import hashlib
import html.parser
import http.client
import io
import json
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFilter
from test_image_files import png_header

import inference_image_caption as inference
from browser import emulate, find, press, requested, settle, wait_for
from captioning.attention.evidence import explain_captions
from captioning.attention.maps import scale_light
from captioning.export import web
from captioning.export.saved_model import decode_captions
from captioning.features.image_files import load_image
from captioning.settings import make_config
from captioning.training import run_folder
from captioning.vocabulary import END, PAD
from captioning.words import join_words
from support import local_server
from support.errors import UserError
from tiny_captioner import MIXED, SIZES, colour_network, tiny_captioner

ROOT = pathlib.Path(__file__).parent.parent.parent
RUNTIME = pathlib.Path(os.environ.get("WEB_RUNTIME", ROOT / "node_modules" / "onnxruntime-web" / "dist"))
CONFIG = make_config({**SIZES, "max_words": 9, "beam_width": 1, "repeat_block": 2})
MODELS = ("encoder", "decoder", "evidence")


def make_captioner(seed=1):
    return dataclasses.replace(tiny_captioner(CONFIG, seed=seed), vocabulary=MIXED, network="a network", identity="1")


def soft_network(pixels):
    """colour_network, which multiplies errors of a pixel by up to 255, with less of that."""
    return colour_network(tf.cast(pixels, tf.float32) / 16)


def write_stand_ins(functions, weights, folder):
    for name in MODELS:
        (folder / f"{name}.onnx").write_bytes(f"{name} {weights}".encode())


# --- The folder -------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The start tags of an HTML file, and the texts inside style and script."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.inline, self.open = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open = tag

    def handle_data(self, data):
        self.inline += data if self.open in ("script", "style") else ""


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """A page with stand-ins for models, whose runtime comes from the CDN."""
    monkeypatch.setattr(web, "write_onnx", write_stand_ins)
    web.export_page(make_captioner(), colour_network, "float16", CONFIG, tmp_path / "page")
    return tmp_path / "page"


def test_the_folder_names_what_it_is_made_of(page_folder):
    about = json.loads((page_folder / "captioner.json").read_text())
    assert (about["format"], about["weights"], about["runtime"]) == ("web", "float16", web.RUNTIME_VERSION)
    assert about["decoding"]["max_words"] == 9
    for name in (*MODELS, "vocabulary"):
        file = about["files"][name]
        data = (page_folder / file["url"]).read_bytes()
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        assert (file["bytes"], file["sha256"]) == (len(data), digest)
    for name in ("script", "wasm"):
        assert about["files"][name]["url"].startswith(
            f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{web.RUNTIME_VERSION}/"
        )
    assert about["gpu_files"].keys() == {"gpu_script", "gpu_wasm"}
    assert all(file["url"].startswith(web._CDN) for file in about["gpu_files"].values())
    assert "cdn.jsdelivr.net" in (page_folder / "README.md").read_text() and not list(page_folder.glob("*.wasm"))
    assert len((page_folder / "README.md").read_text().splitlines()) <= 25


def test_the_policy_allows_this_folder_and_the_runtime_and_nothing_else(page_folder):
    page = Page(page_folder / "index.html")
    (policy,) = (attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == f"'self' https://cdn.jsdelivr.net/npm/onnxruntime-web@{web.RUNTIME_VERSION}/dist/"
    assert "unsafe-inline" not in policy and "'unsafe-eval'" not in policy and rules["style-src"] == "'self'"
    assert page.inline.strip() == ""
    named = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    named = {name for name in named if name and not name.startswith("data:")}
    assert named == {"page.css", "captioner.css", "light.js", "page.js", "captioner.js"}
    assert all((page_folder / name).is_file() for name in named)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("wrong", ["missing", "other"])
def test_a_runtime_of_another_version_is_one_line(tmp_path, wrong):
    for file in web._RUNTIME.values():
        (tmp_path / file.url).write_bytes(b"another")
    if wrong == "missing":
        (tmp_path / web._RUNTIME["wasm"].url).unlink()
        (tmp_path / web._RUNTIME["script"].url).unlink()
    with pytest.raises(UserError, match=f"npm install onnxruntime-web@{web.RUNTIME_VERSION}") as raised:
        web.check_runtime(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["--web_runtime", "d"], "--web_runtime goes with --serve"),
        (["--export", "m", "--format", "onnx", "--web_runtime", "d"], "--format web"),
        (["--export", "m", "--format", "web", "--web_runtime", "gone"], "npm install onnxruntime-web"),
        (["--export", "m", "--format", "web", "--weights", "int8"], "only with litert"),
        (["--export", "m", "--serve"], "--export and --serve do not go together"),
        (["--image", "a.jpg", "--serve", "0"], "--image and --serve do not go together"),
        (["--serve", "--weights", "float32"], "give --export DIR too"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path, monkeypatch, wrong, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as raised:
        inference.main(wrong)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


# --- Serving ----------------------------------------------------------------------------------------------------


def test_the_server_isolates_the_page_and_is_of_this_machine_alone(tmp_path):
    (tmp_path / "a.mjs").write_text("1")
    with local_server.make_server(tmp_path, 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("GET", "/a.mjs")
        answer = connection.getresponse()
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Content-Type"] == "text/javascript"
        with pytest.raises(UserError, match="cannot be had .*behind --serve") as raised:
            local_server.make_server(tmp_path, server.server_port)
        assert "\n" not in str(raised.value)
        server.shutdown()
    with pytest.raises(UserError, match="port 70000 cannot be had"):
        local_server.make_server(tmp_path, 70_000)


def test_a_run_is_served_and_exported_once_for_each_checkpoint(trained, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, ignore=shutil.ignore_patterns("captions"))
    monkeypatch.setattr(run_folder, "run_network", lambda config: colour_network)
    exports = []
    monkeypatch.setattr(web, "write_onnx", lambda *given: exports.append(given) or write_stand_ins(*given))

    def stop(server):
        assert (run / "web" / "index.html").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(local_server._Server, "serve_forever", stop)
    given = ["--run_dir", str(run), "--serve", "0"]
    inference.main(given)
    inference.main(given)
    assert len(exports) == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "http://" in line]
    assert len(lines) == 2 and lines[0].startswith("open http://127.0.0.1:")
    assert printed.count("from a CDN; with --web_runtime DIR") == 2
    inference.main([*given, "--max_words", "7"])
    assert json.loads((run / "web" / "captioner.json").read_text())["decoding"]["max_words"] == 7
    shutil.rmtree(run / "best")  # the weights of `last` are another checkpoint
    inference.main([*given, "--max_words", "7"])
    assert len(exports) == 3
    edited = tmp_path / "model.py"
    edited.write_bytes(pathlib.Path(web.model.__file__).read_bytes() + b"# another score")
    monkeypatch.setattr(web.model, "__file__", str(edited))
    inference.main([*given, "--max_words", "7"])
    assert len(exports) == 4
    shutil.rmtree(run / "web")
    (run / "web").mkdir()
    (run / "web" / "mine.txt").touch()
    with pytest.raises(UserError, match="is there already"):
        inference.main(given)
    assert os.listdir(run / "web") == ["mine.txt"]


# --- In a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(captioner, folder of its page with the runtime in it)"""
    if not RUNTIME.is_dir():
        pytest.skip(
            f"no onnxruntime-web: run npm install --no-save onnxruntime-web@{web.RUNTIME_VERSION}, "
            "or name its folder dist by WEB_RUNTIME"
        )
    captioner, folder = make_captioner(), tmp_path_factory.mktemp("web") / "page"
    web.export_page(captioner, soft_network, "float32", CONFIG, folder, RUNTIME)
    return captioner, folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A drawing that is partly clear, a photograph on its side, and one much larger than what the network takes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(5)
    clear = rng.integers(0, 256, (60, 90, 4), np.uint8)
    clear[..., 3] = np.where(clear[..., 3] < 80, 0, 255)
    Image.fromarray(clear).save(folder / "clear.png")
    sizes = {(240, 320): (100, 256), (900, 1200): (0, 120)}  # and the colours' range
    soft = [Image.fromarray(rng.integers(*colours, (*size, 3), np.uint8)) for size, colours in sizes.items()]
    exif = Image.Exif()
    exif[0x0112] = 6
    soft[0].filter(ImageFilter.GaussianBlur(9)).save(folder / "turned.jpg", exif=exif, quality=95)
    soft[1].filter(ImageFilter.GaussianBlur(30)).save(folder / "large.png")
    return [folder / name for name in ("clear.png", "turned.jpg", "large.png")]


class Host:
    """A web host of a folder that any origin may read from, as CDNs are. It counts what is asked for.

    Files of `gone` are not there, and the connection breaks in the middle of those of `cut`.
    """

    def __init__(self, folder):
        self.asked, self.gone, self.cut = [], set(), set()
        outer = self

        class Handler(local_server._Handler):
            def __init__(self, *given):
                super().__init__(*given, directory=folder)

            def end_headers(self):
                self.send_header("Access-Control-Allow-Origin", "*")
                super().end_headers()

            def send_head(self):
                name = self.path.partition("?")[0][1:]
                outer.asked.append(name)
                return self.send_error(404) if name in outer.gone else super().send_head()

            def copyfile(self, source, target):
                if self.path[1:] in outer.cut:
                    source = io.BytesIO(source.read(100))
                super().copyfile(source, target)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def host(exported):
    host = Host(exported[1])
    yield host
    host.server.shutdown()
    host.server.server_close()


def open_captioner(browser, host):
    browser.get(host.url)
    wait_for(browser, "document.body.dataset.threads")


def choose(browser, *paths):
    find(browser, "#choose").send_keys("\n".join(map(str, paths)))


def article(number):
    return f"document.querySelector('[aria-labelledby=image-{number}]')"


def caption_images(browser, paths):
    """Let the page caption images; their captions, in the order of the paths."""
    before = len(browser.find_elements("css selector", "article"))
    choose(browser, *paths)
    numbers = range(before + 1, before + len(paths) + 1)
    return [wait_for(browser, f"{article(i)}.querySelector('[data-evidence]') && captionOf({i})") for i in numbers]


def script_3(captioner, path, beams=1):
    """What script 3 makes of an image: word ids with <end> (L,), and attention weights (L, P)."""
    config = dataclasses.replace(CONFIG, beam_width=beams)
    features = soft_network(load_image(path, 299)[np.newaxis])
    words, _, weights = decode_captions(captioner.encoder, captioner.decoder, features, config)
    kept = words[0].numpy() != PAD
    return words[0].numpy()[kept], weights[0].numpy()[kept]


def caption_of(ids):
    return join_words([MIXED[i] for i in ids if i != END])


CAPTION_OF = "window.captionOf = (number) => captionText(images.get(number).caption)"


@pytest.mark.slow
def test_captions_and_maps_are_those_of_script_3(browser, host, exported, images):
    captioner, _ = exported
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    expected = [script_3(captioner, path) for path in images]
    assert len({tuple(ids) for ids, _ in expected}) == 3
    assert caption_images(browser, images) == [caption_of(ids) for ids, _ in expected]
    for number, (path, (ids, weights)) in enumerate(zip(images, expected, strict=True), 1):
        words = [i for i in ids if i != END]
        features = soft_network(load_image(path, 299)[np.newaxis])
        _, evidence, _ = explain_captions(captioner.encoder, captioner.decoder, features, ids[np.newaxis])
        maps = {"weights": weights[: len(words)], "evidence": evidence.numpy()[0, : len(words)]}
        for name, values in maps.items():
            script = f"return [...{article(number)}.querySelectorAll('.word')].map((word) => word.dataset.{name})"
            levels = [list(base64.b64decode(text)) for text in browser.execute_script(script)]
            assert np.abs(np.array(levels) / 255 - scale_light(values)).mean() < 0.02  # of decoders' last bits
    for beams in (3, 5):
        browser.execute_script(f"document.querySelector('[name=beams][value=\"{beams}\"]').click()")
        expected = [caption_of(script_3(captioner, path, beams)[0]) for path in images]
        for number, caption in enumerate(expected, 1):
            wait_for(browser, f"images.get({number}).caption.beams === {beams}")
            assert browser.execute_script(f"return captionOf({number})") == caption
    assert find(browser, "img").get_attribute("alt") == expected[0]


@pytest.mark.slow
def test_pixels_are_squeezed_as_pillow_does(browser):
    script = (web._WEB_FILES / "pixels.js").read_text().replace('"use strict";', "")
    rng = np.random.default_rng(2)
    for width, height, apart in (
        (640, 480, 0),
        (480, 640, 0),
        (299, 299, 0),
        (31, 500, 1),
    ):  # Pillow turns what is tall
        pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
        given = base64.b64encode(pixels.tobytes()).decode()
        code = f"""{script}
            const pixels = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
            const rows = (top, count) => pixels.subarray(4 * {width} * top, 4 * {width} * (top + count));
            return Array.from(squeezeImage(rows, {width}, {height}, 1, 299));"""
        found = np.array(browser.execute_script(code, given)).reshape(299, 299, 3)
        image = Image.fromarray(pixels[..., :3]).resize((299, 299), Image.Resampling.BILINEAR)
        assert np.abs(found - np.asarray(image, int)).max() == apart


@pytest.mark.slow
def test_a_large_photograph_is_decoded_as_at_a_fraction(browser, tmp_path):
    """Pillow lets JPEG files be decoded at 1/2, 1/4 or 1/8 of their size; the page averages boxes instead."""
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    noise.resize((1600, 1204), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    script = (web._WEB_FILES / "pixels.js").read_text().replace('"use strict";', "")
    with Image.open(tmp_path / "a.jpg") as image:
        pixels = np.asarray(image.convert("RGBA"))
    code = f"""{script}
        const pixels = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const rows = (top, count) => pixels.subarray(4 * 1600 * top, 4 * 1600 * (top + count));
        const ratio = jpegRatio(1600, 1204, 299);
        return [ratio, Array.from(squeezeImage(rows, 1600, 1204, ratio, 299))];"""
    ratio, found = browser.execute_script(code, base64.b64encode(pixels.tobytes()).decode())
    expected = load_image(tmp_path / "a.jpg", 299).astype(int)
    assert ratio == 4
    assert np.abs(np.array(found).reshape(299, 299, 3) - expected).mean() < 1.5


def write_undated(path, data):
    """Overwrite a file within the second that its date names, so that the date does not tell."""
    date = path.stat().st_mtime
    path.write_bytes(data)
    os.utime(path, (date, date))


@pytest.mark.slow
def test_the_second_visit_loads_no_model(browser, host, exported):
    large = {*MODELS, "vocabulary"}
    open_captioner(browser, host)
    host.asked.clear()
    open_captioner(browser, host)
    assert "index.html" in host.asked or "" in host.asked
    assert not [name for name in host.asked if name.endswith((".onnx", ".wasm", ".mjs")) or name == "vocabulary.json"]
    keys = "caches.keys().then((names) => caches.open(names[0])).then((cache) => cache.keys())"
    count = f"const done = arguments[0]; {keys}.then((keys) => done(keys.map((key) => key.url)))"
    before = browser.execute_async_script(count)
    assert len(before) == len(large) + 2
    decoder, about = exported[1] / "decoder.onnx", exported[1] / "captioner.json"
    kept = decoder.read_bytes(), about.read_bytes()
    try:  # a new version, with one more byte that changes nothing: an empty name of an ONNX file's producer
        decoder.write_bytes(kept[0] + b"\x12\x00")
        changed = json.loads(kept[1])
        changed["files"]["decoder"] = dataclasses.asdict(web._describe_file(decoder))
        write_undated(about, json.dumps(changed).encode())
        host.asked.clear()
        open_captioner(browser, host)
        # The worker looks for a GPU behind what it forgets of the first version.
        wait_for(browser, "document.querySelector('.device').title || document.body.dataset.device === 'webgpu'")
        assert [name for name in host.asked if name.endswith(".onnx")] == ["decoder.onnx"]
        after = browser.execute_async_script(count)
        assert len(after) == len(before) and len(set(after) - set(before)) == 1
    finally:
        decoder.write_bytes(kept[0])
        write_undated(about, kept[1])


@pytest.mark.slow
def test_no_other_origin_is_asked(browser, host, images):
    browser.get_log("performance")
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    caption_images(browser, images[:1])
    addresses = requested(browser)
    assert host.url in addresses
    ours = (host.url, f"blob:{host.url}", "data:")
    assert [address for address in addresses if not address.startswith(ours)] == []
    sent = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith(ours) for name in browser.execute_script(sent))
    refused = browser.execute_async_script(
        "fetch('https://example.org/').then(() => arguments[0]('fetched'), (error) => arguments[0](String(error)))"
    )
    inside = """
        const code = "fetch('https://example.org/').then(() => postMessage(1), (error) => postMessage(String(error)))";
        new Worker(URL.createObjectURL(new Blob([code]))).onmessage = ({ data }) => arguments[0](data)"""
    assert "fetched" not in refused and "TypeError" in browser.execute_async_script(inside)
    settle(browser, 1000)  # a worker's messages take their time
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert messages and all("Content Security Policy" in message for message in messages)


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scroll(browser, host, images):
    emulate(browser, 360, 740)
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    caption_images(browser, images)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    sizes = "return [...document.querySelectorAll('.way, .button')].map((each) => each.getBoundingClientRect().height)"
    assert min(height for height in browser.execute_script(sizes) if height) >= 32


@pytest.mark.slow
def test_a_host_without_https_is_enough(browser, host, exported, images):
    """There the browser keeps nothing itself, has no digests to offer, and runs one thread."""
    browser.get(host.url.replace("127.0.0.1", "insecure.test"))
    browser.execute_script(CAPTION_OF)
    assert caption_images(browser, images[1:2]) == [caption_of(script_3(exported[0], images[1])[0])]
    state = "return [isSecureContext, crossOriginIsolated, document.body.dataset.threads]"
    assert browser.execute_script(state) == [False, False, "1"]
    host.asked.clear()
    browser.refresh()
    wait_for(browser, "document.body.dataset.threads")
    assert host.asked.count("encoder.onnx") == 1  # asked whether there is a new one
    browser.get_log("browser")  # it says that the headers for threads need https


TOLD = """
    window.told = [];
    const note = (changes) => told.push(...changes.map(({ target }) => target.textContent));
    new MutationObserver(note).observe(document.activeElement, { childList: true });"""


@pytest.mark.slow
def test_keys_are_enough(browser, host, exported, images):
    captioner, _ = exported
    said = {path: [i for i in script_3(captioner, path, beams=3)[0] if i != END] for path in images}
    path = max(images, key=lambda path: len(said[path]))
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    press(browser, "TAB")
    assert browser.switch_to.active_element.get_attribute("id") == "choose"
    caption_images(browser, [path])
    press(browser, "TAB", "ARROW_RIGHT")  # to the beams; the camera is for phones
    wait_for(browser, "images.get(1).caption.beams === 3")
    browser.execute_script("document.querySelector('.controls input:checked').focus()")
    press(browser, "TAB", "TAB", "TAB", "TAB", "ARROW_RIGHT")  # kind of light, darkness, play, and two words
    active = browser.find_elements("css selector", ".word.active")
    assert [word.text for word in active] == [MIXED[said[path][1]]]
    assert browser.execute_script("return document.querySelector('.frame canvas') !== null")
    press(browser, "TAB")
    browser.execute_script(TOLD)  # which goes after a second and a half
    press(browser, "ENTER")
    wait_for(browser, "told.some((text) => ['Copied', 'Not possible here'].includes(text))")


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_word(browser, host, images):
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    caption_images(browser, images[1:2])
    drawn = browser.execute_script("return drawFigure(images.get(1)).toDataURL('image/png')")
    figure = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))).convert("L"), int)
    count = browser.execute_script("return images.get(1).caption.words.length")
    height = round(294 * 320 / 240) + 36 + 6  # the photograph is upright
    assert figure.shape == ((count // 5 + 1) * height, 1500)
    bare, first = figure[36 : height - 6, :294], figure[36 : height - 6, 300:594]
    assert bare.mean() > 1.2 * first.mean() and (first <= bare + 3).all()
    assert (figure[:36, 300:594] < 90).any()  # the word


@pytest.mark.slow
def test_bad_files_are_told_and_the_others_get_captions(browser, host, exported, images, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "huge.png").write_bytes(png_header(20_000, 9_000))
    open_captioner(browser, host)
    browser.execute_script(CAPTION_OF)
    choose(browser, tmp_path / "text.jpg", tmp_path / "huge.png")
    assert caption_images(browser, images[:1]) == [caption_of(script_3(exported[0], images[0])[0])]
    wait_for(browser, "document.querySelectorAll('.frame p').length === 2")
    told = [element.text for element in browser.find_elements("css selector", ".frame p")]
    assert told == ["This browser cannot read it as an image.", "Its 20000 × 9000 pixels are too many."]
    assert browser.title == "Image captioner"


FAILURE = "document.querySelector('.failure:not([hidden]) span')?.textContent"


def forget(browser, host):
    """Make the browser forget what it has kept of a page."""
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": host.url[:-1], "storageTypes": "all"})


@pytest.mark.slow
@pytest.mark.parametrize(("how", "told"), [("gone", "arrive (404)"), ("cut", "arrive as it should")])
def test_a_model_that_does_not_arrive_is_one_line_and_can_be_had_later(browser, host, exported, images, how, told):
    forget(browser, host)
    getattr(host, how).add("evidence.onnx")
    try:
        host.asked.clear()
        browser.get(host.url)
        choose(browser, images[0])  # before all is loaded
        shown = wait_for(browser, FAILURE)
        assert f"evidence.onnx did not {told}" in shown and "\n" not in shown
        assert host.asked.count("evidence.onnx") == 3
    finally:
        getattr(host, how).clear()
    find(browser, ".failure button").click()
    browser.execute_script(CAPTION_OF)
    caption = wait_for(browser, "images.get(1).caption && captionOf(1)")
    assert caption == caption_of(script_3(exported[0], images[0])[0])
    assert not find(browser, ".failure").is_displayed()


@pytest.fixture
def cdn(tmp_path, monkeypatch):
    """A host of another origin with the runtime, in the place of the CDN; yields that and the runtime's folder."""
    host = Host(tmp_path / "cdn")
    place = f"npm/onnxruntime-web@{web.RUNTIME_VERSION}/dist/"
    monkeypatch.setattr(web, "_CDN", host.url.replace("127.0.0.1", "insecure.test") + place)
    folder = tmp_path / "cdn" / place
    folder.mkdir(parents=True)
    for file in web._RUNTIME.values():
        shutil.copyfile(RUNTIME / file.url, folder / file.url)
    yield host, folder
    host.server.shutdown()
    host.server.server_close()


@pytest.mark.slow
def test_a_runtime_from_the_cdn_is_checked_before_it_runs(browser, cdn, exported, images, tmp_path, monkeypatch):
    cdn_host, runtime = cdn
    captioner, made = exported
    models = [f"{name}.onnx" for name in MODELS]
    monkeypatch.setattr(
        web, "write_onnx", lambda _, __, to: [shutil.copyfile(made / name, to / name) for name in models]
    )
    web.export_page(captioner, soft_network, "float32", CONFIG, tmp_path / "page")
    page_host = Host(tmp_path / "page")
    try:
        for file in web._RUNTIME.values():
            data = (runtime / file.url).read_bytes()
            (runtime / file.url).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            forget(browser, page_host)
            browser.get(page_host.url)
            shown = wait_for(browser, FAILURE)
            assert f"{web._CDN}{file.url} is damaged, or of another version" in shown and "\n" not in shown
            (runtime / file.url).write_bytes(data)
        find(browser, ".failure button").click()
        wait_for(browser, "document.body.dataset.threads")
        browser.execute_script(CAPTION_OF)
        assert caption_images(browser, images[1:2]) == [caption_of(script_3(captioner, images[1])[0])]
        assert {pathlib.Path(name).name for name in cdn_host.asked} == {file.url for file in web._RUNTIME.values()}
    finally:
        page_host.server.shutdown()
        page_host.server.server_close()


@pytest.mark.slow
def test_an_old_browser_is_told(browser, host):
    code = {"source": "WebAssembly.validate = () => false"}
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", code)
    try:
        browser.get(host.url)
        assert "too old" in wait_for(browser, FAILURE)
        assert not find(browser, ".drop").is_displayed() and not find(browser, ".failure button").is_displayed()
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.mark.slow
@pytest.mark.parametrize(("most", "problem"), [(1, ""), (0, "It could not be captioned: it is broken.")])
def test_a_worker_that_fails_is_replaced(browser, host, exported, images, most, problem):
    """Safari's once failed at each image after the seventh."""
    path = exported[1] / "files.js"
    kept = path.read_text()
    broken = f"""let begun = 0; const decode = createImageBitmap;
        self.createImageBitmap = (...given) => {{
          if (++begun > {most}) throw new Error("it is broken");
          return decode(...given);
        }};"""
    write_undated(path, (broken + kept).encode())
    try:
        open_captioner(browser, host)
        browser.execute_script(CAPTION_OF)
        choose(browser, *images)
        numbers = range(1, len(images) + 1)
        if problem:
            assert {wait_for(browser, f"images.get({i}).problem") for i in numbers} == {problem}
        else:
            found = [wait_for(browser, f"images.get({i}).caption && captionOf({i})") for i in numbers]
            assert found == [caption_of(script_3(exported[0], image)[0]) for image in images]
    finally:
        write_undated(path, kept.encode())


# --- On a GPU ---------------------------------------------------------------------------------------------------

GPU_FILES = {file.url for file in web._GPU_RUNTIME.values()}
NO_SOFTWARE = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', { get: () => false });"
WRONG_SHADERS = """
    const compile = GPUDevice.prototype.createShaderModule;
    GPUDevice.prototype.createShaderModule = function (given) {
      return compile.call(this, { ...given, code: given.code.replaceAll("sin(", "cos(") });
    };"""
LOST_LATER = """
    const request = GPUAdapter.prototype.requestDevice;
    GPUAdapter.prototype.requestDevice = async function (...given) {
      const device = await request.apply(this, given);
      addEventListener("message", ({ data }) => data.kind === "caption" && device.destroy());
      return device;
    };"""


@pytest.fixture
def open_on_gpu(browser, host, exported):
    """Function of (what is after # in the address, code that the worker begins with) that loads the page."""
    path = exported[1] / "files.js"
    kept = path.read_text()
    ask = "const done = arguments[0]; Promise.resolve(navigator.gpu?.requestAdapter()).then((found) => done(!!found))"

    def open_page(device, code=""):
        write_undated(path, (code + kept).encode())
        host.asked.clear()
        browser.get(f"{host.url}#{device}")
        if not browser.execute_async_script(ask):
            pytest.skip("this Chromium has no WebGPU, not even by software")
        wait_for(browser, "document.body.dataset.threads")
        browser.execute_script(CAPTION_OF)

    forget(browser, host)
    yield open_page
    write_undated(path, kept.encode())
    forget(browser, host)


@pytest.mark.slow
def test_a_gpu_gives_the_same_captions(browser, open_on_gpu, host, exported, images):
    open_on_gpu("", NO_SOFTWARE)
    wait_for(browser, "document.body.dataset.device === 'webgpu'")
    assert find(browser, ".device").text.startswith("Computed by your GPU and ") and set(host.asked) >= GPU_FILES
    assert caption_images(browser, images) == [caption_of(script_3(exported[0], path)[0]) for path in images]
    assert browser.execute_script("return document.body.dataset.device") == "webgpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "code", "reason"),
    [("", "", "this browser's GPU is software"), ("wasm", NO_SOFTWARE, "")],
    ids=["software", "unwanted"],
)
def test_no_gpu_is_used_by_software_or_against_the_readers_word(browser, open_on_gpu, host, device, code, reason):
    open_on_gpu(device, code)
    wait_for(browser, f"document.querySelector('.device').title === {json.dumps(reason)}")
    settle(browser)
    assert find(browser, ".device").text.startswith("Computed by ") and "GPU" not in find(browser, ".device").text
    assert not GPU_FILES & set(host.asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "gone", "reason"),
    [
        (WRONG_SHADERS, set(), "the GPU computes another "),
        (LOST_LATER, set(), "the GPU is lost"),
        ("", GPU_FILES, "did not arrive"),
    ],
    ids=["wrong", "lost", "gone"],
)
def test_where_a_gpu_fails_wasm_captions(browser, open_on_gpu, host, exported, images, code, gone, reason):
    host.gone |= gone
    try:
        open_on_gpu("webgpu", code)
        if code == LOST_LATER:
            wait_for(browser, "document.body.dataset.device === 'webgpu'")
        assert caption_images(browser, images[1:2]) == [caption_of(script_3(exported[0], images[1])[0])]
        assert reason in wait_for(browser, "document.querySelector('.device').title")
        assert browser.execute_script("return document.body.dataset.device") == "wasm"
    finally:
        host.gone.clear()
