import dataclasses
import json
import time

import pytest

from captioning.data.tables import _MOST_LINES, Source, read_table
from strategies import check_one_line
from support.errors import UserError

USUAL = ("", "")


def read(folder, text, columns=USUAL, max_words=40, encoding="utf-8", name="captions.csv", **source):
    path = folder / name
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return read_table(Source(path, **source), columns, max_words)


def captions(splits):
    """What was read, without ids: dict of image to references, all splits together."""
    return {image.name: image.references for images in splits.values() for image in images}


EXPECTED = {"1.jpg": ["a dog, it runs", "a cat"], "2.jpg": ["a bird"]}


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\n1.jpg,"a dog, it runs"\n1.jpg,a cat\n2.jpg,a bird\n',
        "image,caption\n1.jpg,a dog, it runs\n1.jpg,a cat\n2.jpg,a bird",  # Kaggle's, with the comma unquoted
        "caption,image\na dog, it runs,1.jpg\na cat,1.jpg\na bird,2.jpg\n",
        "text\tfile_name\na dog, it runs\t1.jpg\na cat\t1.jpg\na bird\t2.jpg\n",
        "1.jpg#0\ta dog, it runs\n1.jpg#1\ta cat\n2.jpg#0\ta bird\n",  # Flickr8k.token.txt
        "1.jpg,a dog, it runs\n1.jpg,a cat\n2.jpg,a bird\n",
        "image_name| comment_number| comment\n1.jpg| 0| a dog, it runs\n1.jpg| 1| a cat\n2.jpg| 0| a bird\n",
        "1.jpg| 0| a dog, it runs\n1.jpg| 1| a cat\n2.jpg| 0| a bird\n",
        '\n\nno;Caption;;Image Name\r\n1;"a dog, it runs";;1.jpg\r\n\r\n2;a cat;;1.jpg\r\n;;;\r\n3;a bird;;2.jpg;;\r\n',
        'sep=;\r\nimage;caption\r\n1.jpg;"a dog, it runs"\r\n1.jpg;a cat\r\n2.jpg;a bird\r\n',
        'image,caption\n1.jpg,"[""a dog, it runs"", ""a cat""]"\n2.jpg,a bird\n',
        "image,captions\n1.jpg,\"['a dog, it runs', 'a cat']\"\n2.jpg,a bird\n",
        'image,caption\n1.jpg,"a dog,\nit runs"\n1.jpg,"a\r\ncat"\n2.jpg,a bird\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_people_and_programs_write_them(tmp_path, capsys, text, encoding):
    splits = read(tmp_path, text, encoding=encoding)
    assert splits.keys() == {"train"} and captions(splits) == EXPECTED
    assert [image.image_id for image in splits["train"]] == [1, 2]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("image", "image image_name file_name filename filepath path".split())
@pytest.mark.parametrize("caption", "caption captions text comment raw sentence description prompt".split())
def test_the_usual_names_of_columns(tmp_path, image, caption):
    assert captions(read(tmp_path, f"id,{caption.upper()},{image}\n7,a dog,1.jpg\n")) == {"1.jpg": ["a dog"]}
    records = [{"id": 7, caption: ["a dog", "a cat"], image: "1.jpg"}]
    assert captions(read(tmp_path, json.dumps(records))) == {"1.jpg": ["a dog", "a cat"]}


def test_columns_are_named_where_they_have_no_usual_name(tmp_path):
    text = "Foto;Text;Titel\n1.jpg;x;a dog\n"
    assert captions(read(tmp_path, text, ("foto", "TITEL"))) == {"1.jpg": ["a dog"]}
    with pytest.raises(UserError, match=r"has the columns 'Foto', 'Text', 'Titel': .* images by --image_column$"):
        read(tmp_path, text)
    with pytest.raises(UserError, match=r"images by --image_column, the one of captions by --caption_column$"):
        read(tmp_path, text, ("bild", "legende"))
    with pytest.raises(UserError, match=r"has the columns 'foto', 'titel': .* by --image_column"):
        read(tmp_path, '{"foto": "1.jpg", "titel": "a dog"}\n', ("", "titel"))


