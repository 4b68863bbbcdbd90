"""Script 1: find or download the captioned images, split them, build the vocabulary, cache InceptionV3 features.

python data_utils.py [--dataset coco|demo] [--shard I/N] [--<field> VALUE ...]
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import shlex
import warnings

from command_line import UserError, parse_command_line, run_script
from demo_scenes import draw_demo
from downloads import download, download_all, unpack
from files import STALE, locked, read_json, remove_leftovers, replacing, write_json, write_npy
from karpathy_splits import read_karpathy
from rounding import round_weights

import keras
import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from tqdm import tqdm

LOCATIONS, CHANNELS = 64, 2048  # P and F: InceptionV3's last 8x8 grid, row by row
IMAGE_SIZE = 299
LONGEST_NAME = 200  # bytes; file systems take 255, and temporary files' names are longer
EXTRACT_WORKERS = 3  # batches under way at a time, each read and computed by a thread of its own
CALIBRATION_IMAGES = 64  # training images from which random weights get their batch-norm statistics

SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(4)

COCO_URL = "http://images.cocodataset.org"
COCO_ARCHIVES = {  # size in bytes and SHA-256
    "annotations/annotations_trainval2014.zip": (
        252_872_794,
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    ),
    "zips/train2014.zip": (
        13_510_573_713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    ),
}

# What the prepared files depend on: a later script must be run with the same values.
PREPARED_SETTINGS = (
    "dataset",
    "coco_dir",
    "coco_split",
    "karpathy_json",
    "images",
    "num_examples",
    "val_fraction",
    "vocab_size",
    "max_words",
    "seed",
    "inception_weights",
    "features_dir",
)


def add_options(parser):
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=parse_shard,
        help="fetch and extract only the I-th of N shares of the images; when all are done, run without --shard",
    )


def parse_shard(text):
    """(I, N) of "I/N", the I-th of N shares, from 1 on."""
    match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard takes I/N, such as 2/4 for the second of four shares, not {text!r}")
    return int(match[1]), int(match[2])


def main(argv):
    config, options = parse_command_line(argv, __doc__, add_options)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    if options.shard:
        with locked(features_folder(config), "features", shared=True):
            extract_shard(*options.shard, config)
        return
    with locked(config.data_dir, "data"), locked(features_folder(config), "features"):
        pathlib.Path(config.data_dir, "settings.json").unlink(missing_ok=True)
        remove_leftovers(features_folder(config))
        splits = read_splits(config)
        images = [image for split in splits.values() for image in split]
        skipped = fetch_images(images, config)
        skipped |= cache_features(images, skipped, calibration_paths(splits, config), config)
        save_prepared(splits, skipped, config)


def extract_shard(number, count, config):
    """Fetch and cache the images of one share, beside others that write to the same folders from other hosts.

    Raises:
      UserError: the shards would get into each other's way, or what an unsharded run raises.
    """
    if config.image_source == "zip":
        raise UserError("--shard fetches its own images only: give --image_source each (those at hand are not fetched)")
    remove_leftovers(features_folder(config), STALE)
    splits = read_splits(config, (number, count))
    calibration = calibration_paths(splits, config)
    absent = [path for path in calibration if not path.is_file()]
    # They belong to several shares, and two hosts must not download to one file.
    if config.inception_weights == "random" and absent and not random_statistics(config).exists():
        raise UserError(f"{absent[0]} is missing, and random weights need it in every shard: run without --shard")
    images = [image for split in splits.values() for image in split][number - 1 :: count]
    skipped = fetch_images(images, config, shared=True)
    skipped |= cache_features(images, skipped, calibration, config)
    print(
        f"shard {number} of {count} is done: {len(images) - len(skipped)} images cached, {len(skipped)} skipped; "
        "when all shards are done, run the same command without --shard"
    )


# --- Captions ---------------------------------------------------------------------------------------------------


def read_splits(config, shard=None):
    """The images with their captions, by split: train and validation, and test where the data set has one.

    With a `shard`, (number, count), what is shared is only added to, and downloaded to a file of the shard's own.
    """
    if config.dataset == "karpathy":
        splits = read_karpathy(config.karpathy_json, config.images, config.max_words, count_words, image_problem)
        train = draw_examples(splits["train"], config.num_examples, config.seed)
        return {"train": train, "validation": splits["val"], "test": splits["test"]}
    if config.dataset == "demo":
        with locked(config.coco_dir, "download", shared=shard is not None):
            draw_demo(config.coco_dir, config.demo_images, config.seed, replace=shard is None)
    images = read_captions(find_annotations(config, shard), config.max_words)
    images = draw_examples(images, config.num_examples, config.seed)
    train, validation = split_by_image(images, config.val_fraction, config.seed)
    return {"train": train, "validation": validation}


def find_annotations(config, shard=None):
    """The path of the captions file in `coco_dir`; COCO 2014's is downloaded where it is missing."""
    path = pathlib.Path(config.coco_dir, "annotations", f"captions_{config.coco_split}.json")
    if not path.is_file():
        if config.coco_split not in ("train2014", "val2014"):
            raise UserError(f"{path} is missing: put it there, or set --coco_dir and --coco_split to where it is")
        name = "annotations/annotations_trainval2014.zip"
        fetch_archive(name, config, wanted=lambda name: name.endswith(".json"), shard=shard)
    return path


