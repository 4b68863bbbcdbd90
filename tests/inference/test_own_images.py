import collections
import http.server
import io
import os
import re
import socket
import threading

import numpy as np
import pillow_heif
import pytest
import tensorflow as tf
from PIL import Image

from captioning.features.cache import ImageToCaption
from captioning.inference import own_images
from captioning.inference.own_images import describe_skipped, extract_batches, fetch_images, find_images
from captioning.settings import make_config
from support.errors import UserError


def red_network(pixels):
    """A stand-in for InceptionV3: the first pixel's red in every feature."""
    return tf.fill((len(pixels), 64, 2048), 1.0) * tf.cast(pixels[:, :1, :1, 0], "float32")


def find(names, output):
    return find_images(names, output, collections.Counter())


def set_up_heif():
    """What set_up_pillow does for HEIC files; it also sets limits, which the other tests do not expect."""
    pillow_heif.register_heif_opener()


def test_files_folders_and_addresses_are_found_each_once(tmp_path):
    deep = tmp_path / "images" / "deep" / "deeper"
    deep.mkdir(parents=True)
    for path in (deep / "b.png", deep / "a.JPG", tmp_path / "c.webp"):
        Image.new("RGB", (8, 8)).save(path, "png")
    (deep / "notes.txt").write_text("not an image, and not taken for one")
    address = "https://example.org/red.png"
    names = [str(tmp_path / "c.webp"), address, str(tmp_path / "images"), str(deep / "a.JPG"), address, "gone.jpg"]
    found = find(names, tmp_path)
    assert [image.name for image in found] == [
        names[0],
        address,
        str(deep / "a.JPG"),
        str(deep / "b.png"),
        names[5],
    ]
    assert found[1].path.parent == tmp_path / "downloads"
    assert all(image.image_id is None and not image.references for image in found)


def test_a_pipe_and_a_name_that_is_too_long_cost_a_line_each_and_nothing_else(tmp_path, capsys, soon):
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = find([str(tmp_path), "x" * 300 + ".jpg"], tmp_path / "out")
    skipped = collections.Counter()
    ((done, _),) = extract_batches(red_network, images, make_config(), skipped)
    assert [image.path.name for image in done] == ["a.png"] and skipped == {"not readable": 2}
    pipe, long = capsys.readouterr().out.splitlines()
    assert pipe.startswith(f"{tmp_path / 'pipe.jpg'} cannot be read") and long.startswith("x" * 300)


def test_no_order_in_an_address_reaches_the_terminal(tmp_path, capsys):
    images = find(["http://\x1b[31m/a\nb.jpg"], tmp_path / "out")
    assert fetch_images(images, 1, collections.Counter()) == []
    printed = capsys.readouterr().out
    assert r"http://\x1b[31m/a\nb.jpg cannot be fetched" in printed
    assert all(line.isprintable() for line in printed.splitlines()) and "\nb.jpg" not in printed


def test_a_folder_without_images_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no image file is in .* \(1 \*.txt\): .*--image"):
        find([str(tmp_path)], tmp_path / "out")


def found_below(folder, output):
    """The images found in a folder, as paths below it, and what was skipped in words."""
    skipped = collections.Counter()
    found = find_images([str(folder)], output, skipped)
    return [str(image.path.relative_to(folder)) for image in found], describe_skipped(skipped)


def names_found(names, output):
    return [image.name for image in find(names, output)]


