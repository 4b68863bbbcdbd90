"""Caption files of every kind that may hold anything, and what must come of them: usable images or one line."""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile

from hypothesis import strategies as st

from captioning.data.captioned_images import clean_id, image_path, name_features
from captioning.data.coco import read_coco_captions
from captioning.data.karpathy import read_karpathy
from captioning.data.tables import Source, read_table
from captioning.features.cache import feature_path, features_folder
from captioning.words import split_words
from config import Config
from strategies import JSON, NAMES, NUMBERS, SENTENCES, after, check_one_line, records
from support.errors import UserError
from support.files import write_bytes

MAX_WORDS = 10  # of the files made up by hypothesis
IDS = NUMBERS | st.sampled_from(["1", "2", 2.0, "3.0", "d7495e8d036dd200", 0.5, ""])

COCO = st.fixed_dictionaries(
    {
        "images": after(
            [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
            records(id=IDS, file_name=NAMES, coco_url=NAMES),
        ),
        "annotations": after(
            [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
            records(image_id=IDS, caption=SENTENCES),
        ),
    }
)
KARPATHY = st.fixed_dictionaries(
    {
        "images": after(
            [
                {"imgid": -n, "filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "a dog"}]}
                for n, split in enumerate(("train", "val", "test"), 1)
            ],
            records(
                imgid=IDS,
                cocoid=IDS,
                filename=NAMES,
                filepath=NAMES | st.sampled_from(["train2014", "val2014"]),
                split=st.sampled_from(["train", "restval", "val", "test", "extra"]),
                sentences=st.lists(records(raw=SENTENCES), max_size=3),
            ),
        )
    }
)


@contextlib.contextmanager
def strict_output():
    """Standard output as a terminal takes it: UTF-8 and nothing else."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        yield out


def check_usable(images, config):
    """The captions have a length to train on, and every image has files of its own, where they belong."""
    for image in images:
        assert all(1 <= len(split_words(caption)) <= MAX_WORDS for caption in image.captions)
        assert all(map(split_words, image.references))
        json.dumps(dataclasses.asdict(image), ensure_ascii=False).encode()  # as prepared files hold it
        for path in (feature_path(image, features_folder(config)), image_path(image, config)):
            assert not path.is_file()
            write_bytes(path, b"x")
    assert len(list(features_folder(config).iterdir())) == len(images)


def check_captions_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "captions.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                images = name_features({"train": read_coco_captions(path, MAX_WORDS)})["train"]
            except UserError as error:
                return check_one_line(error)
        said = out.buffer.getvalue().decode().splitlines()
        assert all(line.startswith(f"{path}: ") for line in said)
        check_usable(images, Config(coco_dir=f"{folder}/coco", data_dir=f"{folder}/data"))
        check_places(folder, "captions.json", "coco", "data")
        assert {path.name for path in pathlib.Path(folder, "coco").iterdir()} == {"train2014"}

    whole = json.loads(data)
    listed = {clean_id(record.get("id")) for record in whole["images"] if isinstance(record, dict)}
    texts = {record.get("caption") for record in whole["annotations"] if has_text(record, "caption")}
    written = {" ".join(text.splitlines()) for text in texts}
    for image in images:
        assert image.image_id in listed
        assert {*image.captions, *image.references} <= written
        assert image.captions


def check_places(folder, *names):
    """Nothing is in a folder but what should be."""
    assert {path.name for path in pathlib.Path(folder).iterdir()} == set(names)


def has_text(record, name):
    return isinstance(record, dict) and isinstance(record.get(name), str)


def check_karpathy_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "dataset.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                splits = name_features(read_karpathy(path, folder, MAX_WORDS))
            except UserError as error:
                return check_one_line(error)
        assert all(line.startswith(f"{path}: ") for line in out.buffer.getvalue().decode().splitlines())
        images = [image for split in splits.values() for image in split]
        check_usable(images, Config(dataset="karpathy", images=f"{folder}/images", data_dir=f"{folder}/data"))
        check_places(folder, "dataset.json", "images", "data")
    assert "train" in splits
    assert all(image.captions for image in splits["train"])
    assert {image.folder for image in images if image.url} <= {"train2014", "val2014"}


CELLS = (
    NAMES
    | SENTENCES
    | st.sampled_from(["train", "val", "test", '["a dog", "a cat"]', "['a']", '"', '""', '"a, b"', "#0"])
)
LINES = st.lists(CELLS, max_size=4)
HEADERS = st.sampled_from(
    ["image,caption", "caption;split;image", "file_name\ttext", "a|b", "1.jpg#0\ta dog", "", "sep=;"]
)
GOOD = ["1.jpg,a dog", "a cat;train;2.jpg", "3.jpg\ta bird", "4.jpg#0\ta fish"]


@st.composite
def tables(draw):
    """The bytes of tables: text with any delimiter and quotes, JSON Lines, and anything else."""
    kind = draw(st.sampled_from(["text", "lines", "bytes"]))
    if kind == "bytes":
        return draw(st.binary())
    if kind == "lines":
        row = records(
            file_name=NAMES, text=SENTENCES | st.lists(SENTENCES, max_size=2), split=st.sampled_from(["train", 1])
        )
        rows = [{"file_name": "1.jpg", "text": "a dog"}, *draw(st.lists(row | JSON, max_size=5))]
        return "\n".join(map(json.dumps, rows)).encode()[: draw(st.sampled_from([None, -3]))]
    joined = [draw(st.sampled_from(list(",;|\t"))).join(cells) for cells in draw(st.lists(LINES, max_size=6))]
    text = draw(st.sampled_from(["\n", "\r\n"])).join([draw(HEADERS), *GOOD, *joined])
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"])), "replace")


def check_table_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "captions.csv")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                splits = name_features(read_table(Source(path), ("", ""), MAX_WORDS))
            except UserError as error:
                return check_one_line(error)
        assert all(line.startswith(f"{path}: ") for line in out.buffer.getvalue().decode().splitlines())
        images = [image for split in splits.values() for image in split]
        check_usable(images, Config(dataset="table", images=f"{folder}/images", data_dir=f"{folder}/data"))
        check_places(folder, "captions.csv", "images", "data")
    assert len({image.image_id for image in images}) == len(images)
    assert all(image.captions for image in splits.get("train", []))
