import pytest

from captioning.data.folders import _list_files, read_folder
from support.errors import UserError


def fill(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def read(root):
    """dict of split to dict of image to references"""
    splits = read_folder(root, ("", ""), 40)
    ids = [image.image_id for images in splits.values() for image in images]
    assert len(set(ids)) == len(ids)
    return {split: {image.name: image.references for image in images} for split, images in splits.items()}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder_of_hugging_face(tmp_path, capsys, name):
    table = {
        "metadata.csv": "file_name,text\na.jpg,a dog\ndeep/b.jpg,a cat\n",
        "metadata.jsonl": '{"file_name": "a.jpg", "text": "a dog"}\n{"file_name": "deep/b.jpg", "text": "a cat"}\n',
    }[name]
    assert read(fill(tmp_path / "one", {name: table})) == {"train": {"a.jpg": ["a dog"], "deep/b.jpg": ["a cat"]}}
    splits = {f"{split}/{name}": table for split in ("train", "validation", "test")}
    assert read(fill(tmp_path / "three", splits)) == {
        split: {f"{split}/a.jpg": ["a dog"], f"{split}/deep/b.jpg": ["a cat"]}
        for split in ("train", "validation", "test")
    }
    assert capsys.readouterr().out == ""


def test_one_table_may_name_the_folders_of_the_splits(tmp_path):
    root = fill(tmp_path, {"metadata.csv": "file_name,text\ntrain/a.jpg,a dog\ntest/a.jpg,a cat\n"})
    assert read(root) == {"train": {"train/a.jpg": ["a dog"]}, "test": {"test/a.jpg": ["a cat"]}}


def test_of_two_tables_in_a_folder_the_csv_is_read(tmp_path):
    root = fill(tmp_path, {"metadata.csv": "file_name,text\na.jpg,a dog\n", "metadata.jsonl": "no json"})
    assert read(root) == {"train": {"a.jpg": ["a dog"]}}


def test_texts_beside_images_have_a_caption_a_line(tmp_path, capsys):
    files = {
        "a.jpg": "",
        "a.txt": "\ufeffa dog\r\n\r\na cat\r\n",
        "deep/b.PNG": "",
        "deep/b.TXT": "a bird",
        "c.jpg": "",
    }
    files |= {"d.jpg": "", "d.txt": b"caf\xe9", "README.txt": "read me", ".hidden/e.jpg": "", ".hidden/e.txt": "no"}
    assert read(fill(tmp_path, files)) == {"train": {"a.jpg": ["a dog", "a cat"], "deep/b.PNG": ["a bird"]}}
    said = sorted(line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert said[0] == "1 left out: a text that cannot be read, such as " + said[0].partition("such as ")[2]
    assert "line 1 of " in said[0] and "is no UTF-8" in said[0]
    assert said[1] == "1 left out: an image without a .txt file of its name, such as 'c.jpg'"


def test_texts_in_the_folders_of_splits(tmp_path):
    files = {f"{split}/a.{ending}": "a dog" for split in ("train", "val") for ending in ("jpg", "txt")}
    assert read(fill(tmp_path, files)) == {"train": {"train/a.jpg": ["a dog"]}, "validation": {"val/a.jpg": ["a dog"]}}


def test_a_folder_without_captions_is_one_line(tmp_path):
    root = fill(tmp_path, {"a.jpg": "", "b.txt": "a dog"})
    with pytest.raises(UserError, match=r"no metadata.csv or .jsonl .* \(1 left out: .*'a.jpg'\): .*--captions"):
        read(root)


def test_hidden_files_are_none_of_the_data(tmp_path):
    fill(tmp_path, {"b/a.jpg": "", ".git/x.jpg": "", "._a.jpg": "", "a.jpg": ""})
    assert _list_files(tmp_path) == ["a.jpg", "b/a.jpg"]


def test_a_linked_folder_is_read_and_each_folder_once(tmp_path):
    root = fill(tmp_path / "root", {"a.jpg": "", "a.txt": "a dog", "deep/b.jpg": "", "deep/b.txt": "a cat"})
    fill(tmp_path / "other", {"c.jpg": "", "c.txt": "a boat"})
    try:
        (root / "again").symlink_to(root / "deep")
        (root / "loop").symlink_to(root)
        (root / "more").symlink_to(tmp_path / "other")
    except OSError:
        pytest.skip("the file system has no links")
    expected = {"a.jpg": ["a dog"], "deep/b.jpg": ["a cat"], "more/c.jpg": ["a boat"]}
    assert read(root) == {"train": expected}
