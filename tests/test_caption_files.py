import contextlib
import copy
import dataclasses
import io
import json
import pathlib
import random
import tempfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from captioning.caption_files import (
    CaptionedImage,
    RejectedRecords,
    clean_folder,
    find_image_problem,
    image_path,
    images_folder,
    read_coco_captions,
    read_karpathy,
)
from captioning.feature_cache import feature_path, features_folder
from captioning.vocabulary import count_words
from config import Config
from strategies import NAMES, NUMBERS, SENTENCES, after, check_one_line, files_of, places, records
from support.errors import UserError
from support.files import write_bytes

MAX_WORDS = 10  # of the files made up by hypothesis


def image_ids(images):
    return [image.image_id for image in images]


# --- COCO's caption files


def coco_data(count=4, captions_each=2):
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg"} for n in range(count, 0, -1)]
    annotations = [
        {"id": 100 * n + i, "image_id": n, "caption": f"A dog number {i}."}
        for i in range(captions_each)
        for n in range(1, count + 1)
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


def read_coco(folder, data, max_words=40):
    path = folder / "captions_train2014.json"
    path.write_text(json.dumps(data))
    return read_coco_captions(path, max_words)


def test_images_come_by_id_with_their_captions_in_order(tmp_path, capsys):
    data = coco_data()
    data["images"][0]["coco_url"] = "http://host/4.jpg"
    images = read_coco(tmp_path, data)
    captions = ["A dog number 0.", "A dog number 1."]
    urls = [None, None, None, "http://host/4.jpg"]
    assert images == [
        CaptionedImage(n, f"COCO_train2014_{n:012d}.jpg", "", url, captions, captions)
        for n, url in enumerate(urls, start=1)
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("url", [None, 3, ["http://host/1.jpg"], "http://host/\ud800.jpg"])
def test_an_address_that_is_not_text_is_none(tmp_path, url):
    data = coco_data()
    data["images"][0]["coco_url"] = url
    assert read_coco(tmp_path, data)[-1].url is None


@pytest.mark.parametrize(
    ("key", "record", "problem"),
    [
        ("images", {"id": 901, "file_name": "../../escape.jpg"}, "a file name with a folder in it"),
        ("images", {"id": 901, "file_name": "a\\b.jpg"}, "a file name with a folder in it"),
        ("images", {"id": 901, "file_name": ".tmp-1-a.jpg"}, "with a dot in front"),
        ("images", {"id": 901, "file_name": "a\n.jpg"}, "a file name that is empty or not printable"),
        ("images", {"id": 901, "file_name": ""}, "a file name that is empty or not printable"),
        ("images", {"id": 901, "file_name": "é" * 101}, "a file name of more than 200 bytes"),
        ("images", {"id": 902}, "an image without an id or a file name"),
        ("images", {"id": True, "file_name": "a.jpg"}, "an image without an id or a file name"),
        ("images", {"id": 1, "file_name": "again.jpg"}, "whose id or file name another image has"),
        ("images", {"id": 903, "file_name": "COCO_train2014_000000000001.png"}, "whose id or file name another image"),
        ("images", "nonsense", "an image without an id or a file name"),
        ("annotations", {"id": 1, "image_id": 999, "caption": "no such image"}, "of an image that is not listed"),
        ("annotations", {"id": 2, "image_id": 1, "caption": " !? "}, "a caption without words"),
        ("annotations", {"id": 3, "image_id": 1, "caption": None}, "a caption that is not text"),
        ("annotations", {"id": 3, "image_id": 1, "caption": "half a \ud800"}, "a caption that is not text"),
        ("annotations", "nonsense", "a caption that is not text"),
    ],
)
def test_a_coco_record_that_cannot_be_used_is_left_out_and_named(tmp_path, capsys, key, record, problem):
    data = coco_data()
    data[key].append(record)
    assert read_coco(tmp_path, data) == read_coco(tmp_path, coco_data())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'captions_train2014.json'}: 1 left out: ") and problem in line


def test_images_without_a_usable_caption_are_left_out_and_long_captions_are_references_only(tmp_path, capsys):
    data = coco_data()
    data["images"] += [{"id": 904, "file_name": "without_caption.jpg"}, {"id": 905, "file_name": "long.jpg"}]
    data["annotations"] += [{"image_id": image_id, "caption": "word " * 5} for image_id in (1, 905)]
    images = read_coco(tmp_path, data, max_words=4)
    assert image_ids(images) == [1, 2, 3, 4]
    assert images[0].captions == ["A dog number 0.", "A dog number 1."]
    assert images[0].references == [*images[0].captions, "word " * 5]
    assert ": 2 left out: a caption longer than 4 words, such as " in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[1, 2]",
        '{"images": []}',
        '{"images": [], "annotations": []}',
        '{"images": {}, "annotations": []}',
        json.dumps(coco_data(1)),
    ],
)
def test_a_wrong_captions_file_is_one_line(tmp_path, text):
    (tmp_path / "captions_train2014.json").write_text(text)
    with pytest.raises(UserError, match="captions_train2014.json .*: put COCO's own file there") as raised:
        read_coco_captions(tmp_path / "captions_train2014.json", 40)
    check_one_line(raised.value)


