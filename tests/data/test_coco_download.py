import dataclasses
import pathlib
import shutil
import zipfile

import pytest
from PIL import Image

from captioning.data.captioned_images import CaptionedImage, image_path
from captioning.data.coco_download import _COCO_ARCHIVES, COCO_SPLITS, _fetch_archive, fetch_images, find_annotations
from captioning.settings import make_config
from support.errors import UserError
from support.files import locked


@pytest.fixture
def config(tmp_path):
    return make_config({"coco_dir": str(tmp_path / "coco"), "data_dir": str(tmp_path / "data")})


@pytest.fixture
def karpathy(tmp_path):
    (tmp_path / "images").mkdir()
    return make_config({"dataset": "karpathy", "images": str(tmp_path / "images")})


def publish(server, name, members):
    """Serve a zip file under COCO's name for it. members: dict of name to bytes."""
    archive = server.folder / name
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for member, data in members.items():
            file.writestr(member, data)
    server.publish(archive)


def serve_images(server, split, names):
    """Serve images one by one, as COCO does. Returns their CaptionedImages."""
    (server.folder / split).mkdir()
    for name in names:
        Image.new("RGB", (8, 8), "red").save(server.folder / split / name)
    return [CaptionedImage(n, name, url=f"{server.url}/{split}/{name}") for n, name in enumerate(names)]


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in pathlib.Path(folder).rglob("[!.]*") if path.is_file()}


def test_every_split_with_captions_has_an_archive_of_each_kind():
    for split in COCO_SPLITS:
        assert {f"{split}.zip", f"annotations_trainval{split[-4:]}.zip"} <= _COCO_ARCHIVES.keys()
    assert all(size > 2e8 and len(sha256) == 64 for size, sha256 in _COCO_ARCHIVES.values())


# --- Captions


@pytest.mark.parametrize("split", COCO_SPLITS)
def test_captions_of_every_split_are_downloaded_where_they_are_missing(config, server, split):
    year = split[-4:]
    names = [f"{kind}_{half}{year}" for kind in ("captions", "instances") for half in ("train", "val")]
    members = {f"annotations/{name}.json": b"{}" for name in names}
    publish(server, f"annotations/annotations_trainval{year}.zip", members | {"annotations/readme.txt": b""})
    config = dataclasses.replace(config, coco_split=split)
    path = pathlib.Path(config.coco_dir, "annotations", f"captions_{split}.json")
    assert find_annotations(config) == path
    assert path.read_bytes() == b"{}"
    assert not path.with_name("readme.txt").exists()
    requests = len(server.requests)
    assert find_annotations(config) == path
    assert len(server.requests) == requests


@pytest.mark.parametrize("split", ["test2014", "test2015", "unlabeled2017", "minival"])
def test_a_split_without_captions_is_one_line(config, split):
    config = dataclasses.replace(config, coco_split=split)
    with pytest.raises(UserError) as raised:
        find_annotations(config)
    assert str(raised.value) == (
        f"{config.coco_dir}/annotations/captions_{split}.json is missing, and COCO has no captions for --coco_split "
        f"{split}, only for train2014, val2014, train2017, val2017: give one of these, or set --coco_dir and "
        "--coco_split to where the captions are"
    )


def test_a_shard_downloads_to_a_file_of_its_own(config, server):
    publish(server, "annotations/annotations_trainval2014.zip", {"annotations/captions_train2014.json": b"{}"})
    folder = pathlib.Path(config.coco_dir)
    folder.mkdir()
    of_another = folder / "annotations_trainval2014.zip.part"
    of_another.write_bytes(b"the beginning")
    with locked(folder, "download", shared=True):  # as another shard does at the same time
        find_annotations(config, shard=(2, 3))
    assert files_below(folder) == {"annotations/captions_train2014.json", of_another.name}
    assert of_another.read_bytes() == b"the beginning"


def test_a_shard_leaves_an_archive_that_is_there(config, server):
    members = {"annotations/captions_train2014.json": b"{}"}
    publish(server, "annotations/annotations_trainval2014.zip", members)
    _fetch_archive("annotations_trainval2014.zip", config.coco_dir)
    _fetch_archive("annotations_trainval2014.zip", config.coco_dir, shard=(1, 2))
    assert files_below(config.coco_dir) == {"annotations_trainval2014.zip", *members}


