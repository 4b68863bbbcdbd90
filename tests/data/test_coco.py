import json

import pytest

from captioning.data.captioned_images import CaptionedImage
from captioning.data.coco import read_coco_captions, split_of_file
from strategies import check_one_line
from support.errors import UserError


def image_ids(images):
    return [image.image_id for image in images]


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
        ("images", {"id": 901, "file_name": "../../escape.jpg"}, "a file name that leads out"),
        ("images", {"id": 901, "file_name": "C:\\b.jpg"}, "a file name that leads out"),
        ("images", {"id": 901, "file_name": ".tmp-1-a.jpg"}, "with a dot in front"),
        ("images", {"id": 901, "file_name": "a\n.jpg"}, "a file name that is empty or not printable"),
        ("images", {"id": 901, "file_name": ""}, "a file name that is empty or not printable"),
        ("images", {"id": 901, "file_name": "é" * 101}, "a file name of more than 200 bytes"),
        ("images", {"id": 902}, "an image without an id or a file name"),
        ("images", {"id": True, "file_name": "a.jpg"}, "an image without an id or a file name"),
        ("images", {"id": 1, "file_name": "again.jpg"}, "whose id another image has"),
        ("images", {"id": "1", "file_name": "again.jpg"}, "whose id another image has"),
        ("images", "nonsense", "an image without an id or a file name"),
        ("annotations", {"id": 1, "image_id": 999, "caption": "no such image"}, "of an image that is not listed"),
        ("annotations", {"id": 2, "image_id": 1, "caption": " !? "}, "a caption without words"),
        ("annotations", {"id": 3, "image_id": 1, "caption": None}, "a caption that is not text"),
        ("annotations", {"id": 3, "image_id": 1, "caption": "half a \ud800"}, "a caption that is not text"),
        ("annotations", "nonsense", "a caption that is not text"),
        ("annotations", {"image_id": "None", "caption": "a dog"}, "of an image that is not listed"),
        ("annotations", {"image_id": 1, "caption": "x" * 10_001}, "a caption of more than 10,000 letters"),
        ("annotations", {"image_id": 1, "caption": "bad", "is_precanned": True}, "marked is_precanned or is_rejected"),
        ("annotations", {"image_id": 1, "caption": "bad", "is_rejected": 1}, "marked is_precanned or is_rejected"),
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
    with pytest.raises(UserError, match="captions_train2014.json ") as raised:
        read_coco_captions(tmp_path / "captions_train2014.json", 40)
    check_one_line(raised.value)


@pytest.mark.parametrize(
    ("listed", "noted", "kept"),
    [
        (str, str, ["1", "2", "3", "4"]),
        (int, str, [1, 2, 3, 4]),
        (str, int, ["1", "2", "3", "4"]),
        (int, float, [1, 2, 3, 4]),
        (float, lambda n: f"{n}.0", [1, 2, 3, 4]),
        (
            lambda n: f"d7495e8d036dd20{n}",
            lambda n: f"d7495e8d036dd20{n}",
            [f"d7495e8d036dd20{n}" for n in range(1, 5)],
        ),
    ],
)
def test_ids_are_numbers_or_texts_on_either_side(tmp_path, capsys, listed, noted, kept):
    data = coco_data()
    for image in data["images"]:
        image["id"] = listed(image["id"])
    for annotation in data["annotations"]:
        annotation["image_id"] = noted(annotation["image_id"])
    images = read_coco(tmp_path, data)
    assert image_ids(images) == kept and all(len(image.captions) == 2 for image in images)
    assert capsys.readouterr().out == ""


def test_records_of_one_file_are_one_image(tmp_path, capsys):
    data = {
        "images": [{"id": n, "file_name": f"set\\{n // 2}.jpg"} for n in range(8)],
        "annotations": [{"image_id": n, "caption": f"caption {n}"} for n in range(8)],
    }
    images = read_coco(tmp_path, data)
    assert image_ids(images) == [0, 2, 4, 6]
    assert [image.name for image in images] == ["set/0.jpg", "set/1.jpg", "set/2.jpg", "set/3.jpg"]
    assert images[1].captions == ["caption 2", "caption 3"]
    assert "4 image records name a file that an earlier one names: their captions are joined" in capsys.readouterr().out


def test_images_that_are_scored_only_need_a_reference_and_may_be_one(tmp_path):
    data = coco_data(1, captions_each=1)
    with pytest.raises(UserError, match="for 1 images, but a split needs 2"):
        read_coco(tmp_path, data)
    path = tmp_path / "captions_train2014.json"
    (image,) = read_coco_captions(path, 2, scored=True)
    assert (image.captions, image.references) == ([], ["A dog number 0."])


def test_a_list_of_images_without_captions_is_one_line(tmp_path):
    with pytest.raises(UserError, match="lists images without captions, as COCO's image_info files do"):
        read_coco(tmp_path, {"images": coco_data()["images"], "categories": []})


def test_a_split_file_like_karpathys_is_one_line(tmp_path):
    with pytest.raises(UserError, match="give it by --dataset karpathy --karpathy_json"):
        read_coco(tmp_path, {"images": [{"filename": "a.jpg", "sentences": [{"raw": "a dog"}]}]})


def test_a_file_of_which_nothing_can_be_used_says_why(tmp_path):
    data = coco_data()
    for image in data["images"]:
        image["file_name"] = "/data/" + image["file_name"]
    with pytest.raises(
        UserError, match="for 0 images, .*8 left out: a caption of an image that is not listed, such as"
    ):
        read_coco(tmp_path, data)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_fault(tmp_path, encoding):
    (tmp_path / "a.json").write_text(json.dumps(coco_data()), encoding=encoding)
    assert len(read_coco_captions(tmp_path / "a.json", 40)) == 4


def test_the_split_that_a_file_is_of():
    assert split_of_file("x/captions_val2017.json") == "val2017"
    assert split_of_file("x/val2017.json") == ""