# --- Karpathy's split files


def coco_record(number, split, *captions, folder="val2014"):
    sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 0} for text in captions]
    name = f"COCO_{folder}_{number:012d}.jpg"
    record = {"filepath": folder, "filename": name, "imgid": number, "cocoid": 1000 - number, "split": split}
    return record | {"sentids": [0], "sentences": sentences}


def flickr_record(number, split, *captions):
    record = coco_record(number, split, *captions) | {"filename": f"{number}_a.jpg"}
    return {key: value for key, value in record.items() if key not in ("filepath", "cocoid")}


RECORDS = [
    coco_record(1, "train", "A dog.", "Two cats, it's late", folder="train2014"),
    coco_record(2, "restval", "A boat."),
    coco_record(3, "val", "A bird."),
    coco_record(4, "test", "A red cow."),
    coco_record(5, "test", "A blue cow."),
]


def read(folder, images, max_words=40):
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return read_karpathy(path, folder, max_words)


def ids(splits):
    return {split: image_ids(images) for split, images in splits.items()}


def test_the_published_splits_with_restval_in_train(tmp_path, capsys):
    splits = read(tmp_path, RECORDS)
    assert ids(splits) == {"train": [998, 999], "validation": [997], "test": [995, 996]}  # by cocoid
    assert splits["train"][1] == CaptionedImage(
        image_id=999,
        file_name="COCO_train2014_000000000001.jpg",
        folder="train2014",
        url="http://images.cocodataset.org/train2014/COCO_train2014_000000000001.jpg",
        captions=["A dog.", "Two cats, it's late"],
        references=["A dog.", "Two cats, it's late"],
    )
    assert splits["train"][0].folder == "val2014"
    assert splits["train"][0].url == "http://images.cocodataset.org/val2014/COCO_val2014_000000000002.jpg"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("filepath", [{}, {"filepath": ""}, {"filepath": None}, {"filepath": "."}])
def test_flickr_has_neither_cocoid_nor_folder_nor_address(tmp_path, filepath):
    records = [flickr_record(n, split, "A dog") | filepath for n, split in enumerate(("train", "val", "test"))]
    splits = read(tmp_path, records)
    assert ids(splits) == {"train": [0], "validation": [1], "test": [2]}
    assert {(image.folder, image.url) for images in splits.values() for image in images} == {("", None)}