@pytest.mark.parametrize(
    "text",
    [
        '{"file_name": "1.jpg", "text": ["a dog, it runs", "a cat"]}\n\n{"file_name": "2.jpg", "text": "a bird"}\n',
        '{"file_name": "1.jpg", "text": "a dog, it runs"}\r\n{"text": "a cat", "file_name": "1.jpg"}\r\n'
        '{"file_name": "2.jpg", "text": "a bird"}',
        '[{"image": "1.jpg", "captions": ["a dog, it runs", "a cat"]},\n {"image": "2.jpg", "captions": ["a bird"]}]',
    ],
)
def test_json_lines_and_lists(tmp_path, capsys, text):
    assert captions(read(tmp_path, text, encoding="utf-8-sig")) == EXPECTED
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("indent", [None, 1])
def test_json_objects_of_captions_by_image_and_around_a_list(tmp_path, capsys, indent):
    by_image = {"1.jpg": ["a dog, it runs", "a cat"], "2.jpg": "a bird"}
    around = {"info": {"year": 2014}, "data": [{"image": name, "caption": each} for name, each in by_image.items()]}
    for data in (by_image, around):
        assert captions(read(tmp_path, json.dumps(data, indent=indent))) == EXPECTED
    assert captions(read(tmp_path, json.dumps(by_image), ("foto", "titel"))) == EXPECTED
    with pytest.raises(UserError, match="has the columns 'info', 'x': "):
        read(tmp_path, json.dumps({"info": {}, "x": [1, 2]}))
    assert capsys.readouterr().out == ""


def test_what_programs_write_for_a_missing_caption_is_no_caption(tmp_path, capsys):
    missing = ["nan", "NaN", "null", "None", "<NA>"]
    text = "image,caption\n1.jpg,nan bread\n" + "".join(f"{n}.jpg,{word}\n" for n, word in enumerate(missing, 2))
    assert captions(read(tmp_path, text)) == {"1.jpg": ["nan bread"]}
    assert ": 5 left out: a caption that is missing (nan, null or None), such as line 3: " in capsys.readouterr().out


@pytest.mark.parametrize("head", [b"PK\3\4", b"PAR1", b"\x1f\x8b", b"\xd0\xcf\x11\xe0"])
def test_a_workbook_is_told_as_such(tmp_path, head):
    with pytest.raises(UserError, match="is no text, but a workbook, an archive or the like: save it as CSV"):
        read(tmp_path, head + b"\x14\0\6\xd8")


def test_captions_that_are_all_too_long_are_mended_by_max_words(tmp_path):
    with pytest.raises(UserError, match="2 left out: a caption longer than 2 words.*: raise --max_words$"):
        read(tmp_path, "image,caption\n1.jpg,a b c\n2.jpg,a b c\n", max_words=2)


def test_a_file_in_cocos_layout_is_read_as_such(tmp_path):
    images = [{"id": f"x{n}", "file_name": f"a/{n}.jpg"} for n in (1, 2)]
    notes = [{"image_id": f"x{n}", "caption": "a dog"} for n in (1, 2)]
    text = json.dumps({"images": images, "annotations": notes}, indent=1)
    splits = read(tmp_path, text)
    assert [image.image_id for image in splits["train"]] == ["x1", "x2"]
    assert read(tmp_path, text, split="test")["test"] == splits["train"]
    with pytest.raises(UserError, match="lists images without captions"):
        read(tmp_path, json.dumps({"images": images}))


