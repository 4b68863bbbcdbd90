import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

import support.files
from captioning.demo import scenes as demo_scenes
from captioning.demo.scenes import Scene, SceneObject
from support.errors import UserError

COUNT = 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo_scenes.draw_demo(folder, COUNT, seed=7)
    return folder


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scene_of(*objects):
    things = [SceneObject(*words.split(), box=[10 * n, 0, 9, 9]) for n, words in enumerate(objects)]
    return Scene(1, "1.jpg", 320, 240, "grass", things)


BALL = scene_of("ball red striped left")
PAIR = scene_of("ball red striped left", "box blue plain right")


# --- Drawing ------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawn, tmp_path):
    demo_scenes.draw_demo(tmp_path / "same", COUNT, seed=7)
    demo_scenes.draw_demo(tmp_path / "other", COUNT, seed=8)
    assert read_all(tmp_path / "same") == read_all(drawn)
    assert not set(read_all(tmp_path / "other").values()) & set(read_all(drawn).values())


def test_more_scenes_begin_with_the_same_ones(drawn, tmp_path):
    demo_scenes.draw_demo(tmp_path, COUNT + 2, seed=7)
    scenes = demo_scenes.read_scenes(tmp_path)
    assert [scenes[number] for number in range(1, COUNT + 1)] == list(demo_scenes.read_scenes(drawn).values())


def test_the_layout_is_that_of_coco_2014(drawn):
    data = json.loads((drawn / "annotations" / "captions_train2014.json").read_text())
    assert set(data) == {"info", "licenses", "images", "annotations"}
    assert [image["id"] for image in data["images"]] == list(range(1, COUNT + 1))
    for image in data["images"]:
        assert image["file_name"] == f"COCO_train2014_{image['id']:012d}.jpg"
        with Image.open(drawn / "train2014" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
    assert [annotation["id"] for annotation in data["annotations"]] == list(range(1, 5 * COUNT + 1))
    for number in range(1, COUNT + 1):
        captions = [note["caption"] for note in data["annotations"] if note["image_id"] == number]
        assert captions == demo_scenes._write_captions(demo_scenes.read_scenes(drawn)[number])


def test_each_box_holds_its_object_and_lies_in_the_image():
    for number in range(1, 60):
        # On grass, which is neither white as a ball's edge nor black as a box's.
        scene = dataclasses.replace(demo_scenes._compose_scene(number, seed=7), ground="grass")
        with_objects = demo_scenes._draw_scene(scene, seed=7).astype(int)
        without = demo_scenes._draw_scene(dataclasses.replace(scene, objects=[]), seed=7).astype(int)
        painted = np.abs(with_objects - without).sum(axis=2) > 0
        for thing in scene.objects:
            x, y, w, h = thing.box
            assert x >= 0 and y >= 0 and x + w <= scene.width and y + h <= scene.height
            inside = with_objects[y : y + h, x : x + w]
            # Of the object's hue: light and shadow change the length of a colour, not its direction.
            hue = np.array(demo_scenes.COLOURS[thing.colour])
            cosine = inside @ hue / np.maximum(np.linalg.norm(inside, axis=2) * np.linalg.norm(hue), 1)
            share = {"plain": 0.6, "striped": 0.25, "dotted": 0.15, "checkered": 0.25}[thing.pattern]
            assert (cosine > 0.98).mean() > share
            # As wide as the object: paint reaches the middle of each side, and beyond the box there is but shadow.
            assert painted[y + h // 2, [x, x + w - 1]].all() and painted[[y, y + h - 1], x + w // 2].all()
        for x, y, w, h in (thing.box for thing in scene.objects):
            painted[max(y - 4, 0) : y + h + 12, max(x - 4, 0) : x + w + 12] = False
        assert not painted.any()


@pytest.mark.parametrize("noun", ["ball", "box"])
def test_a_shadow_falls_to_the_lower_right(noun):
    thing = SceneObject(noun, "red", "plain", "middle", [110, 70, 100, 100])
    scene = Scene(1, "1.jpg", 320, 240, "snow", [thing])
    with_object = demo_scenes._draw_scene(scene, seed=7).astype(int).sum(axis=2)
    without = demo_scenes._draw_scene(dataclasses.replace(scene, objects=[]), seed=7).astype(int).sum(axis=2)
    darker = with_object < 0.9 * without
    x, y = 160, 120  # the object's middle
    assert darker[y, x + 50 : x + 54].all() and darker[y + 50 : y + 55, x].all()
    assert not darker[y, : x - 50].any() and not darker[: y - 50, x].any()
    assert not darker[y, x + 60 :].any() and not darker[y + 60 :, x].any()


def test_places_are_true_and_no_two_objects_are_of_one_colour():
    centres = {}
    for number in range(1, 400):
        scene = demo_scenes._compose_scene(number, seed=7)
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            x, y, w, h = thing.box
            centre = (x + w / 2) / scene.width, (y + h / 2) / scene.height
            centres.setdefault(thing.place, []).append(centre)
    assert max(x for x, _ in centres["left"]) < 0.4 and min(x for x, _ in centres["right"]) > 0.6
    assert max(y for _, y in centres["top"]) < 0.4 and min(y for _, y in centres["bottom"]) > 0.6
    assert all(0.4 < share < 0.6 for centre in centres["middle"] for share in centre)


# --- Reruns -------------------------------------------------------------------------------------------------------


def test_a_rerun_writes_nothing(tmp_path, monkeypatch):
    demo_scenes.draw_demo(tmp_path, 3, seed=7)
    for module in (support.files, demo_scenes):
        monkeypatch.setattr(module, "replacing", lambda path: pytest.fail(f"writes {path}"))
    demo_scenes.draw_demo(tmp_path, 3, seed=7)


def test_a_killed_run_continues_and_leaves_no_half_files(tmp_path, monkeypatch):
    demo_scenes.draw_demo(tmp_path / "whole", 5, seed=7)
    draw_scene, drawn = demo_scenes._draw_scene, []

    def killed_at_the_third(scene, seed):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(scene.image_id)
        return draw_scene(scene, seed)

    monkeypatch.setattr(demo_scenes, "_draw_scene", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        demo_scenes.draw_demo(tmp_path / "killed", 5, seed=7)
    assert not (tmp_path / "killed" / "annotations" / "captions_train2014.json").exists()
    half = tmp_path / "killed" / "train2014" / f"{support.files.TEMPORARY}1-1-half.jpg"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))

    monkeypatch.setattr(
        demo_scenes, "_draw_scene", lambda scene, seed: drawn.append(scene.image_id) or draw_scene(scene, seed)
    )
    demo_scenes.draw_demo(tmp_path / "killed", 5, seed=7)
    assert drawn == [1, 2, 3, 4, 5]
    assert read_all(tmp_path / "killed") == read_all(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"seed": 8}, {"count": 2}])
