"""A tiny data set in COCO's layout, with features made up, so that the tests need neither downloads nor InceptionV3."""

import contextlib
import csv
import gc
import hashlib
import http.server
import json
import os
import pathlib
import random
import signal
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import strategies  # noqa: F401  before a test draws examples: the same ones in every run
from browser import emulate, start_chromium
from support.process import release_memory

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in the scripts, also where a test imports TensorFlow first

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}
THINGS = ("dog", "cat", "boat")
IMAGES = 24

SMALL = "--encoder_dim 8 --embedding_dim 12 --units 16 --batch_size 16 --plot_images 2 --learning_rate 0.01".split()


def write_coco(folder, count=IMAGES, captions_each=5):
    """Draw `count` plain images with five captions each, as a manual download of COCO 2014 leaves them."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2014").mkdir()
    images, annotations = [], []
    for number in range(1, count + 1):
        colour = list(COLOURS)[number % 4]
        thing = THINGS[number % 3]
        name = f"COCO_train2014_{number:012d}.jpg"
        size = (64, 48) if number % 2 else (40, 60)
        Image.new("RGB", size, COLOURS[colour]).save(folder / "train2014" / name)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        wordings = ("A {} {}.", "There is a {} {} here", "a {} {} on the left, it's near", "The {} {}", "{} {} alone")
        for wording in wordings[:captions_each]:
            caption = wording.format(colour, thing)
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
    data = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations" / "captions_train2014.json").write_text(json.dumps(data))
    return folder


def write_features(folder, count=IMAGES):
    """Fill a feature cache with noise, as another program might."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        features = rng.standard_normal((64, 2048), np.float32).clip(0).astype(np.float16)
        np.save(folder / f"COCO_train2014_{number:012d}.npy", features)


def options(root):
    """The options that make the three scripts work on the data set under `root`."""
    places = {"coco_dir": root / "coco", "data_dir": root / "data", "run_dir": root / "run"}
    given = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    return [*given, "--num_examples", "none", "--inception_weights", "random", *SMALL]


def rows(root):
    """The rows of a run's history.csv, list of dict of str."""
    with (root / "run" / "history.csv").open() as file:
        return list(csv.DictReader(file))


def weights(root, kind="last", run="run"):
    """The newest checkpoint's weights and optimizer state, dict of name to array."""
    import tensorflow as tf  # here and below, as tests that need no TensorFlow shall not wait for it

    numbers = [int(path.stem.removeprefix("ckpt-")) for path in (root / run / kind).glob("ckpt-*.index")]
    reader = tf.train.load_checkpoint(root / run / kind / f"ckpt-{max(numbers)}")
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    return {name: reader.get_tensor(name) for name in names}


def pytest_runtest_setup():
    """A test draws the same random numbers whichever tests ran before it, also where it gives no seed."""
    random.seed(0)
    np.random.seed(0)


_LEFT = [7e8]  # bytes that this process took when graphs were last forgotten


@pytest.fixture(autouse=True)
def little_memory():
    yield
    forget_graphs(2e8)


@pytest.fixture(autouse=True, scope="module")
def little_memory_after_a_module():
    yield
    forget_graphs(5e7)


def forget_graphs(most):
    """Forget graphs where they take over `most` bytes, as a tf.function of a module keeps all it ever made."""
    if memory_taken() > _LEFT[0] + most and "tensorflow" in sys.modules:
        import tensorflow as tf

        kind = type(tf.function(len))
        for each in gc.get_objects():
            if type(each) is kind:
                each._function_cache.clear()  # it is traced again where it is needed again
        release_memory()
        _LEFT[0] = memory_taken()


def memory_taken():
    """The bytes of memory that this process takes; 0 where the system does not say it as Linux does."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.fixture
def coco(tmp_path):
    """The root of a tiny data set whose features are cached and which is not prepared yet."""
    write_coco(tmp_path / "coco")
    write_features(tmp_path / "data" / "features")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The root of a tiny data set, prepared and trained for two epochs; tests only read it."""
    import data_utils
    import train_image_caption_model

    root = pathlib.Path(tmp_path_factory.mktemp("trained"))
    write_coco(root / "coco")
    write_features(root / "data" / "features")
    data_utils.main(options(root))
    train_image_caption_model.main([*options(root), "--epochs", "2"])
    return root


def let_time_pass(folder):
    """Wait until what is written has a later time than what there is: many systems count in hundredths of a second."""
    clock = folder / ".clock"
    clock.touch()
    begun = clock.stat().st_mtime_ns
    while clock.stat().st_mtime_ns == begun:
        clock.touch()
    clock.unlink()


@contextlib.contextmanager
def full_disk(size):
    """Inside the block no file of this process may grow past `size` bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def soon():
    """A test that takes over a minute, say because it waits for ever, fails."""

    def fail(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with start_chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def browser(chromium):
    """A browser of 1200x1400 pixels that is light, has asked for nothing special, and must not complain."""
    chromium.get("about:blank")
    chromium.execute_cdp_cmd("Storage.clearDataForStorageKey", {"storageKey": "file:///", "storageTypes": "all"})
    chromium.get_log("browser")
    emulate(chromium)
    yield chromium
    assert chromium.get_log("browser") == []


class FileServer:
    """An HTTP server over a folder; `publish` makes captioning.data.coco_download expect an archive's size and hash."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch, self.requests = folder, monkeypatch, []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                outer.requests.append(self.path)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        monkeypatch.setattr("captioning.data.coco_download._COCO_URL", self.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    def publish(self, archive):
        from captioning.data import coco_download

        data = archive.read_bytes()
        known = (len(data), hashlib.sha256(data).hexdigest())
        self.monkeypatch.setitem(coco_download._COCO_ARCHIVES, archive.name, known)


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    served = FileServer(folder, monkeypatch)
    yield served
    served.http.shutdown()
    served.http.server_close()