def test_the_splits_of_a_column_and_of_folders(tmp_path, capsys):
    rows = [("1.jpg", "train"), ("2.jpg", "VAL"), ("3.jpg", "test"), ("4.jpg", "valid"), ("5.jpg", "restval")]
    expected = {"train": ["1.jpg", "5.jpg"], "validation": ["2.jpg", "4.jpg"], "test": ["3.jpg"]}
    splits = read(
        tmp_path, "image,caption,split\n" + "".join(f"{name},a dog, it runs,{split}\n" for name, split in rows)
    )
    assert {split: [image.name for image in images] for split, images in splits.items()} == expected
    assert splits["test"][0].references == ["a dog, it runs"]
    named = read(tmp_path, "image,caption\ntrain/1.jpg,a\nvalidation/1.jpg,b\ntest\\1.jpg,c\n")
    assert {split: images[0].name for split, images in named.items()} == {s: f"{s}/1.jpg" for s in named}
    assert read(tmp_path, "image,caption\ntrain/1.jpg,a\nother/1.jpg,b\n").keys() == {"train"}
    assert read(tmp_path, "image,caption,split\n1.jpg,a,train\n2.jpg,b,train\n", split="validation").keys() == {
        "validation"
    }
    assert capsys.readouterr().out == ""


def test_long_captions_are_references_and_cost_no_image_that_is_scored(tmp_path, capsys):
    splits = read(tmp_path, "image,caption,split\n1.jpg,a,train\n2.jpg,a b c,train\n3.jpg,a b c,test\n", max_words=2)
    assert [image.name for image in splits["train"]] == ["1.jpg"]
    assert (splits["test"][0].captions, splits["test"][0].references) == ([], ["a b c"])
    assert ": 2 left out: a caption longer than 2 words, such as line 3: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("../2.jpg,a cat,train", "a file name that leads out"),
        ("/data/2.jpg,a cat,train", "a file name that leads out"),
        ("https://host/2.jpg,a cat,train", "an address"),
        ("2\0.jpg,a cat,train", "not printable"),
        (",a cat,train", "not printable"),
        ("2.jpg", "a row with too few columns"),
        ("2.jpg,a cat", "a split other than train, validation and test"),
        ("2.jpg,a cat,extra", "a split other than train, validation and test"),
        ("1.jpg,a cat,val", "a row of an image that is in another split"),
        ("1.jpg,a dog,train", "a caption that repeats another of the same image"),
        ("1.jpg,!?,train", "a caption without words"),
        ("1.jpg,,train", "a caption without words"),
        ("1.jpg,a\0cat,train", "a caption that is not text"),
        (f"1.jpg,{'x' * 10_001},train", "a caption of more than 10,000 letters"),
        (f"1.jpg,{'x' * 200_000},train", "a caption of more than 10,000 letters"),  # more than csv's limit
        (f'1.jpg,"{"x" * 200_000}",train', "a caption of more than 10,000 letters"),
        ('1.jpg,"[""a cat"", 3]",train', "a caption that is not text"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_its_line_is_named(tmp_path, capsys, row, problem):
    (image,) = read(tmp_path, f"image,caption,split\n\n1.jpg,a dog,train\n{row}\n")["train"]
    assert image.references[0] == "a dog"
    (line,) = capsys.readouterr().out.splitlines()
    assert ": 1 left out: " in line and problem in line and "such as line 4: " in line


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1, 2]", "what is not a JSON object"),
        ('{"file_name": "2.jpg", "te', "what is not a JSON object"),
        ("[" * 50_000, "what is not a JSON object"),
        ('{"file_name": 3, "text": "a cat"}', "without a file name"),
        ('{"text": "a cat"}', "without a file name"),
        ('{"file_name": "1.jpg", "text": NaN}', "a caption that is not text"),
        ('{"file_name": "1.jpg", "text": {"a": 1}}', "a caption that is not text"),
        ('{"file_name": "1.jpg"}', "a caption that is not text"),
        ('{"file_name": "1.jpg", "text": ["\\ud800"]}', "a caption that is not text"),
    ],
)
def test_a_line_of_json_that_cannot_be_used_is_left_out_and_named(tmp_path, capsys, line, problem):
    read(tmp_path, f'{{"file_name": "1.jpg", "text": "a dog"}}\n{line}\n', name="metadata.jsonl")
    (said,) = capsys.readouterr().out.splitlines()
    assert ": 1 left out: " in said and problem in said and "such as line 2: " in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("image,caption\n", "no usable captions (it has no rows)"),
        (
            "image,caption\n/data/1.jpg,a dog\n",
            "(1 left out: a file name that leads out of the images' folder, such as line 2:",
        ),
        (
            "image,caption,split\n1.jpg,a,train\n2.jpg,!?,test\n",
            "no usable captions of the split test (1 left out: a caption",
        ),
        ("no table at all", "has the columns 'no table at all'"),
        ("a" * 10_000_000, "has the columns 'aaa"),
        (",".join("abc" for _ in range(1_000_000)), "has the columns 'abc', "),
        ('{"images": [', "is damaged"),
        ("[1, 2", "is damaged"),
        ("[" * 1_000_000, "is damaged"),
        ("[]", "has the columns"),
        ("[1, 2]", "has the columns"),
        (b"image,caption\n1.jpg,a caf\xe9\n", "line 2 of "),
        (b"\xff\xfei\0m\0a", "is no UTF-16"),
        ("image,caption\n1.jpg,a dog\n".encode("utf-16-le"), "is UTF-16 without a byte order mark"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is no UTF-8"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_one_line_that_says_why(tmp_path, text, reason):
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    check_one_line(raised.value)
    assert reason in str(raised.value) and len(str(raised.value)) < 1500
    assert time.monotonic() - started < 20


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv cannot be read .*--captions"):
        read_table(Source(tmp_path / "nowhere.csv"), USUAL, 40)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(Source(tmp_path), USUAL, 40)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('1.jpg,"a dog\n2.jpg,a cat\n', {"1.jpg": ['"a dog'], "2.jpg": ["a cat"]}),
        ('1.jpg,"a dog\n2.jpg,"a cat"\n', {"1.jpg": ['"a dog'], "2.jpg": ["a cat"]}),
        ('1.jpg,"Stop" says a sign\n', {"1.jpg": ['"Stop" says a sign']}),
        ('1.jpg,a sign says "stop", and more\n', {"1.jpg": ['a sign says "stop", and more']}),
        ('1.jpg, "a dog, a cat"\n', {"1.jpg": ["a dog, a cat"]}),
    ],
)
def test_quotes_that_are_not_those_of_csv_are_letters(tmp_path, rows, expected):
    assert captions(read(tmp_path, "image,caption\n" + rows)) == expected