def fetch_archive(name, config, wanted=None, shard=None):
    """Download one of COCO_ARCHIVES into `coco_dir` and unpack it there; a shard deletes its own copy after that."""
    size, sha256 = COCO_ARCHIVES[name]
    archive = pathlib.Path(config.coco_dir, pathlib.PurePosixPath(name).name)
    own = shard is not None and not archive.is_file()
    if own:
        archive = archive.with_stem("{}_shard_{}_of_{}".format(archive.stem, *shard))
    with locked(config.coco_dir, "download", shared=shard is not None):
        download(f"{COCO_URL}/{name}", archive, size=size, sha256=sha256)
        unpack(archive, config.coco_dir, wanted)
    if own:
        archive.unlink()


def read_captions(path, max_words):
    """Read a captions file in COCO's layout.

    Records that cannot be used (a caption that is empty or longer than `max_words`, an unknown image, a file name
    with a folder in it) are counted, and an example of each kind is printed.

    Args:
      path: path of the JSON file.
      max_words: int, longest caption to train on, in words.

    Returns:
      list of {"image_id", "file_name", "url", "captions", "references"}, ordered by image id: the captions to
      train on, and all of them for the metrics. Each image has at least one caption.

    Raises:
      UserError: the file is not JSON, has not COCO's keys, or has no usable caption.
    """
    mend = "put COCO's own file there, or delete it and run python data_utils.py again to download it"
    data = read_json(path, mend)
    if not (
        isinstance(data, dict) and isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list)
    ):
        raise UserError(f'{path} has not the lists "images" and "annotations" of a COCO captions file: {mend}')

    bad = collections.defaultdict(list)
    images, stems = {}, set()
    for record in data["images"]:
        if problem := image_problem(record, images, stems):
            bad[problem].append(record)
            continue
        stems.add(pathlib.PurePath(record["file_name"]).stem)
        images[record["id"]] = {
            "image_id": record["id"],
            "file_name": record["file_name"],
            "url": record.get("coco_url"),
            "captions": [],
            "references": [],
        }

    records = []
    for record in data["annotations"]:
        if problem := caption_problem(record, images):
            bad[problem].append(record)
        else:
            records.append(record)
    for record, words in zip(records, count_words([record["caption"] for record in records]), strict=True):
        image = images[record["image_id"]]
        if words > 0:
            image["references"].append(record["caption"])
        if 0 < words <= max_words:
            image["captions"].append(record["caption"])
        else:
            bad["a caption without words" if words == 0 else f"longer than {max_words} words"].append(record)

    for problem, examples in bad.items():
        print(f"{path}: {len(examples)} left out, {problem}, such as {repr(examples[0])[:160]}")
    usable = [images[image_id] for image_id in sorted(images) if images[image_id]["captions"]]
    if len(usable) < 2:
        raise UserError(f"{path} has captions for {len(usable)} images, and a split needs 2: {mend}")
    return usable


