import contextlib
import io
import json
import pathlib
import shutil

import pytest
from PIL import Image
from pycocotools.coco import COCO

import inference_image_caption as inference
from conftest import options
from support.errors import UserError
from tiny_captioner import colour_network

FIELD_INPUTS = pathlib.Path(__file__).parents[3] / "shared" / "field_inputs"


@pytest.fixture(autouse=True)
def own_network(monkeypatch):
    monkeypatch.setattr(inference.run_folder, "run_network", lambda config, keep=False: colour_network)


def load_results(annotations, results):
    """The image ids of a results file that pycocotools takes for an annotation file."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations)).loadRes(str(results)).getImgIds()


def image_info(folder, split="test2014", ids=(9, 4, 7)):
    """A file of images without captions in COCO's layout, and its images."""
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    records = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 64, "height": 48} for i in ids]
    for record in records:
        Image.new("RGB", (64, 48), (20 * record["id"], 0, 0)).save(folder / split / record["file_name"])
    path = folder / "annotations" / f"image_info_{split}.json"
    path.write_text(json.dumps({"info": {}, "images": records, "annotations": []}))
    return path


def test_images_of_a_list_get_results_with_their_ids(trained, tmp_path, capsys):
    listed = image_info(tmp_path / "coco")
    argv = ["--run_dir", str(trained / "run"), "--image", str(listed), "--output", str(tmp_path / "out")]
    inference.main([*argv, "--results", str(tmp_path / "results.json")])
    assert "3 captions are in" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["image_id"] for result in results] == [4, 7, 9]
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert {line["image_id"]: line["caption"] for line in lines} == {r["image_id"]: r["caption"] for r in results}
    assert sorted(load_results(listed, tmp_path / "results.json")) == [4, 7, 9]


def test_results_of_validation_images_have_the_ids_of_the_captions_file(trained, tmp_path):
    argv = [*options(trained), "--output", str(tmp_path), "--plot_images", "3", "--results", str(tmp_path / "r.json")]
    inference.main(argv)
    ids = [result["image_id"] for result in json.loads((tmp_path / "r.json").read_text())]
    assert len(set(ids)) == 3
    loaded = load_results(trained / "coco" / "annotations" / "captions_train2014.json", tmp_path / "r.json")
    assert set(ids) <= set(loaded)


def test_results_hold_the_images_asked_for_by_their_names_and_no_others(trained, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / name)
    argv = ["--run_dir", str(trained / "run"), "--output", str(tmp_path / "out"), "--results", str(tmp_path / "r.json")]
    inference.main([*argv, "--image", str(tmp_path / "a.png")])
    inference.main([*argv, "--image", str(tmp_path / "b.png")])
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["image_id"] == str(tmp_path / "b.png") and isinstance(result["caption"], str)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no json", "cannot be read"),
        ("[]", 'does not list "images"'),
        ('{"images": [{"id": 1}]}', 'does not list "images"'),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(trained, tmp_path, text, reason):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        inference.main(["--run_dir", str(trained / "run"), "--image", str(tmp_path / "list.json")])


def test_a_list_whose_images_are_nowhere_is_one_line_that_says_where_they_were_looked_for(trained, tmp_path):
    listed = image_info(tmp_path)
    shutil.rmtree(tmp_path / "test2014")
    with pytest.raises(UserError, match="lists 3 images, none of which is in .*test2014"):
        inference.main(["--run_dir", str(trained / "run"), "--image", str(listed)])


def test_results_do_not_go_with_what_writes_no_captions(trained):
    for option in (["--evaluate"], ["--export", "x"]):
        with pytest.raises(UserError, match="--results does not go with"):
            inference.main(["--run_dir", str(trained / "run"), "--results", "r.json", *option])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--image", "x.jpg", "--split", "test"], "--split does not go with --image: leave it out"),
        (["--evaluate", "--anew"], "--anew does not go with --evaluate"),
        (["--export", "x", "--output", "y"], "--output does not go with --export"),
        (["--serve", "0", "--attention", "all"], "--attention does not go with --serve"),
    ],
)
def test_options_that_would_do_nothing_are_told(argv, line):
    with pytest.raises(UserError, match=line):
        inference.main(argv)


def test_the_image_info_of_the_field_inputs_is_captioned(trained, tmp_path):
    if not FIELD_INPUTS.is_dir():
        pytest.skip("../shared is not there")
    listed = tmp_path / "image_info.json"
    shutil.copy(FIELD_INPUTS / "image_info.json", listed)
    records = json.loads(listed.read_text())["images"]
    for record in records:
        Image.new("RGB", (64, 48), "blue").save(tmp_path / record["file_name"])
    argv = ["--run_dir", str(trained / "run"), "--image", str(listed), "--output", str(tmp_path / "out")]
    inference.main([*argv, "--results", str(tmp_path / "r.json")])
    ids = [result["image_id"] for result in json.loads((tmp_path / "r.json").read_text())]
    assert sorted(ids) == sorted(record["id"] for record in records)