def test_long_captions_are_references_only_and_cost_no_test_image(tmp_path, capsys):
    long = "one two three four"
    records = [*RECORDS, coco_record(6, "train", long), coco_record(7, "test", long), coco_record(8, "val", "a", long)]
    splits = read(tmp_path, records, max_words=3)
    assert ids(splits) == {"train": [998, 999], "validation": [992, 997], "test": [993, 995, 996]}
    assert (splits["test"][0].captions, splits["test"][0].references) == ([], [long])
    assert (splits["validation"][0].captions, splits["validation"][0].references) == (["a"], ["a", long])
    printed = capsys.readouterr().out
    assert ": 4 left out: a caption longer than 3 words, such as " in printed
    assert '"Two cats, it\'s late"' in printed
    assert ": 1 left out: an image without a usable caption, such as " in printed


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"filepath": "../elsewhere"}, "leads out"),
        ({"filepath": "val2014/../.."}, "leads out"),
        ({"filepath": "val2014\\.. \\x"}, "leads out"),
        ({"filepath": "/etc"}, "leads out"),
        ({"filepath": "C:x"}, "leads out"),
        ({"filepath": "\\\\host\\share"}, "leads out"),
        ({"filepath": "a\0b"}, "leads out"),
        ({"filepath": "x" * 201}, "leads out"),
        ({"filepath": 3}, "leads out"),
        ({"filename": "../a.jpg"}, "a file name with a folder"),
        ({"filename": "a\\b.jpg"}, "a file name with a folder"),
        ({"filename": ""}, "a file name that is empty or not printable"),
        ({"filename": "\ud800.jpg"}, "a file name that is empty or not printable"),
        ({"filename": None}, "without an id or a file name"),
        ({"filename": "COCO_train2014_000000000001.png"}, "another image has"),  # the stem names the feature file
        ({"cocoid": 999}, "another image has"),
        ({"cocoid": "7"}, "without an id"),
        ({"cocoid": True}, "without an id"),
        ({"split": "dev"}, "a split other than"),
        ({"split": ["test"]}, "a split other than"),
        ({"sentences": None}, "without sentences"),
        ({"sentences": []}, "without a usable caption"),
        ({"sentences": [{"raw": "!?"}]}, "a caption without words"),
        (
            {"sentences": ["text", {"tokens": ["a"]}, {"raw": 3}, {"raw": "\udfff"}]},
            "4 left out: a caption that is not",
        ),
    ],
)
def test_a_karpathy_record_that_cannot_be_used_is_left_out_and_named(tmp_path, capsys, change, problem):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "test", "A dog.") | change])
    printed = capsys.readouterr().out
    assert splits == read(tmp_path, RECORDS)
    assert problem in printed


@pytest.mark.parametrize(
    ("filepath", "folder"), [("images/val2014/", "images/val2014"), ("images\\val2014", "images/val2014")]
)
def test_a_deeper_folder_is_kept_and_has_no_address(tmp_path, filepath, folder):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "val", "A dog.") | {"filepath": filepath}])
    assert (splits["validation"][0].folder, splits["validation"][0].url) == (folder, None)


def test_an_address_leads_to_the_file_of_that_very_name(tmp_path):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "val", "A dog.") | {"filename": "a b?c#d%e.jpg"}])
    assert splits["validation"][0].url == "http://images.cocodataset.org/val2014/a%20b%3Fc%23d%25e.jpg"


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "{}", '{"images": 3}', '{"images": []}'])
def test_a_wrong_split_file_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json .*--karpathy_json"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40)


@pytest.mark.parametrize(("lost", "named"), [("train", "train"), ("val", "validation"), ("test", "test")])
def test_a_file_without_a_split_is_one_line(tmp_path, lost, named):
    records = [record for record in RECORDS if not record["split"].replace("rest", "").startswith(lost)]
    records = [record for record in records if lost != "train" or record["split"] != "restval"]
    with pytest.raises(UserError, match=f"no usable image of the split {named}"):
        read(tmp_path, records)


def test_missing_files_and_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="a.json is missing"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40)
    for folder in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="is not a folder: name the one that holds the images by --images"):
            read_karpathy(tmp_path / "a.json", folder, 40)


def test_wrong_types_anywhere_are_left_out_or_one_line(tmp_path, monkeypatch):
    """Values somewhere in the file become others. What comes back is sound, or a UserError comes."""
    monkeypatch.setattr("captioning.caption_files.count_words", lambda captions: [2] * len(captions))  # for its speed
    rng = random.Random(0)
    for _ in range(300):
        data = {"images": copy.deepcopy(RECORDS)}
        for _ in range(rng.choice((1, 3))):
            place, key = rng.choice(list(places(data)))
            place[key] = rng.choice((None, True, -1, 1e300, float("nan"), "", "\ud800", "..", [], [[]], {}, {"raw": 1}))
        (tmp_path / "a.json").write_text(json.dumps(data))
        try:
            splits = read_karpathy(tmp_path / "a.json", tmp_path, 40)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for image in (image for images in splits.values() for image in images):
            assert type(image.image_id) is int and image.file_name and ".." not in image.folder
            assert image.references and all(type(text) is str for text in image.references)


# --- Records of both


def test_rejected_records_are_counted_by_problem_with_the_first_as_an_example(capsys):
    rejected = RejectedRecords("a.json")
    rejected.report()
    assert capsys.readouterr().out == ""
    for problem, record in (("of one kind", {"id": "first\n\ud800"}), ("of another", "x" * 500), ("of one kind", 2)):
        rejected.add(problem, record)
    rejected.report()
    assert capsys.readouterr().out.splitlines() == [
        "a.json: 2 left out: of one kind, such as {'id': 'first\\n\\ud800'}",
        "a.json: 1 left out: of another, such as '" + "x" * 159,
    ]