def image_problem(record, images, stems):
    """Why an image record cannot be used, or None; the file name comes from others and may not lead elsewhere."""
    if (
        not isinstance(record, dict)
        or type(record.get("id")) is not int
        or not isinstance(record.get("file_name"), str)
    ):
        return "an image without id or file_name"
    name = record["file_name"]
    if not name.isprintable() or not name:
        return "a file name that is none"
    if len(name.encode()) > LONGEST_NAME:
        return f"a file name of more than {LONGEST_NAME} bytes"
    if pathlib.PurePosixPath(name).name != name or pathlib.PureWindowsPath(name).name != name or name.startswith("."):
        return "a file name with a folder in it"
    if record["id"] in images or pathlib.PurePath(name).stem in stems:
        return "an image whose id or file name another has"
    return None


def caption_problem(record, images):
    if not isinstance(record, dict) or not isinstance(record.get("caption"), str):
        return "a caption that is no text"
    if any("\ud800" <= letter <= "\udfff" for letter in record["caption"]):
        return "a caption with half a character"
    if type(record.get("image_id")) is not int or record["image_id"] not in images:
        return "a caption of an image that is not listed"
    return None


def draw_examples(images, num_examples, seed):
    """Keep `num_examples` captions, drawn at random with a fixed seed, and the images that they belong to."""
    total = sum(len(image["captions"]) for image in images)
    if num_examples is None or num_examples >= total:
        return images
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(seed).choice(total, num_examples, replace=False)] = True
    drawn = iter(drawn)
    kept = [{**image, "captions": [caption for caption in image["captions"] if next(drawn)]} for image in images]
    return [image for image in kept if image["captions"]]


def split_by_image(images, val_fraction, seed):
    """Split into training and validation images, so that no image has captions in both."""
    if len(images) < 2:
        raise UserError("a split into training and validation needs 2 images: raise --num_examples")
    return train_test_split(images, test_size=val_fraction, random_state=seed)


# --- Vocabulary -------------------------------------------------------------------------------------------------


def standardize(captions):
    """Lower-case words of letters, digits and inner apostrophes, one blank between them. (N,) strings -> (N,)."""
    captions = tf.strings.lower(captions, encoding="utf-8")
    captions = tf.strings.regex_replace(captions, r"[^\p{L}\p{M}\p{N}']+", " ")
    return tf.strings.strip(tf.strings.regex_replace(captions, r"(^|\s)'+|'+(\s|$)", " "))


def text_vectorizer(vocabulary=None, max_tokens=None):
    """Keras's text tool: captions (N,) -> ragged word ids (N, words), without <start> and <end>."""
    words = None if vocabulary is None else vocabulary[START:]  # Keras itself puts <pad> and <unk> before them
    return keras.layers.TextVectorization(max_tokens, standardize=standardize, ragged=True, vocabulary=words)


def count_words(captions):
    """The number of words of each caption. list of N str -> list of N int."""
    if not captions:
        return []
    return tf.strings.split(standardize(tf.constant(captions))).row_lengths().numpy().tolist()


def build_vocabulary(train, vocab_size):
    """The `vocab_size` most frequent words of the training captions, the four special words first."""
    vectorizer = text_vectorizer(max_tokens=vocab_size - 2)  # <start> and <end> stand in no caption
    vectorizer.adapt([caption for image in train for caption in image["captions"]])
    return [*SPECIAL_WORDS, *(str(word) for word in vectorizer.get_vocabulary()[2:])]


