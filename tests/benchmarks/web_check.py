"""An exported web page against script 3: seconds to load and to caption, and captions unchanged.

PYTHONPATH=.:tests python tests/benchmarks/web_check.py --page DIR --captions FILE [--count N] [--threads 1]

The page, of `--export DIR --format web --web_runtime FOLDER`, captions in Chromium the images that script 3's
captions.jsonl names, all at once. It loads twice before, the second time from what the browser has kept.
"""

import argparse
import collections
import json
import sys
import tempfile
import threading
import time

from browser import find, start_chromium
from support import local_server


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
                print(f"{visit} visit: ready after {seconds:.1f} s; threads: {threads}")
            found, seconds = caption_images(browser, list(expected))
        server.shutdown()
    counts = collections.Counter(found[name] == caption for name, caption in expected.items())
    print(f"{counts[True]} of {len(expected)} captions are script 3's; {seconds / len(expected):.2f} s an image")


def load_page(browser, address):
    """Open the page; the seconds until it can caption."""
    browser.get("about:blank")
    start = time.perf_counter()
    browser.get(address)
    wait_for(browser, "document.body.dataset.threads")
    return time.perf_counter() - start


def caption_images(browser, paths):
    """Caption images; dict of path to caption, None for what the page cannot read, and the seconds of all."""
    start = time.perf_counter()
    find(browser, "#choose").send_keys("\n".join(paths))
    wait_for(browser, f"[...images.values()].filter((i) => i.caption || i.problem).length === {len(paths)}")
    seconds = time.perf_counter() - start
    texts = browser.execute_script("return [...images.values()].map((i) => i.caption && captionText(i.caption))")
    return dict(zip(paths, texts, strict=True)), seconds


def wait_for(browser, condition):
    while not browser.execute_script(f"return {condition}"):
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
