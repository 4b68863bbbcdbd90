import json

import demo_scenes
import files
from command_line import UserError

import numpy as np
import pytest
from PIL import Image

COUNT = 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo_scenes.draw_demo(folder, COUNT, seed=7)
    return folder


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scene_of(*objects, ground="grass"):
    keys = ("noun", "colour", "pattern", "place")
    things = [
        dict(zip(keys, words.split(), strict=True)) | {"box": [10 * n, 0, 9, 9]} for n, words in enumerate(objects)
    ]
    return {"ground": ground, "objects": things}


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
        with Image.open(drawn / "train2014" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    assert [annotation["id"] for annotation in data["annotations"]] == list(range(1, 5 * COUNT + 1))
    for number in range(1, COUNT + 1):
        captions = [note["caption"] for note in data["annotations"] if note["image_id"] == number]
        assert captions == demo_scenes.write_captions(demo_scenes.read_scenes(drawn)[number])


def test_each_box_holds_its_object_and_lies_in_the_image():
    for number in range(1, 60):
        # On grass, which is neither white as a ball's edge nor black as a box's.
        scene = demo_scenes.compose_scene(number, seed=7) | {"ground": "grass"}
        with_objects = demo_scenes.draw_scene(scene, seed=7).astype(int)
        without = demo_scenes.draw_scene(scene | {"objects": []}, seed=7).astype(int)
        painted = np.abs(with_objects - without).sum(axis=2) > 0
        for thing in scene["objects"]:
            x, y, w, h = thing["box"]
            assert x >= 0 and y >= 0 and x + w <= scene["width"] and y + h <= scene["height"]
            inside = with_objects[y : y + h, x : x + w]
            # Of the object's hue: light and shadow change the length of a colour, not its direction.
            hue = np.array(demo_scenes.COLOURS[thing["colour"]])
            cosine = inside @ hue / np.maximum(np.linalg.norm(inside, axis=2) * np.linalg.norm(hue), 1)
            share = {"plain": 0.6, "striped": 0.25, "dotted": 0.15, "checkered": 0.25}[thing["pattern"]]
            assert (cosine > 0.98).mean() > share
            # As wide as the object: paint reaches the middle of each side, and beyond the box there is but shadow.
            assert painted[y + h // 2, [x, x + w - 1]].all() and painted[[y, y + h - 1], x + w // 2].all()
        for x, y, w, h in (thing["box"] for thing in scene["objects"]):
            painted[max(y - 4, 0) : y + h + 12, max(x - 4, 0) : x + w + 12] = False
        assert not painted.any()


def test_places_are_true_and_no_two_objects_are_of_one_colour():
    centres = {}
    for number in range(1, 400):
        scene = demo_scenes.compose_scene(number, seed=7)
        assert len({thing["colour"] for thing in scene["objects"]}) == len(scene["objects"])
        for thing in scene["objects"]:
            x, y, w, h = thing["box"]
            centre = (x + w / 2) / scene["width"], (y + h / 2) / scene["height"]
            centres.setdefault(thing["place"], []).append(centre)
    assert max(x for x, _ in centres["left"]) < 0.4 and min(x for x, _ in centres["right"]) > 0.6
    assert max(y for _, y in centres["top"]) < 0.4 and min(y for _, y in centres["bottom"]) > 0.6
    assert all(0.4 < share < 0.6 for centre in centres["middle"] for share in centre)


# --- Reruns -------------------------------------------------------------------------------------------------------


def test_a_rerun_writes_nothing(tmp_path, monkeypatch):
    demo_scenes.draw_demo(tmp_path, 3, seed=7)
    monkeypatch.setattr(files, "replacing", lambda path: pytest.fail(f"writes {path}"))
    demo_scenes.draw_demo(tmp_path, 3, seed=7)


def test_a_killed_run_continues_and_leaves_no_half_files(tmp_path, monkeypatch):
    demo_scenes.draw_demo(tmp_path / "whole", 5, seed=7)
    draw_scene, drawn = demo_scenes.draw_scene, []

    def killed_at_the_third(scene, seed):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(scene["image_id"])
        return draw_scene(scene, seed)

    monkeypatch.setattr(demo_scenes, "draw_scene", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        demo_scenes.draw_demo(tmp_path / "killed", 5, seed=7)
    assert not (tmp_path / "killed" / "annotations" / "captions_train2014.json").exists()
    (tmp_path / "killed" / "train2014" / f"{files.TEMPORARY}999999999-1-half.jpg").write_bytes(b"half")

    monkeypatch.setattr(
        demo_scenes, "draw_scene", lambda scene, seed: drawn.append(scene["image_id"]) or draw_scene(scene, seed)
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
    monkeypatch.setattr(demo_scenes, "VERSION", demo_scenes.VERSION + 1)
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


# --- Captions -----------------------------------------------------------------------------------------------------


def test_five_different_captions_of_a_readable_length():
    for number in range(1, 200):
        captions = demo_scenes.write_captions(demo_scenes.compose_scene(number, seed=7))
        assert len(set(captions)) == 5
        assert all(8 <= len(caption.split()) <= 22 and caption[0].isupper() for caption in captions)


def test_what_the_captions_say_is_in_the_scene():
    captions = demo_scenes.write_captions(PAIR)
    assert captions[0] == "A ball with red stripes lies on the grass to the left of a box in plain blue."
    assert captions[2] == "To the right of a ball with red stripes there is a box in plain blue on the grass."
    assert demo_scenes.write_captions(BALL)[0] == "A ball with red stripes lies on the grass on the left."


def test_the_scenes_own_captions_are_right_in_everything():
    scenes = [demo_scenes.compose_scene(number, seed=7) for number in range(1, 200) for _ in range(5)]
    captions = [caption for scene in scenes[::5] for caption in demo_scenes.write_captions(scene)]
    scores = demo_scenes.score_captions(captions, scenes)
    assert scores == dict.fromkeys(scores, 1.0)
    assert set(scores) == {*("objects", "mentioned", "noun", "colour", "pattern", "place", "relation", "ground")}


# --- Scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "scene", "expected"),
    [
        ("a ball with red stripes on the left", BALL, {"objects": 1, "mentioned": 1}),
        ("a ball", BALL, {"objects": 1, "noun": 1, "mentioned": 1}),
        ("A BALL with red stripes!", BALL, {"objects": 1}),
        ("a box with red stripes", BALL, {"objects": 0, "noun": 0, "colour": 1, "pattern": 1}),
        ("a ball with blue stripes", BALL, {"objects": 0, "noun": 1, "colour": 0, "pattern": 1}),
        ("a ball with red dots", BALL, {"objects": 0, "colour": 1, "pattern": 0}),
        ("a ball with red blue stripes", BALL, {"objects": 0, "colour": 0.5}),
        ("a ball with red stripes on the right", BALL, {"objects": 0, "place": 0, "pattern": 1}),
        ("on the left is a ball with red stripes", BALL, {"objects": 1, "place": 1}),
        ("on the left is a ball with red stripes and on the right", BALL, {"objects": 0.5, "place": 0.5}),
        ("a ball on the snow", BALL, {"objects": 1, "ground": 0}),
        ("a ball on the grass", BALL, {"objects": 1, "ground": 1}),
        ("", BALL, {"objects": 0, "mentioned": 0}),
        ("on the grass", BALL, {"objects": 0, "mentioned": 0, "ground": 1}),
        ("with red stripes on the grass", BALL, {"objects": 0, "colour": 0, "mentioned": 0}),
        # Two described, one there.
        ("a ball with red stripes and a box in plain blue", BALL, {"objects": 0.5, "colour": 0.5, "mentioned": 1}),
        ("a ball with red stripes and a ball with red stripes", BALL, {"objects": 0.5, "mentioned": 1}),
        # One described, two there.
        ("a box in plain blue", PAIR, {"objects": 1, "mentioned": 0.5}),
        # Two described, two there.
        ("a box in plain blue and a ball with red stripes", PAIR, {"objects": 1, "mentioned": 1}),
        ("a ball with blue stripes and a box in plain red", PAIR, {"objects": 0, "colour": 0, "pattern": 1, "noun": 1}),
        ("a ball with red stripes on the right and a box in plain blue on the left", PAIR, {"objects": 0, "place": 0}),
        ("on the left is a ball with red stripes and on the right is a box in plain blue", PAIR, {"objects": 1}),
        ("on the right is a ball with red stripes and on the left is a box in plain blue", PAIR, {"objects": 0}),
        ("a ball with red stripes to the left of a box in plain blue", PAIR, {"objects": 1, "relation": 1, "place": 1}),
        ("a ball with red stripes to the right of a box in plain blue", PAIR, {"objects": 0, "relation": 0}),
        ("to the right of a ball with red stripes is a box in plain blue", PAIR, {"objects": 1, "relation": 1}),
        ("to the left of a ball with red stripes is a box in plain blue", PAIR, {"objects": 0, "relation": 0}),
        ("a ball with red stripes above a box in plain blue", PAIR, {"objects": 0, "relation": 0, "colour": 1}),
        ("a ball with red stripes to the left of", PAIR, {"objects": 0.5, "relation": 0, "mentioned": 0.5}),
        ("a ball with red stripes to the left of a box in plain red", PAIR, {"objects": 0.5, "relation": 1}),
    ],
)
def test_scores_of_one_caption(caption, scene, expected):
    scores = demo_scenes.score_captions([caption], [scene])
    assert {kind: scores[kind] for kind in expected} == expected


def test_shares_are_over_all_captions_and_what_none_names_is_left_out():
    scores = demo_scenes.score_captions(["a ball", "a box in plain blue and a box", ""], [BALL, PAIR, BALL])
    assert scores == {"objects": 0.5, "noun": 2 / 3, "colour": 1.0, "pattern": 1.0, "mentioned": 0.75}


def test_nouns_are_located_in_the_box_of_the_object_they_name():
    caption = "on the right is a box in plain blue and on the left is a ball with red stripes and a ball"
    assert demo_scenes.locate_nouns(caption, PAIR) == [(5, [10, 0, 9, 9]), (15, [0, 0, 9, 9])]
    assert demo_scenes.locate_nouns("on the left red grass", PAIR) == []
