import pytest

from captioning.demo.scenes import Scene, SceneObject, _compose_scene, _write_captions
from captioning.demo.scores import locate_nouns, score_captions


def scene_of(*objects):
    things = [SceneObject(*words.split(), box=[10 * n, 0, 9, 9]) for n, words in enumerate(objects)]
    return Scene(1, "1.jpg", 320, 240, "grass", things)


BALL = scene_of("ball red striped left")
PAIR = scene_of("ball red striped left", "box blue plain right")


def test_the_scenes_own_captions_are_right_in_everything():
    scenes = [_compose_scene(number, seed=7) for number in range(1, 200) for _ in range(5)]
    captions = [caption for scene in scenes[::5] for caption in _write_captions(scene)]
    scores = score_captions(captions, scenes)
    assert scores == dict.fromkeys(scores, 1.0)
    assert set(scores) == {*("objects", "mentioned", "noun", "colour", "pattern", "place", "relation", "ground")}


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
    scores = score_captions([caption], [scene])
    assert {kind: scores[kind] for kind in expected} == expected


def test_shares_are_over_all_captions_and_what_none_names_is_left_out():
    scores = score_captions(["a ball", "a box in plain blue and a box", ""], [BALL, PAIR, BALL])
    assert scores == {"objects": 0.5, "noun": 2 / 3, "colour": 1.0, "pattern": 1.0, "mentioned": 0.75}


def test_nouns_are_located_in_the_box_of_the_object_they_name():
    caption = "on the right is a box in plain blue and on the left is a ball with red stripes and a ball"
    assert locate_nouns(caption, PAIR) == [(5, [10, 0, 9, 9]), (15, [0, 0, 9, 9])]
    assert locate_nouns("on the left red grass", PAIR) == []