def encode_captions(images, vocabulary):
    """The images with "ids" beside "captions": <start>, the words, <end>, as positions in the vocabulary."""
    captions = [caption for image in images for caption in image["captions"]]
    ids = iter(text_vectorizer(vocabulary)(tf.constant(captions)).to_list())
    return [{**image, "ids": [[START, *next(ids), END] for _ in image["captions"]]} for image in images]


# --- Images -----------------------------------------------------------------------------------------------------


def image_path(image, config):
    if config.dataset == "karpathy":
        return pathlib.Path(config.images, image["folder"], image["file_name"])
    return pathlib.Path(config.coco_dir, config.coco_split, image["file_name"])


def fetch_images(images, config, shared=False):
    """Download the images that have neither a file nor a cached feature.

    Args:
      shared: bool, beside other shards, which fetch other images.

    Returns:
      dict of file name to reason, for those that could not be had.
    """
    missing = [
        image
        for image in images
        if not image_path(image, config).is_file() and not feature_path(image, config).is_file()
    ]
    if not missing:
        return {}
    if config.image_source == "zip" and config.dataset != "karpathy":
        wanted = {image["file_name"] for image in missing}
        fetch_archive(f"zips/{config.coco_split}.zip", config, lambda name: pathlib.PurePosixPath(name).name in wanted)
        return {
            image["file_name"]: "not in the zip file" for image in missing if not image_path(image, config).is_file()
        }
    skipped = {
        image["file_name"]: f"{image_path(image, config)} is missing, and the captions file gives no coco_url"
        for image in missing
        if not isinstance(image["url"], str)
    }
    jobs = [(image["url"], image_path(image, config)) for image in missing if image["file_name"] not in skipped]
    if not jobs:
        return skipped
    with locked(config.coco_dir, "download", shared):
        failed = download_all(jobs, config.download_workers)
    return skipped | {pathlib.Path(path).name: reason for path, reason in failed}


def load_image(path):
    """Read any image that Pillow reads, as InceptionV3 wants it.

    Returns:
      uint8 (299, 299, 3), RGB, upright, transparent parts white, squeezed to a square.

    Raises:
      ValueError: the file is missing, damaged or larger than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(upright_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def upright_rgb(image, smallest=IMAGE_SIZE):
    """An opened Pillow image as upright RGB, decoded no larger than `smallest` pixels a side needs."""
    if image.format == "EPS":
        raise OSError("PostScript is a program, and pictures are not run")  # as Pillow would, where Ghostscript is
    image.draft("RGB", (smallest, smallest))  # a JPEG file is then decoded at 1/2, 1/4 or 1/8 of its size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies even what is RGB


# --- Features ---------------------------------------------------------------------------------------------------


def has_fast_bfloat16():
    """Whether the device that TensorFlow computes on multiplies bfloat16 faster than float32."""
    graphics = tf.config.list_physical_devices("GPU")
    if graphics:
        return tf.config.experimental.get_device_details(graphics[0]).get("compute_capability", (0, 0)) >= (8, 0)
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux: float32 is right everywhere
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def features_folder(config):
    return pathlib.Path(config.features_dir or pathlib.Path(config.data_dir, "features"))


def feature_path(image, config):
    return features_folder(config) / (pathlib.PurePath(image["file_name"]).stem + ".npy")


def is_feature_file(path):
    """Whether a cached feature file is whole: (64, 2048), float16 or float32, every number finite."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    except SystemError:  # of Python 3.11, whose parser, with which NumPy reads a file's header, is not for many threads
        return is_feature_file(path)
    return (
        features.shape == (LOCATIONS, CHANNELS)
        and features.dtype in (np.float16, np.float32)
        and features.flags.c_contiguous
        and bool(np.isfinite(features).all())
    )


def calibration_paths(splits, config):
    """The first training images, the same for every shard."""
    return [image_path(image, config) for image in splits["train"][:CALIBRATION_IMAGES]]