def test_a_quote_that_is_never_closed_takes_no_rows_with_it(tmp_path):
    rows = "".join(f"{n}.jpg,a dog\n" for n in range(2, 3000))
    assert len(captions(read(tmp_path, f'image,caption\n1.jpg,"a cat\n{rows}'))) == 2999
    inside = "\n".join(["a dog"] * _MOST_LINES)
    assert len(captions(read(tmp_path, f'image,caption\n1.jpg,"{inside}"\n2.jpg,a dog\n', max_words=300))) == 2


def test_many_open_quotes_and_wide_rows_take_no_time(tmp_path, capsys):
    started = time.monotonic()
    rows = ['1.jpg,"a'] * 20_000 + ['"'] * 20_000 + ["2.jpg" + ",a" * 1_000_000]
    assert "1.jpg" in captions(read(tmp_path, "image,caption\n" + "\n".join(rows)))
    assert "a caption of more than 10,000 letters" in capsys.readouterr().out
    assert time.monotonic() - started < 30


def test_the_numbers_of_images_go_on_where_another_table_ended(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,a\n2.jpg,b\n")
    splits = read_table(Source(tmp_path / "a.csv", folder="deep"), USUAL, 40, first_id=10)
    assert [(image.image_id, image.name) for image in splits["train"]] == [(10, "deep/1.jpg"), (11, "deep/2.jpg")]
    assert dataclasses.asdict(splits["train"][0])["file_name"] == "1.jpg"