def test_another_demo_takes_the_place_of_the_first(tmp_path, change):
    demo_scenes.draw_demo(tmp_path / "one", 4, seed=7)
    wanted = {"count": 4, "seed": 7} | change
    demo_scenes.draw_demo(tmp_path / "one", **wanted)
    demo_scenes.draw_demo(tmp_path / "fresh", **wanted)
    assert read_all(tmp_path / "one") == read_all(tmp_path / "fresh")


def test_what_another_version_drew_is_drawn_anew(tmp_path, monkeypatch):
    demo_scenes.draw_demo(tmp_path, 2, seed=7)
    image = next((tmp_path / "train2014").iterdir())
    image.write_bytes(b"of an older version")
    monkeypatch.setattr(demo_scenes, "_VERSION", demo_scenes._VERSION + 1)
    demo_scenes.draw_demo(tmp_path, 2, seed=7)
    assert image.read_bytes() != b"of an older version"


@pytest.mark.parametrize("name", ["annotations/captions_train2014.json", "train2014/COCO_train2014_000000000009.jpg"])
def test_another_data_set_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="holds another data set.*--coco_dir"):
        demo_scenes.draw_demo(tmp_path, 2, seed=7)
    assert list(read_all(tmp_path).values()) == [b"{}"]


def test_missing_scenes_name_the_command_that_mends(tmp_path):
    with pytest.raises(UserError, match="python data_utils.py --dataset demo"):
        demo_scenes.read_scenes(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"scenes": 3}', '{"scenes": [3]}', '{"scenes": [{"objects": []}]}'])
def test_damaged_scenes_name_the_command_that_mends(tmp_path, text):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "scenes_train2014.json").write_text(text)
    with pytest.raises(UserError, match="is damaged .*python data_utils.py --dataset demo"):
        demo_scenes.read_scenes(tmp_path)
    if text != '{"scenes": [{"objects": []}]}':
        with pytest.raises(UserError, match="is damaged .*delete that file"):
            demo_scenes.draw_demo(tmp_path, 2, seed=7)


def test_no_file_outside_the_folder_of_images_is_deleted(tmp_path):
    (tmp_path / "demo" / "annotations").mkdir(parents=True)
    (tmp_path / "precious.jpg").touch()
    scenes = {"scenes": [{"file_name": "../../precious.jpg"}, {"file_name": str(tmp_path / "precious.jpg")}]}
    (tmp_path / "demo" / "annotations" / "scenes_train2014.json").write_text(json.dumps(scenes))
    demo_scenes.draw_demo(tmp_path / "demo", 2, seed=7)
    assert (tmp_path / "precious.jpg").exists()
    assert len(demo_scenes.read_scenes(tmp_path / "demo")) == 2


@pytest.mark.parametrize("replace", [True, False])
def test_a_fresh_temporary_file_stays_where_another_host_may_be_writing_it(tmp_path, replace):
    demo_scenes.draw_demo(tmp_path, 2, seed=7)
    half = tmp_path / "train2014" / f"{support.files.TEMPORARY}1-half.jpg"
    half.write_bytes(b"half")
    demo_scenes.draw_demo(tmp_path, 2, seed=7, replace=replace)
    assert half.exists() == (not replace)


def test_hosts_that_share_a_folder_do_not_replace_each_others_scenes(tmp_path):
    demo_scenes.draw_demo(tmp_path, 2, seed=7, replace=False)
    before = read_all(tmp_path)
    demo_scenes.draw_demo(tmp_path, 2, seed=7, replace=False)
    with pytest.raises(UserError, match="holds scenes of other settings.*--coco_dir"):
        demo_scenes.draw_demo(tmp_path, 3, seed=7, replace=False)
    assert read_all(tmp_path) == before


# --- Captions -----------------------------------------------------------------------------------------------------


def test_five_different_captions_of_a_readable_length():
    for number in range(1, 200):
        captions = demo_scenes._write_captions(demo_scenes._compose_scene(number, seed=7))
        assert len(set(captions)) == 5
        assert all(8 <= len(caption.split()) <= 22 and caption[0].isupper() for caption in captions)


def test_what_the_captions_say_is_in_the_scene():
    captions = demo_scenes._write_captions(PAIR)
    assert captions[0] == "A ball with red stripes lies on the grass to the left of a box in plain blue."
    assert captions[2] == "To the right of a ball with red stripes there is a box in plain blue on the grass."
    assert demo_scenes._write_captions(BALL)[0] == "A ball with red stripes lies on the grass on the left."