# --- Images


def test_only_missing_images_are_fetched(config, server):
    images = serve_images(server, "train2014", ["a.jpg", "b.jpg", "c d.jpg"])
    images[2] = dataclasses.replace(images[2], url=images[2].url.replace(" ", "%20"))
    present = image_path(images[1], config)
    present.parent.mkdir(parents=True)
    present.write_bytes(b"at hand")
    images.append(dataclasses.replace(images[0], file_name="missing.jpg", url=f"{server.url}/missing.jpg"))
    images.append(CaptionedImage(9, "nowhere.jpg"))
    skipped = fetch_images(images, config)
    assert skipped == {
        "nowhere.jpg": f"{image_path(images[4], config)} is missing, and the captions file gives no address for it",
        "missing.jpg": "HTTP status 404",
    }
    assert files_below(config.coco_dir) == {"train2014/a.jpg", "train2014/b.jpg", "train2014/c d.jpg"}
    assert present.read_bytes() == b"at hand"
    assert fetch_images(images[:3], config) == {}
    assert sorted(set(server.requests)) == ["/missing.jpg", "/train2014/a.jpg", "/train2014/c%20d.jpg"]


@pytest.mark.parametrize("code", [403, 429])
def test_a_server_that_refuses_most_images_stops_the_script_with_one_line(config, server, monkeypatch, code):
    images = serve_images(server, "train2014", [f"{number}.jpg" for number in range(10)])
    refuse(server, monkeypatch, code, ["/train2014/1.jpg"])
    with pytest.raises(UserError, match=rf"^9 of 10 downloads were refused .*HTTP status {code}\).*again later[^\n]*$"):
        fetch_images(images, config)
    assert files_below(config.coco_dir) == {"train2014/1.jpg"}
    assert len(fetch_images(images, config, total=100)) == 9  # few of the images, though all that are asked for


def refuse(server, monkeypatch, code, served):
    """Let the server answer with a status other than 200, but for some paths."""
    handler = server.http.RequestHandlerClass
    answer = handler.do_GET
    monkeypatch.setattr(
        handler, "do_GET", lambda self: answer(self) if self.path in served else self.send_error(code), raising=False
    )
    monkeypatch.setattr("support.downloads.time.sleep", lambda seconds: None)


def test_nothing_is_asked_where_nothing_is_missing(config, karpathy):
    assert fetch_images([], config) == fetch_images([], dataclasses.replace(karpathy, image_source="zip")) == {}
    assert not pathlib.Path(config.coco_dir).exists()


@pytest.mark.parametrize("split", COCO_SPLITS)
def test_the_archive_of_every_split_is_the_other_way(config, server, split):
    config = dataclasses.replace(config, coco_split=split, image_source="zip")
    publish(server, f"zips/{split}.zip", {f"{split}/{name}": b"image" for name in ("a.jpg", "b.jpg", "c.jpg")})
    images = [CaptionedImage(n, name) for n, name in enumerate(("a.jpg", "c.jpg", "d.jpg"))]
    assert fetch_images(images, config) == {"d.jpg": "not in the zip file"}
    assert files_below(config.coco_dir) == {f"{split}.zip", f"{split}/a.jpg", f"{split}/c.jpg"}


@pytest.mark.parametrize("delete", ["yes", "no"])
def test_what_an_archive_takes_is_told_before_and_that_it_may_go_afterwards(config, server, capsys, delete):
    config = dataclasses.replace(config, image_source="zip", delete_zip=delete)
    publish(server, "zips/train2014.zip", {"train2014/a.jpg": b"image"})
    assert fetch_images([CaptionedImage(0, "a.jpg"), CaptionedImage(1, "b.jpg")], config).keys() == {"b.jpg"}
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith(f"train2014.zip takes 0.0 GB in {config.coco_dir}, and the 2 images ")
    assert f"{config.coco_dir}/train2014.zip {'is deleted' if delete == 'yes' else 'may be deleted'}" in after
    assert files_below(config.coco_dir) == {"train2014/a.jpg", *(["train2014.zip"] if delete == "no" else [])}