def test_a_pattern_that_the_shell_left_alone_is_the_files_that_it_fits(tmp_path, monkeypatch):
    """As on Windows. A file of just such a name is that file."""
    for name in ("pics/b.jpg", "pics/a.jpg", "pics/deep/c.jpg", "pics/notes.txt", "a[1].jpg", "a1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    a, b, c = (os.path.join("pics", *name) for name in (["a.jpg"], ["b.jpg"], ["deep", "c.jpg"]))
    assert names_found(["pics/*.jpg"], tmp_path / "out") == [a, b]
    assert names_found(["pics/**/*.jpg"], tmp_path / "out") == [a, b, c]
    assert names_found(["pic?"], tmp_path / "out") == [a, b, c]  # a folder
    assert names_found(["a[1].jpg"], tmp_path / "out") == ["a[1].jpg"]
    assert names_found(["no*.jpg"], tmp_path / "out") == ["no*.jpg"]  # which costs a line
    assert names_found(["http://a/*.jpg?b"], tmp_path / "out") == ["http://a/*.jpg?b"]


def test_a_pattern_enters_a_folder_once_whatever_links_lead_back_to_it(tmp_path, monkeypatch):
    (tmp_path / "pics" / "deep").mkdir(parents=True)
    for name in ("pics/z.png", "pics/deep/c.png"):
        (tmp_path / name).touch()
    try:
        (tmp_path / "pics" / "deep" / "loop").symlink_to(tmp_path / "pics")
        (tmp_path / "pics" / "linked.png").symlink_to(tmp_path / "pics" / "z.png")
    except OSError:
        pytest.skip("links need another account here")
    monkeypatch.chdir(tmp_path)
    expected = [os.path.join("pics", *name) for name in (["deep", "c.png"], ["linked.png"], ["z.png"])]
    assert names_found(["pics/**/*.png"], tmp_path / "out") == expected


def test_a_list_names_files_folders_patterns_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("pics/a.jpg", "home/b.jpg", "c é.jpg", "deep/list.txt", "@odd.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text = "# mine\n\npics\r\n  c é.jpg  \n~/b.jpg\npics/*.jpg\nhttps://example.org/a#1\n   # no more\n"
    expected = [os.path.join("pics", "a.jpg"), "c é.jpg", str(tmp_path / "home" / "b.jpg"), "https://example.org/a#1"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "deep" / "list.txt").write_bytes(text.encode(encoding))
        assert names_found(["@deep/list.txt"], tmp_path / "out") == expected
    (tmp_path / "deep" / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert names_found(["@deep/list.txt"], tmp_path / "out") == [os.fsdecode(b"caf\xe9.jpg")]
    assert names_found(["@odd.jpg"], tmp_path / "out") == ["@odd.jpg"]
    assert names_found(["~/b.jpg"], tmp_path / "out") == expected[2:3]


@pytest.mark.parametrize(
    ("data", "reason"), [(None, "No such file"), (b"a\0b.jpg", "no text"), (b"\xff\xfe\0", "utf-16")]
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, data, reason):
    if data:
        (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"the list .*list.txt cannot be read .*{reason}.*: name a text file behind @"):
        find([f"@{tmp_path / 'list.txt'}"], tmp_path / "out")


def test_a_list_without_names_is_one_line(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing yet\n")
    with pytest.raises(UserError, match="no image file is in @.*list.txt"):
        find([f"@{tmp_path / 'list.txt'}"], tmp_path / "out")


def test_a_linked_folder_is_read_once_and_its_own_place_counts(tmp_path):
    """However the links lead, and whatever is linked to from outside."""
    for name in ("pics/real/a.png", "pics/b.png", "elsewhere/c.png", "elsewhere/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    try:
        for link, target in (("again", "real"), ("loop", "."), ("more", "../elsewhere"), ("real/up", "..")):
            (tmp_path / "pics" / link).symlink_to(tmp_path / "pics" / target)
        (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "pics")
        (tmp_path / "pics" / "gone").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("the file system has no links")
    found, skipped = found_below(tmp_path / "pics", tmp_path / "out")
    assert found == ["b.png", "more/c.png", "more/deep/d.png", "real/a.png"]
    assert skipped == "1 files without an ending"


def test_a_linked_output_folder_is_left_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "pics").mkdir()
    for name in ("pics/a.png", "out/figure.png"):
        (tmp_path / name).touch()
    try:
        (tmp_path / "pics" / "captions").symlink_to(tmp_path / "out")
    except OSError:
        pytest.skip("the file system has no links")
    assert found_below(tmp_path / "pics", tmp_path / "out") == (["a.png"], "")


def test_jpeg_files_that_lack_their_end_are_used_and_noted(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) * 97 // 100])
    cut = []
    images = find([str(tmp_path)], tmp_path / "out")
    ((done, _),) = extract_batches(red_network, images, make_config(), collections.Counter(), cut)
    assert done == images and cut == [tmp_path / "b.jpg"]


def test_a_server_that_wants_to_know_whom_to_ask_is_told(tmp_path, monkeypatch, capsys):
    """As Wikimedia's does. One that wants an address of the user's own gets that from --contact."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            agent, wanted = self.headers["User-Agent"], "me@example.org" if "strict" in self.path else "contact"
            data = io.BytesIO()
            Image.new("RGB", (8, 8)).save(data, "PNG")
            body = data.getvalue() if wanted in agent else b""
            self.send_response(200 if body else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        images = find([f"http://127.0.0.1:{service.server_port}/{name}.png" for name in ("open", "strict")], tmp_path)
        assert fetch_images(images, 2, collections.Counter()) == images[:1]
        printed = capsys.readouterr().out.splitlines()
        assert "strict.png cannot be fetched (HTTP status 403)" in printed[0] and "--contact" in printed[1]
        assert fetch_images(images, 2, collections.Counter(), "me@example.org") == images
        assert capsys.readouterr().out == ""
        service.shutdown()


def test_what_is_no_image_is_left_out_of_a_folder_and_counted_by_kind(tmp_path):
    """Pillow registers the endings of some of them."""
    names = "._a.jpg ._b.HEIC a.jpg paper.pdf film.mpg film.mp4 data.h5 data.hdf5 drawing.eps notes.txt more.txt Thumbs"
    (tmp_path / "deep").mkdir()
    for name in [*names.split(), ".DS_Store", "deep/b.Tiff", "deep/._b.tiff"]:
        (tmp_path / name).touch()
    found, skipped = found_below(tmp_path, tmp_path / "out")
    assert found == ["a.jpg", "deep/b.Tiff"]
    assert set(skipped.split(", ")) == {
        "2 *.txt",
        "2 files without an ending",
        "3 macOS side files (._*)",
        *(f"1 *.{ending}" for ending in ("eps", "h5", "hdf5", "mp4", "mpg")),
        "1 others",
    }


def test_the_line_of_what_is_left_out_is_short_and_one_whatever_the_names_are(tmp_path):
    (tmp_path / "a.png").touch()
    for name in [b"a.x\ny", b"a.\x1b[31m", b"a.\xff", *(b"a.%03d" % number for number in range(200))]:
        try:
            open(os.path.join(os.fsencode(tmp_path), name), "wb").close()
        except OSError:
            pytest.skip("the file system does not take such names")
    found, line = found_below(tmp_path, tmp_path / "out")
    assert found == ["a.png"]
    assert line.isprintable() and len(line) < 200
    assert sum(map(int, re.findall(r"(\d+) (?:\*|others)", line))) == 203


def test_nothing_is_counted_where_nothing_is_left_out(tmp_path):
    (tmp_path / "a.png").touch()
    assert found_below(tmp_path, tmp_path / "out") == (["a.png"], "")


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(place):
        if os.path.basename(place) == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found_below(tmp_path, tmp_path / "out") == (["a.png"], "1 folders that cannot be read")


@pytest.mark.parametrize("output", ["out", "deep/out", "deep/../out"])
def test_an_output_folder_among_the_images_is_left_out(tmp_path, monkeypatch, output):
    (tmp_path / output).resolve().mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "output.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / output / "001_a.png").touch()
    (tmp_path / output / "downloads").mkdir()
    (tmp_path / output / "downloads" / "c.png").touch()
    expected = ["a.png", "deep/b.png", "output.png"]
    assert found_below(tmp_path, tmp_path / output) == (expected, "")
    monkeypatch.chdir(tmp_path)  # and by another name of it
    assert [str(image.path) for image in find(["."], tmp_path / output)] == expected


def test_an_output_folder_that_holds_the_images_is_one_line(tmp_path):
    """The next run would take this one's figures for images."""
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds the images: give another folder by --output"):
        find([str(tmp_path)], tmp_path / "deep" / "..")
    assert len(find([str(tmp_path / "a.png")], tmp_path)) == 1  # a file is no folder
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.png").touch()
    assert found_below(tmp_path / "deep", tmp_path) == (["b.png"], "")  # figures go where no image is


def test_photographs_of_phones_are_images(tmp_path):
    set_up_heif()
    for name in ("a.heic", "b.HEIC", "c.heif", "d.avif", "e.jp2", "f.MPO"):
        (tmp_path / name).touch()
    found, skipped = found_below(tmp_path, tmp_path / "out")
    assert found == ["a.heic", "b.HEIC", "c.heif", "d.avif", "e.jp2", "f.MPO"]
    assert skipped == ""


def test_a_heic_photograph_becomes_features(tmp_path):
    set_up_heif()
    Image.new("RGB", (64, 64), (250, 0, 0)).save(tmp_path / "a.heic", "HEIF")
    images = find([str(tmp_path)], tmp_path / "out")
    ((done, features),) = extract_batches(red_network, images, make_config(), collections.Counter())
    assert done == images
    np.testing.assert_allclose(features, 250, atol=8)


def test_two_ways_to_write_a_path_are_one_image_and_two_names_of_a_file_are_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    same = ["a.png", "./a.png", str(tmp_path / "a.png"), "deep/../a.png", "."]
    assert [image.name for image in find(same, tmp_path / "out")] == ["a.png"]
    try:
        (tmp_path / "b.png").symlink_to("a.png")
    except OSError:
        pytest.skip("the file system has no links")
    assert [image.name for image in find(["."], tmp_path / "out")] == ["a.png", "b.png"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "a.png").touch()
    try:
        (tmp_path / "again").symlink_to(tmp_path)
    except OSError:
        pytest.skip("the file system has no links")
    assert found_below(tmp_path, tmp_path / "out") == (["a.png"], "")


def test_a_name_that_is_not_utf8_is_found_and_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        open(path, "wb").close()
    except OSError:
        pytest.skip("the file system does not take such a name")
    Image.new("RGB", (8, 8), (7, 0, 0)).save(os.fsdecode(path))
    (image,) = find([str(tmp_path)], tmp_path / "out")
    assert os.fsencode(image.name) == path
    ((done, features),) = extract_batches(red_network, [image], make_config(), collections.Counter())
    assert done == [image] and (features == 7).all()


@pytest.mark.parametrize(
    "address", ["http://a/../../x.jpg", "http://a/", "http://a/" + "x" * 5000, "http://a/é\\..\\b"]
)
def test_no_address_leads_out_of_the_folder_or_to_anothers_file(tmp_path, address):
    first, second = (find([name], tmp_path)[0].path for name in (address, address + "?"))
    assert first.parent == second.parent == tmp_path / "downloads" and first != second
    assert re.fullmatch("[A-Za-z0-9_]{1,80}", first.name)


def test_images_from_the_web_among_files_and_bad_ones(tmp_path, server, monkeypatch, capsys):
    Image.new("RGB", (80, 200), "red").save(server.folder / "red.png")
    Image.new("RGB", (80, 200), "blue").save(tmp_path / "blue.png")
    (server.folder / "huge.jpg").write_bytes(bytes(20_000))
    monkeypatch.setattr(own_images, "_MOST_IMAGE_BYTES", 10_000)
    (tmp_path / "secret").write_text("of this machine")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/a.jpg"
    red = f"{server.url}/red.png?size=../../large"
    bad = {
        f"{server.url}/missing.jpg": "404",
        f"{server.url}/huge.jpg": "longer than 10,000 bytes",
        refused: "refused",
        f"file://{tmp_path / 'secret'}": "only http and https",
        "http://[half": "Invalid",
    }
    images = find([red, *bad, red, str(tmp_path / "blue.png")], tmp_path)
    skipped = collections.Counter()
    fetched = fetch_images(images, 4, skipped)
    assert skipped == {"not fetched": len(bad)}
    assert [image.name for image in fetched] == [red, str(tmp_path / "blue.png")]
    assert [path.name.rsplit("_", 1)[0] for path in (tmp_path / "downloads").iterdir()] == ["red_png"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(bad)
    for address, reason in bad.items():
        (line,) = [line for line in printed if line.startswith(address)]
        assert reason in line


def test_an_image_from_the_web_is_fetched_anew(tmp_path, server):
    images = find([f"{server.url}/webcam.png"], tmp_path)
    for colour in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (30, 30), colour).save(server.folder / "webcam.png")
        (fetched,) = fetch_images(images, 1, collections.Counter())
        with Image.open(fetched.path) as image:
            assert image.getpixel((0, 0)) == colour


@pytest.mark.parametrize(("extract_batch", "sizes"), [(2, [4, 3, 4]), (8, [7, 4])])
def test_each_image_of_many_gets_its_own_features(tmp_path, monkeypatch, capsys, extract_batch, sizes):
    """However the batches of extraction and of decoding lie."""
    for number in range(14):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    for number in (8, 9):  # a whole batch of extraction
        (tmp_path / f"{number:02d}.png").write_bytes(b"broken")
    monkeypatch.setattr(own_images, "_EXTRACTED", 10)
    config = make_config({"extract_batch": extract_batch, "decode_batch": 4})
    skipped = collections.Counter()
    batches = list(extract_batches(red_network, find([str(tmp_path)], tmp_path / "out"), config, skipped))
    assert [len(images) for images, _ in batches] == sizes
    numbers = [[int(image.path.stem) for image in images] for images, _ in batches]
    assert sum(numbers, []) == [0, 1, 2, 3, 4, 6, 7, 10, 11, 12, 13]
    assert numbers == [features[:, 0, 0].tolist() for _, features in batches]
    assert capsys.readouterr().out.count("cannot be read") == 3
    assert skipped == {"not readable": 3}


def test_a_bad_image_is_called_by_the_name_that_the_user_gave(tmp_path, capsys):
    for name in ("bad", "local.jpg"):
        (tmp_path / name).write_text("no image")
    images = [
        ImageToCaption(tmp_path / "bad", "http://a/b.jpg"),
        ImageToCaption(tmp_path / "local.jpg", str(tmp_path / "local.jpg")),
    ]
    assert list(extract_batches(red_network, images, make_config(), collections.Counter())) == []
    web, other = capsys.readouterr().out.splitlines()
    assert web.startswith("http://a/b.jpg: ") and "cannot be read as an image" in web
    assert other.startswith(f"{tmp_path / 'local.jpg'} cannot be read as an image")


def test_nothing_is_left_of_the_extractions_graphs(tmp_path):
    """Decoding, between batches, computes in float32."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = find([str(tmp_path / "a.png")], tmp_path)
    config = make_config({"extract_precision": "bfloat16"})
    for _, features in extract_batches(red_network, images, config, collections.Counter()):
        rewriting = tf.config.optimizer.get_experimental_options()
        assert not rewriting.get("auto_mixed_precision_onednn_bfloat16")
        assert features.dtype == np.float32