def cache_features(images, skipped, calibration, config):
    """Write the features of every image that has none in the cache.

    Args:
      images: list of images.
      skipped: dict of file name to reason, images not to try.
      calibration: list of image files, as for feature_network.

    Returns:
      dict of file name to reason, for images that cannot be decoded.

    Raises:
      UserError: the weights cannot be had, the cache is another network's, or the disk is full.
    """
    folder = features_folder(config)
    images = [image for image in images if image["file_name"] not in skipped]
    with cancelling_pool() as pool:
        whole = list(
            tqdm(
                pool.map(is_feature_file, [feature_path(image, config) for image in images]),
                "checking the cache",
                total=len(images),
                unit=" images",
            )
        )
    missing = [image for image, is_whole in zip(images, whole, strict=True) if not is_whole]
    print(f"features: {sum(whole)} of {len(images)} are in {folder} already")
    if not missing:
        return {}

    network = feature_network(config, calibration)
    targets = {image_path(image, config): feature_path(image, config) for image in missing}
    skipped = {}
    with extraction_graphs(config), tqdm(total=len(targets), desc="extracting features", unit=" images") as bar:
        for paths, features, failed in extract_features(network, list(targets), config.extract_batch):
            write_features([targets[path] for path in paths], features, config)
            for path, reason in failed:
                bar.write(reason)
                skipped[path.name] = reason
            bar.update(len(paths) + len(failed))
    return skipped


def write_features(paths, features, config):
    """Write each image's features (B, P, F) as a .npy file of its own."""
    stored = tf.cast(features, config.feature_dtype).numpy()  # (B, P, F); NumPy is several times slower
    for path, feature in zip(paths, stored, strict=True):
        write_npy(path, feature)


def extracts_in_bfloat16(config):
    """Whether InceptionV3 is to compute in bfloat16. TensorFlow rewrites graphs for CPUs only."""
    if config.extract_precision == "auto":
        return has_fast_bfloat16() and not tf.config.list_physical_devices("GPU")
    return config.extract_precision == "bfloat16"


@contextlib.contextmanager
def extraction_graphs(config):
    """Inside the block TensorFlow rewrites graphs so that extraction is fast, into bfloat16 where config asks for it.

    The options are the whole process's: decoding, whose captions are to be float32's, stays outside.
    """
    # The arithmetic optimizer moves ReLUs behind pooling and concatenation, where convolutions cannot take them in.
    set_rewriting(bfloat16=extracts_in_bfloat16(config), arithmetic=False)
    try:
        yield
    finally:
        set_rewriting(bfloat16=False, arithmetic=True)


def set_rewriting(bfloat16, arithmetic):
    tf.config.optimizer.set_experimental_options(
        {"auto_mixed_precision_onednn_bfloat16": bfloat16, "arithmetic_optimization": arithmetic}
    )


def extract_features(network, paths, batch_size):
    """Run the network over image files; while it computes one batch, others are read.

    Args:
      network: function, as feature_network returns.
      paths: list of image files.
      batch_size: int, B.

    Yields:
      (paths of a batch's readable images, their features as float32 (B, P, F), list of (path, reason) of the others)
    """
    with cancelling_pool(EXTRACT_WORKERS) as pool:
        running = collections.deque()
        for start in range(0, len(paths), batch_size):
            running.append(pool.submit(extract_batch, network, paths[start : start + batch_size]))
            if len(running) > EXTRACT_WORKERS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@contextlib.contextmanager