def test_an_archive_whose_images_cannot_be_unpacked_stays(config, server):
    config = dataclasses.replace(config, image_source="zip", delete_zip="yes")
    publish(server, "zips/train2014.zip", {"train2014/a.jpg": b"image"})
    archive = server.folder / "zips/train2014.zip"
    archive.write_bytes(archive.read_bytes().replace(b"image", b"imagx"))  # its CRC-32 is wrong now
    server.publish(archive)
    with pytest.raises(UserError, match="is damaged"):
        fetch_images([CaptionedImage(0, "a.jpg")], config)
    assert files_below(config.coco_dir) == {"train2014.zip"}


@pytest.mark.parametrize(("free", "come", "fits"), [(13.6e9, 0, False), (13.6e9, 200_000_000, True), (13.7e9, 0, True)])
def test_an_archive_that_does_not_fit_is_not_begun(config, monkeypatch, free, come, fits):
    """The archive has 13.51 GB, and a thousand images of it take 163 MB."""
    monkeypatch.setattr("support.files.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))
    monkeypatch.setattr("captioning.data.coco_download.download", lambda url, path, **more: empty_archive(path))
    config = dataclasses.replace(config, image_source="zip")
    images = [CaptionedImage(number, f"{number}.jpg") for number in range(1000)]
    if come:
        part = pathlib.Path(config.coco_dir, "train2014.zip.part")
        part.parent.mkdir()
        with part.open("wb") as file:
            file.truncate(come)
    if fits:
        assert len(fetch_images(images, config)) == 1000
        return
    with pytest.raises(UserError, match="do not fit into .*13,600 MB free there.*--image_source each"):
        fetch_images(images, config)
    assert not pathlib.Path(config.coco_dir).exists()


def empty_archive(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    zipfile.ZipFile(path, "w").close()


def test_a_split_without_an_archive_is_one_line(config):
    config = dataclasses.replace(config, coco_split="test2014", image_source="zip")
    with pytest.raises(UserError, match=r"^1 images of test2014 are missing, .* of train2014.*--image_source each$"):
        fetch_images([CaptionedImage(1, "a.jpg")], config)


# --- Karpathy's split of COCO


def test_karpathys_images_come_from_their_addresses(karpathy, server):
    images = []
    for split, name in (("train2014", "a.jpg"), ("val2014", "b.jpg")):
        (image,) = serve_images(server, split, [name])
        images.append(dataclasses.replace(image, folder=split))
    flickr = CaptionedImage(7, "flickr.jpg")
    skipped = fetch_images([*images, flickr], karpathy)
    assert list(skipped) == ["flickr.jpg"] and "gives no address" in skipped["flickr.jpg"]
    assert files_below(karpathy.images) == {"train2014/a.jpg", "val2014/b.jpg"}


def test_karpathys_images_come_from_the_archives_of_their_folders(karpathy, server):
    config = dataclasses.replace(karpathy, image_source="zip")
    publish(server, "zips/train2014.zip", {"train2014/a.jpg": b"image", "train2014/x.jpg": b"image"})
    publish(server, "zips/val2014.zip", {"val2014/b.jpg": b"image", "val2014/a.jpg": b"another image"})
    images = [
        CaptionedImage(1, "a.jpg", "train2014"),
        CaptionedImage(2, "b.jpg", "val2014"),
        CaptionedImage(3, "c.jpg", "val2014"),
        CaptionedImage(4, "d.jpg"),
        CaptionedImage(5, "e.jpg", "deeper/folder"),
    ]
    skipped = fetch_images(images, config)
    assert skipped.keys() == {"val2014/c.jpg", "d.jpg", "deeper/folder/e.jpg"}
    assert skipped["val2014/c.jpg"] == "not in the zip file"
    assert "gives no address" in skipped["d.jpg"] and "gives no address" in skipped["deeper/folder/e.jpg"]
    expected = {"train2014/a.jpg", "val2014/b.jpg", "train2014.zip", "val2014.zip"}
    assert files_below(karpathy.images) == expected
