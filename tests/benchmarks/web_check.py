"""An exported web page against script 3: captions unchanged, and seconds to load and to caption.

PYTHONPATH=.:tests python tests/benchmarks/web_check.py --page DIR --captions FILE [--count N] [--threads 1]

The page, of `--export DIR --format web --web_runtime FOLDER`, loads twice in Chromium, the second time from what the
browser has kept. Then it captions, all at once, the images that captions.jsonl of script 3 names (--beam_width 1,
--extract_precision float32). Images with an embedded colour profile are counted apart too.
"""

import argparse
import json
import sys
import tempfile
import threading
import time

from PIL import Image

from browser import find, start_chromium, wait_for
from support import local_server

LONGEST = 900  # seconds for all images


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", required=True, help="folder of the page")
    parser.add_argument("--captions", required=True, help="captions.jsonl of script 3, greedy")
    parser.add_argument("--count", type=int, default=200, help="images at the most (default: 200)")
    parser.add_argument("--threads", type=int, choices=(1,), help="send no headers that let the page use several")
    options = parser.parse_args(argv)
    with open(options.captions, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    expected = {record["image"]: record["caption"] for record in records if "caption" in record}
    expected = dict(list(expected.items())[: options.count])
    if options.threads == 1:
        local_server._HEADERS.pop("Cross-Origin-Embedder-Policy")
    with tempfile.TemporaryDirectory() as profile, local_server.make_server(options.page, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with start_chromium(profile) as browser:
            for visit in ("first", "second"):
                seconds = load_page(browser, f"http://127.0.0.1:{server.server_port}/")
                threads = browser.execute_script("return document.body.dataset.threads")
                print(f"{visit} visit: ready after {seconds:.1f} s; threads: {threads}", flush=True)
            found = caption_images(browser, list(expected))
        server.shutdown()
    compare(expected, found)


def load_page(browser, address):
    """Open the page; the seconds until it can caption."""
    browser.get("about:blank")
    start = time.perf_counter()
    browser.get(address)
    wait_for(browser, "document.body.dataset.threads")
    return time.perf_counter() - start


def caption_images(browser, paths):
    """Caption images and print what it takes. Dict of path to the greedy caption, or None if it cannot be read."""
    done = f"[...images.values()].filter((i) => i.problem || {{}}).length === {len(paths)}"
    browser.execute_script("document.querySelector('[name=beams][value=\"1\"]').click()")
    start = time.perf_counter()
    find(browser, "#choose").send_keys("\n".join(paths))
    wait_for(browser, done.format("i.caption"), LONGEST)
    print(f"{(time.perf_counter() - start) / len(paths):.2f} s an image", flush=True)
    texts = browser.execute_script("return [...images.values()].map((i) => i.caption && captionText(i.caption))")
    start = time.perf_counter()
    wait_for(browser, done.format("i.article.querySelector('[data-evidence]')"), LONGEST)
    print(f"{(time.perf_counter() - start) / len(paths):.2f} s more for the evidence of its words", flush=True)
    start = time.perf_counter()
    browser.execute_script("document.querySelector('[name=beams][value=\"5\"]').click()")
    wait_for(browser, done.format("i.caption?.beams === 5"), LONGEST)
    print(f"{(time.perf_counter() - start) / len(paths):.2f} s to caption it once more, with 5 beams")
    return dict(zip(paths, texts, strict=True))


def compare(expected, found):
    profiled = {path for path in expected if "icc_profile" in Image.open(path).info}
    same = {path for path, caption in expected.items() if found[path] == caption}
    for path in expected.keys() - same:
        print(f"{path}\n  script 3: {expected[path]}\n  the page: {found[path]}")
    print(f"{len(same)} of {len(expected)} captions are script 3's, {len(set(expected.values()))} different ones;")
    print(f"{len(same & profiled)} of {len(profiled)} where a colour profile is embedded")


if __name__ == "__main__":
    main(sys.argv[1:])