def cancelling_pool(workers=None):
    """A pool of threads which, when the block ends, by Ctrl-C for example, begin no more and are not waited for."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def extract_batch(network, paths):
    readable, pixels, failed = [], [], []
    for path in paths:
        try:
            pixels.append(load_image(path))
            readable.append(path)
        except ValueError as error:
            failed.append((path, str(error)))
    if not readable:
        return [], np.zeros((0, LOCATIONS, CHANNELS), np.float32), failed
    return readable, network(tf.constant(np.stack(pixels))).numpy(), failed  # (B, P, F)


def feature_network(config, calibration_paths=None):
    """InceptionV3 without its top, as one graph.

    Args:
      config: Config; its `inception_weights` are imagenet, random, or the path of a weights file.
      calibration_paths: image files from which `random` weights get their batch-norm statistics, the first time that
        a cache is filled; None where the network must be the one that filled it.

    Returns:
      function of uint8 (B, 299, 299, 3) -> float32 (B, 64, 2048)

    Raises:
      UserError: the weights cannot be had, or the cache was filled with others.
    """
    weights = config.inception_weights
    if weights not in ("imagenet", "random") and not pathlib.Path(weights).is_file():
        raise UserError(f"--inception_weights {weights} is no file: name one, or take imagenet or random")
    check_cache_owner(config, claim=calibration_paths is not None)
    try:
        inception = keras.applications.InceptionV3(
            include_top=False,
            weights=None if weights == "random" else weights,
            input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        )
    except Exception as error:  # a download or an HDF5 file, each with errors of its own
        raise UserError(
            f"InceptionV3 cannot take the weights {weights} ({str(error).splitlines()[0]}): "
            "name a weights file without the top by --inception_weights"
        ) from error
    if weights == "random":
        set_random_weights(inception, config, calibration_paths)
    rounded = extracts_in_bfloat16(config)
    factors = round_weights(inception) if rounded else 1.0

    # As constants the weights let TensorFlow fold batch norm into the convolutions, which variables do not.
    trainable = [variable.numpy() for variable in inception.trainable_variables]
    others = [variable.numpy() for variable in inception.non_trainable_variables]

    @tf.function(input_signature=[tf.TensorSpec((None, IMAGE_SIZE, IMAGE_SIZE, 3), tf.uint8)])
    def network(pixels):
        values = tf.cast(pixels, tf.float32)
        scaled = 2.0 * values - 255.0 if rounded else values / 127.5 - 1.0
        constants = [tf.constant(value) for value in trainable], [tf.constant(value) for value in others]
        grid, _ = inception.stateless_call(*constants, scaled, training=False)  # (B, 8, 8, F)
        return tf.reshape(grid, (-1, LOCATIONS, CHANNELS)) / factors  # (B, P, F)

    return network


def check_cache_owner(config, claim):
    """Raise UserError where the cached features are another network's: the two do not mix.

    Args:
      claim: bool, whether to note in a cache that names no network that it is this one's from now on; without, such
        a cache, filled by another program, is refused.
    """
    weights = config.inception_weights
    if weights == "random":
        identity = f"random, seed {config.seed}"
    elif weights == "imagenet":
        identity = weights
    else:
        identity = "sha256 " + hashlib.sha256(pathlib.Path(weights).read_bytes()).hexdigest()
    note = features_folder(config) / "network.json"
    if note.exists():
        owner = read_json(note, f"delete {note.parent} and run python data_utils.py again")
        if owner != {"inception_weights": identity}:
            raise UserError(
                f"the features in {note.parent} were made with other weights than {weights} ({owner}): "
                "give another --features_dir, or delete that folder, and run python data_utils.py again"
            )
    elif claim:
        write_json(note, {"inception_weights": identity})
    else:
        raise UserError(
            f"the features in {note.parent} were made by another program, so that its network must read new pictures: "
            "train on a --features_dir that python data_utils.py has filled"
        )


def set_random_weights(inception, config, calibration_paths):
    """He-normal kernels from the seed, and batch-norm statistics from one pass over some training images.

    Without the statistics the activations vanish. They are kept beside the features, so that the user's own
    pictures go through the very same network.
    """
    rng = np.random.default_rng(config.seed)
    norms = [layer for layer in inception.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in inception.layers:
        if isinstance(layer, keras.layers.Conv2D):
            fan_in = np.prod(layer.kernel.shape[:3])
            layer.kernel.assign(rng.standard_normal(layer.kernel.shape, np.float32) * np.sqrt(2.0 / fan_in))

    statistics = random_statistics(config)
    if not statistics.exists():
        calibrate(inception, norms, calibration_paths)
        with replacing(statistics) as temporary:
            np.savez(temporary, *(value for norm in norms for value in (norm.moving_mean, norm.moving_variance)))
    with np.load(statistics) as saved:
        values = list(saved.values())
    for norm, mean, variance in zip(norms, values[0::2], values[1::2], strict=True):
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(variance)


def random_statistics(config):
    return features_folder(config) / "random_statistics.npz"


def calibrate(inception, norms, image_paths):
    """Set each batch-norm layer's statistics to those of the images, in one forward pass."""
    pixels = []
    for path in image_paths:
        try:
            pixels.append(load_image(path))
        except ValueError:
            continue  # named and counted when its own turn comes
    if not pixels:
        raise UserError("no training image can be read, and random weights need some: check the image folder")
    for norm in norms:
        norm.momentum = 0.0
    inception(np.stack(pixels) / np.float32(127.5) - 1, training=True)