def test_an_image_is_judged_without_others_too():
    assert find_image_problem(1, "a.jpg") is None
    assert find_image_problem("1", "a.jpg") == find_image_problem(1, None) == "an image without an id or a file name"
    assert [clean_folder(value) for value in (None, "", "a//b/", "..", "a/..", 3)] == ["", "", "a/b", None, None, None]


def test_an_images_file_is_below_the_images_folder():
    image = CaptionedImage(1, "a.jpg", "val2014")
    karpathy = Config(dataset="karpathy", images="pictures", coco_dir="coco")
    assert images_folder(karpathy) == pathlib.Path("pictures")
    assert image_path(image, karpathy) == pathlib.Path("pictures/val2014/a.jpg")
    coco = Config(coco_dir="coco", coco_split="train2014", images="pictures")
    assert image_path(CaptionedImage(1, "a.jpg"), coco) == pathlib.Path("coco/train2014/a.jpg")


# --- Anything for a file

COCO = st.fixed_dictionaries(
    {
        "images": after(
            [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
            records(id=NUMBERS, file_name=NAMES, coco_url=NAMES),
        ),
        "annotations": after(
            [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
            records(image_id=NUMBERS, caption=SENTENCES),
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
                imgid=NUMBERS,
                cocoid=NUMBERS,
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
        assert all(1 <= num_words <= MAX_WORDS for num_words in count_words(image.captions))
        assert min(count_words(image.references)) > 0
        json.dumps(dataclasses.asdict(image), ensure_ascii=False).encode()  # as prepared files hold it
        for path in (feature_path(image, config), image_path(image, config)):
            assert not path.is_file()
            write_bytes(path, b"x")
    assert len(list(features_folder(config).iterdir())) == len(images)


def check_captions_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "captions.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                images = read_coco_captions(path, MAX_WORDS)
            except UserError as error:
                return check_one_line(error)
        said = out.buffer.getvalue().decode().splitlines()
        assert all(line.startswith(f"{path}: ") for line in said)
        check_usable(images, Config(coco_dir=f"{folder}/coco", data_dir=f"{folder}/data"))
        folders = {"captions.json", "coco", "coco/train2014", "data", "data/features"}
        made = {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*")} - folders
        assert {name.rpartition("/")[0] for name in made} == {"coco/train2014", "data/features"}

    whole = json.loads(data)
    listed = {(r["id"], r["file_name"]) for r in whole["images"] if has(r, id=int, file_name=str)}
    written = {(r["image_id"], r["caption"]) for r in whole["annotations"] if has(r, image_id=int, caption=str)}
    for image in images:
        assert (image.image_id, image.file_name) in listed
        assert {(image.image_id, caption) for caption in image.captions + image.references} <= written
        assert image.captions


def has(record, **fields):
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())


def coco_file(name):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": name}]
    annotations = [{"image_id": n, "caption": "a dog"} for n in (1, 2, 3)]
    return json.dumps({"images": images, "annotations": annotations}).encode()


@pytest.mark.slow
@example(b'{"images": ["\\ud800"], "annotations": ["two\\nlines"]}')
@example(coco_file("x" * 300 + ".jpg"))
@example(coco_file("é" * 112 + ".jpg"))
@given(files_of(COCO))
def test_any_captions_file_loads_or_is_one_line(data):
    check_captions_file(data)


def check_karpathy_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "dataset.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                splits = read_karpathy(path, folder, MAX_WORDS)
            except UserError as error:
                return check_one_line(error)
        assert all(line.startswith(f"{path}: ") for line in out.buffer.getvalue().decode().splitlines())
        images = [image for split in splits.values() for image in split]
        check_usable(images, Config(dataset="karpathy", images=f"{folder}/images", data_dir=f"{folder}/data"))
        assert {path.name for path in pathlib.Path(folder).iterdir()} == {"dataset.json", "images", "data"}
    assert splits.keys() == {"train", "validation", "test"}
    assert all(image.captions for image in splits["train"])
    assert {image.folder for image in images if image.url} <= {"train2014", "val2014"}


@pytest.mark.slow
@given(files_of(KARPATHY))
def test_any_karpathy_file_loads_or_is_one_line(data):
    check_karpathy_file(data)