# --- Prepared data ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What data_utils.py leaves for the later scripts.

    train, validation, test: lists of {"image_id", "file_name", "captions", "references", "ids"}; only Karpathy's data
      sets have a test split.
    vocabulary: list of V words.
    feature_mean: float32 (F,), each channel's mean over training images and locations.
    feature_std: float, standard deviation of the features less these means.
    """

    train: list
    validation: list
    test: list
    vocabulary: list
    feature_mean: np.ndarray
    feature_std: float


def measure_features(images, config, count=500):
    """Each channel's mean (F,), and the standard deviation about them (), over the first `count` images at the most."""
    sample = np.stack([np.load(feature_path(image, config)) for image in images[:count]])  # (count, P, F)
    mean = sample.mean((0, 1), dtype=np.float32)  # (F,)
    squares = sum(float(np.square(features - mean).mean(dtype=np.float32)) for features in sample)
    return mean, max((squares / len(sample)) ** 0.5, 1e-6)


def save_prepared(splits, skipped, config):
    """Encode the captions and write the prepared files; settings.json comes last and vouches for the others."""
    splits = {name: [image for image in split if image["file_name"] not in skipped] for name, split in splits.items()}
    for name, images in splits.items():
        if not images:
            raise UserError(f"no readable {name} images are left ({len(skipped)} skipped): check the image folder")
    folder = pathlib.Path(config.data_dir)
    remove_leftovers(folder)
    vocabulary = build_vocabulary(splits["train"], config.vocab_size)
    write_json(folder / "vocabulary.json", vocabulary)
    for name, images in splits.items():
        write_json(folder / f"{name}.json", encode_captions(images, vocabulary))
        print(f"{name}: {len(images)} images, {sum(len(image['captions']) for image in images)} captions")
    write_json(folder / "skipped.json", skipped, indent=1)
    mean, std = measure_features(splits["train"], config)
    with replacing(folder / "feature_statistics.npz") as temporary:
        np.savez(temporary, mean=mean, std=std)
    write_json(folder / "settings.json", {name: getattr(config, name) for name in PREPARED_SETTINGS}, indent=1)
    print(f"vocabulary: {len(vocabulary)} words; {len(skipped)} images skipped (see {folder / 'skipped.json'})")


def load_prepared(config):
    """Read what data_utils.py prepared.

    Returns:
      Prepared

    Raises:
      UserError: nothing is prepared, it was prepared with other settings, or a file or feature is missing or damaged.
    """
    folder = pathlib.Path(config.data_dir)
    command = f"run python data_utils.py {dataset_option(config)}"
    settings = read_json(folder / "settings.json", command, dict)
    for name in PREPARED_SETTINGS:
        if settings.get(name) != getattr(config, name):
            raise UserError(
                f"{folder} was prepared with --{name} {quote(settings.get(name))}, not {quote(getattr(config, name))}: "
                f"give --{name} {quote(settings.get(name))}, or run python data_utils.py with the new value"
            )
    names = ("train", "validation", "test") if config.dataset == "karpathy" else ("train", "validation")
    vocabulary = read_vocabulary(folder / "vocabulary.json", command)
    splits = [read_json(folder / f"{name}.json", command, list) for name in names]
    for name, split in zip(names, splits, strict=True):
        whole = sum(is_prepared_image(image, len(vocabulary)) for image in split)
        if not split or whole < len(split):
            raise UserError(f"{folder / name}.json is damaged ({whole} of {len(split)} images are whole): {command}")
    for image in (image for split in splits for image in split):
        path = feature_path(image, config)
        if not path.is_file():
            raise UserError(f"{path} is missing from the feature cache: {command}")
    mean, std = read_statistics(folder / "feature_statistics.npz", command)
    train, validation, test = (*splits, [])[:3]
    return Prepared(train, validation, test, vocabulary, mean, std)


def quote(value):
    """A setting's value as the shell takes it."""
    return shlex.quote(str(value))


def read_vocabulary(path, mend):
    """A list of different words, the special ones first, or UserError."""
    words = read_json(path, mend, list)
    special = len(SPECIAL_WORDS)
    if not all(isinstance(word, str) for word in words) or tuple(words[:special]) != SPECIAL_WORDS:
        raise UserError(f"{path} is damaged (it is no list of words): {mend}")
    if len(set(words)) < len(words):
        raise UserError(f"{path} is damaged (it holds a word twice): {mend}")
    return words


def is_prepared_image(image, vocab_size):
    """Whether a value of any kind is an image with captions as encode_captions leaves it."""
    if not isinstance(image, dict) or image_problem({**image, "id": image.get("image_id")}, {}, ()):
        return False
    lists = [image.get(name) for name in ("captions", "references", "ids")]
    if not all(isinstance(values, list) for values in lists) or not isinstance(image.get("folder", ""), str):
        return False
    captions, references, ids = lists
    return (
        all(isinstance(text, str) for text in captions + references)
        and len(captions) == len(ids)
        and all(isinstance(words, list) and len(words) > 2 for words in ids)
        and all(type(i) is int and 0 <= i < vocab_size for words in ids for i in words)
    )


def read_statistics(path, mend):
    """feature_mean and feature_std of Prepared, or UserError."""
    try:
        with np.load(path, allow_pickle=False) as statistics:
            mean, std = statistics["mean"], float(statistics["std"])
    except Exception as error:  # of a zip file and of an array, each with errors of its own
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}): {mend}") from error
    if mean.shape != (CHANNELS,) or mean.dtype != np.float32 or not np.isfinite(mean).all() or not 0 < std < np.inf:
        raise UserError(f"{path} is damaged (these are no features' statistics): {mend}")
    return mean, std


def dataset_option(config):
    return "" if config.dataset == "coco" else f"--dataset {config.dataset}"


def read_feature(path, dtype="float32"):
    """Read one cached feature inside a TensorFlow graph, whichever of the two types it is kept in. () -> (P, F)."""
    data = tf.io.read_file(path)
    header = 10 + tf.cast(tf.io.decode_raw(tf.strings.substr(data, 8, 2), tf.uint16)[0], tf.int32)  # bytes
    features = tf.cond(
        tf.equal(tf.strings.length(data) - header, LOCATIONS * CHANNELS * 2),
        lambda: tf.cast(tf.io.decode_raw(data, tf.float16)[header // 2 :], dtype),
        lambda: tf.cast(tf.io.decode_raw(data, tf.float32)[header // 4 :], dtype),
    )
    return tf.reshape(features, (LOCATIONS, CHANNELS))  # (P, F)


def parallel_map(function, inputs):
    """A tf.data pipeline of function(...) for each row of `inputs`, in their order, on all cores."""
    options = tf.data.Options()
    options.autotune.enabled = False  # TensorFlow's tuning thread can hold up a pipeline's end by a second or more
    dataset = tf.data.Dataset.from_tensor_slices(inputs).map(function, num_parallel_calls=os.cpu_count())
    return dataset.with_options(options)


if __name__ == "__main__":
    run_script(main)
