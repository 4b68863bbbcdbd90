import copy
import json
import pathlib
import random

import numpy as np
import pytest

from captioning.attention.boxes import Grounding, _coco_groundings, _demo_groundings
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.demo.scenes import Scene, SceneObject, _write_captions
from captioning.evaluation.attention_accuracy import attention_accuracy
from support.errors import UserError

SIZE = (320, 240)  # cells of 40 x 30 pixels


def one_cell(row, column):
    """A map whose light peaks in the middle of one of the 8 x 8 cells."""
    weights = np.zeros(64, np.float32)
    weights[8 * row + column] = 1
    return weights


def predict(image_id, text, maps=None):
    words = text.split()
    maps = np.tile(one_cell(3, 3), (len(words), 1)) if maps is None else np.stack(maps)
    return GeneratedCaption(pathlib.Path("a.jpg"), "a.jpg", words, np.zeros(len(words)), maps, image_id)


def accuracy(*groundings):
    """inside and chance of the attention weights of (weights, size, boxes), and the number of words."""
    return shares([Grounding(*grounding) for grounding in groundings])


def shares(groundings):
    scores = attention_accuracy(groundings)
    maps = scores["maps"]
    inside, chance = maps["attention weights"]["inside"], maps["uniform (chance)"]["inside"]
    return {"words": scores["words"], "inside": inside, "chance": chance}


# --- Accuracy


def test_a_peak_counts_in_any_of_the_boxes_and_in_no_other_place():
    cell = [6 * 40, 2 * 30, 40, 30]  # row 2, column 6
    for row, column, inside in ((2, 6, 1), (2, 5, 0), (3, 6, 0), (6, 2, 0)):
        assert accuracy((one_cell(row, column), SIZE, [cell]))["inside"] == inside
    far = [0, 0, 10, 10]
    assert accuracy((one_cell(2, 6), SIZE, [far, cell]))["inside"] == 1
    assert accuracy((one_cell(2, 6), SIZE, [far]))["inside"] == 0


def test_width_and_height_are_not_mixed_up():
    weights = one_cell(1, 6)
    assert accuracy((weights, (800, 80), [[600, 10, 100, 10]]))["inside"] == 1
    assert accuracy((weights, (80, 800), [[60, 100, 10, 100]]))["inside"] == 1
    assert accuracy((weights, (80, 800), [[10, 600, 10, 100]]))["inside"] == 0


@pytest.mark.parametrize(
    "boxes, pixels",
    [
        ([[0, 0, 320, 240]], 320 * 240),
        ([[10, 20, 30, 40]], 30 * 40),
        ([[10, 20, 30, 40], [200, 100, 5, 5]], 30 * 40 + 5 * 5),
        ([[10, 20, 30, 40], [20, 30, 30, 40]], 2 * 30 * 40 - 20 * 30),  # what both cover counts once
        ([[10, 20, 30, 40], [15, 25, 5, 5]], 30 * 40),
        ([[-10, -5, 30, 25]], 20 * 20),  # clipped at each border
        ([[300, 230, 100, 100]], 20 * 10),
        ([[400, 0, 10, 10]], 0),
        ([[0.4, 0.6, 2.2, 1.0]], 3 * 1),  # the pixels whose middle is inside
    ],
)
def test_chance_is_the_share_of_the_image_in_the_union_of_the_boxes(boxes, pixels):
    assert accuracy((one_cell(4, 4), SIZE, boxes))["chance"] == pytest.approx(pixels / (320 * 240), rel=1e-12)


def test_shares_are_means_over_words():
    left, right = [0, 0, 160, 240], [160, 0, 160, 240]
    hit, miss = (one_cell(4, 1), SIZE, [left]), (one_cell(4, 1), SIZE, [right])
    scores = accuracy(hit, miss, hit, (one_cell(4, 1), SIZE, [left, right]))
    assert scores == {"words": 4, "inside": 0.75, "chance": 0.625}


def test_a_level_map_is_worth_chance():
    scores = accuracy((np.full(64, 1 / 64, np.float32), SIZE, [[0, 0, 32, 240]]))
    assert scores["inside"] == pytest.approx(0.1) == scores["chance"]


def test_without_words_there_is_no_share():
    assert accuracy() == {"words": 0, "inside": None, "chance": None}


def test_the_peak_of_an_outermost_cell_is_in_its_middle():
    for row, column in ((0, 0), (0, 7), (7, 0), (7, 7), (3, 0), (0, 3)):
        middle = [40 * column + 15, 30 * row + 10, 10, 10]
        assert accuracy((one_cell(row, column), SIZE, [middle]))["inside"] == 1


def test_a_peak_at_several_places_counts_by_the_share_inside():
    weights = one_cell(2, 1) + one_cell(2, 6)
    assert accuracy((weights, SIZE, [[40, 60, 40, 30]]))["inside"] == 0.5


def test_mass_inside_is_the_share_of_the_map_in_the_boxes():
    weights = 0.75 * one_cell(2, 6) + 0.25 * one_cell(5, 1)
    half_a_cell = [6 * 40, 2 * 30, 20, 30]
    scores = attention_accuracy([Grounding(weights, SIZE, [half_a_cell])])["maps"]
    assert scores["attention weights"]["mass_inside"] == pytest.approx(0.75 / 2)
    assert scores["uniform (chance)"]["mass_inside"] == pytest.approx(20 * 30 / (320 * 240))
    assert scores["centre"]["mass_inside"] == 0


def test_things_off_the_middle_are_counted_apart():
    middle, corner = [150, 110, 20, 20], [0, 0, 40, 30]
    groundings = [Grounding(one_cell(0, 0), SIZE, [box], number) for number, box in enumerate((middle, corner))]
    scores = attention_accuracy(groundings)
    assert (scores["words"], scores["words_off_centre"]) == (2, 1)
    assert scores["maps"]["attention weights"]["inside"] == 0.5
    assert scores["maps"]["attention weights"]["inside_off_centre"] == 1
    assert scores["maps"]["centre"]["inside"] > 0 == scores["maps"]["centre"]["inside_off_centre"]


def test_guesses_that_know_nothing_of_the_word_stand_beside_the_maps():
    """The evidence is right, the weights are another image's, the feature is long where nothing is."""
    cells = [(1, 1), (6, 6)]
    groundings = [
        Grounding(
            one_cell(*cells[1 - number]),
            SIZE,
            [[40 * column, 30 * row, 40, 30]],
            image_id=number,
            evidence=one_cell(row, column),
            feature_norms=one_cell(7, 0),
        )
        for number, (row, column) in enumerate(cells)
    ]
    inside = {name: values["inside"] for name, values in attention_accuracy(groundings)["maps"].items()}
    assert inside.pop("uniform (chance)") == pytest.approx(1 / 64)
    assert inside == {
        "evidence": 1,
        "attention weights": 0,
        "weights of another image": 1,
        "feature norm": 0,
        "centre": 0,
    }


# --- Demo


def test_each_noun_of_a_demo_caption_is_held_against_its_own_box():
    ball = SceneObject("ball", "red", "striped", "left", [20, 80, 100, 100])
    box = SceneObject("box", "blue", "plain", "right", [200, 80, 100, 100])
    scene = Scene(5, "5.jpg", *SIZE, "grass", [ball, box])
    generated = predict(5, _write_captions(scene)[0].lower().rstrip("."))
    words, maps = generated.words, generated.attention_weights
    maps[words.index("ball")], maps[words.index("box")] = one_cell(4, 1), one_cell(4, 6)

    groundings = _demo_groundings([generated], {5: scene})
    assert [(grounding.size, grounding.boxes) for grounding in groundings] == [(SIZE, [ball.box]), (SIZE, [box.box])]
    assert shares(groundings) == {"words": 2, "inside": 1.0, "chance": 100 * 100 / (320 * 240)}

    maps[:] = maps[:, ::-1]
    assert shares(_demo_groundings([generated], {5: scene}))["inside"] == 0
    assert _demo_groundings([predict(5, "on the grass")], {5: scene}) == []


def test_a_demo_image_without_scene_is_one_line():
    with pytest.raises(UserError, match="no scene is known for image 9: run python data_utils.py --dataset demo"):
        _demo_groundings([predict(9, "a ball")], {})


# --- MS-COCO

NAMES = (
    "person,bicycle,bus,bench,dog,hot dog,bear,teddy bear,knife,mouse,sheep,tv,cell phone,wine glass,toy,toy box".split(
        ","
    )
)
INSTANCES = {
    "categories": [{"id": 10 + n, "name": name} for n, name in enumerate(NAMES)],
    "images": [{"id": n, "width": 320, "height": 240} for n in (1, 2)],
    "annotations": [{"image_id": 1, "category_id": 10 + n, "bbox": [n, 0, 40.5, 30]} for n, name in enumerate(NAMES)],
}


@pytest.fixture
def instances(tmp_path):
    path = tmp_path / "instances_val2014.json"
    path.write_text(json.dumps(INSTANCES))
    return path


@pytest.mark.parametrize(
    "text, names",
    [
        ("a dog on a bench", ["dog", "bench"]),
        ("two dogs on benches near buses", ["dog", "bench", "bus"]),
        ("a man and women with children", ["person", "person", "person"]),
        ("people and a person", ["person", "person"]),
        ("babies and ladies and boys", ["person", "person", "person"]),
        ("a hot dog and hot dogs", ["hot dog", "hot dog"]),
        ("a hot day for a dog", ["dog"]),
        ("a teddy bear beside bears", ["teddy bear", "bear"]),
        ("teddy", []),
        ("a toy box of toys", ["toy box", "toy"]),
        ("knives mice sheep toys", ["knife", "mouse", "sheep", "toy"]),
        ("bikes televisions phones", ["bicycle", "tv", "cell phone"]),
        ("wine glasses and glasses", ["wine glass"]),
        ("a cell phone", ["cell phone"]),
        ("busy mandogs <unk>", []),
        ("a sofa", []),  # no couch among this file's categories
        ("", []),
    ],
)
def test_words_name_categories(instances, text, names):
    groundings, absent = _coco_groundings([predict(1, text, [one_cell(0, 0)] * len(text.split()) or [[]])], instances)
    assert [grounding.boxes for grounding in groundings] == [[[NAMES.index(name), 0, 40.5, 30]] for name in names]
    assert {grounding.size for grounding in groundings} <= {SIZE}
    assert absent == 0


def test_each_word_comes_with_its_own_map_and_two_words_with_their_mean(instances):
    maps = [one_cell(0, n) for n in range(4)]
    groundings, _ = _coco_groundings([predict(1, "dog beside teddy bears", maps)], instances)
    assert [np.flatnonzero(grounding.attention_weights).tolist() for grounding in groundings] == [[0], [2, 3]]
    assert groundings[1].attention_weights.sum() == 1


def test_categories_without_a_box_in_the_image_are_counted_as_absent(instances):
    captions = [predict(2, "a dog on a sofa"), predict(1, "a dog"), predict(77, "two dogs and a bear")]
    groundings, absent = _coco_groundings(captions, instances)
    assert (len(groundings), absent) == (1, 3)


def test_an_image_of_unknown_size_has_no_boxes(instances):
    data = copy.deepcopy(INSTANCES)
    del data["images"][0]["width"]
    instances.write_text(json.dumps(data))
    assert _coco_groundings([predict(1, "a dog"), predict(2, "grass")], instances) == ([], 1)


def test_all_boxes_of_a_category_in_the_image_count(instances):
    data = copy.deepcopy(INSTANCES)
    data["annotations"] = [
        {"image_id": image, "category_id": 14, "bbox": box}
        for image, box in ((1, [0, 0, 40, 30]), (1, [40, 0, 40, 30]), (2, [0, 0, 320, 240]))
    ]
    instances.write_text(json.dumps(data))
    groundings, _ = _coco_groundings([predict(1, "dogs", [one_cell(3, 3)])], instances)
    assert shares(groundings) == {"words": 1, "inside": 0.0, "chance": 2 / 64}


def test_crowds_are_left_out(instances):
    """COCO's own evaluation ignores them: their boxes hold much else."""
    data = copy.deepcopy(INSTANCES)
    crowd = {"image_id": 1, "category_id": 14, "bbox": [0, 0, 640, 480], "iscrowd": 1}
    data["annotations"] = [crowd, {"image_id": 1, "category_id": 14, "bbox": [0, 0, 40, 30], "iscrowd": 0}]
    instances.write_text(json.dumps(data))
    (grounding,), _ = _coco_groundings([predict(1, "dogs", [one_cell(3, 3)])], instances)
    assert grounding.boxes == [[0, 0, 40, 30]]
    data["annotations"] = [crowd]
    instances.write_text(json.dumps(data))
    assert _coco_groundings([predict(1, "dogs", [one_cell(3, 3)])], instances)[0] == []


@pytest.mark.parametrize("text", ["no json", "[]", '{"images": [], "categories": []}'])
def test_a_wrong_instances_file_is_one_line(instances, text):
    instances.write_text(text)
    with pytest.raises(UserError, match="instances_val2014.json .*COCO's own file"):
        _coco_groundings([predict(1, "a dog")], instances)


def test_instances_of_other_images_are_one_line(instances):
    with pytest.raises(UserError, match="lists none of the captioned images"):
        _coco_groundings([predict(77, "a dog")], instances)
    with pytest.raises(UserError, match="is missing"):
        _coco_groundings([predict(1, "a dog")], instances.with_name("nowhere.json"))


@pytest.mark.parametrize(
    "key, record, problem",
    [
        ("categories", {"id": 99}, "a category without id or name"),
        ("categories", {"id": 99, "name": " "}, "a category without id or name"),
        ("images", {"id": 3, "width": 320}, "an image without id, width or height"),
        ("images", {"id": 3, "width": 10**9, "height": 10}, "an image of an impossible size"),
        ("annotations", {"image_id": 1, "category_id": 14, "bbox": [0, 0, 5]}, "or a box"),
        ("annotations", {"image_id": 1, "category_id": 14, "bbox": [0, 0, float("nan"), 5]}, "or a box"),
        ("annotations", {"image_id": 1, "category_id": 14, "bbox": [0, 0, 10**400, 5]}, "or a box"),
        ("annotations", {"image_id": 1, "category_id": 14, "bbox": [0, 0, 0, 5]}, "or a box"),
        ("annotations", {"image_id": 1, "category_id": 99, "bbox": [0, 0, 5, 5]}, "category that is not listed"),
    ],
)
def test_a_record_that_cannot_be_used_is_left_out_and_named(instances, capsys, key, record, problem):
    data = copy.deepcopy(INSTANCES)
    data[key].append(record)
    instances.write_text(json.dumps(data))
    groundings, absent = _coco_groundings([predict(1, "a dog")], instances)
    assert ([grounding.boxes for grounding in groundings], absent) == ([[[4, 0, 40.5, 30]]], 0)
    printed = capsys.readouterr().out
    assert printed.count(": 1 left out: ") == 1 and problem in printed


def test_wrong_types_anywhere_are_left_out_or_one_line(instances):
    """One value somewhere in the file becomes another: what comes back can be scored, or a UserError comes."""
    rng = random.Random(0)
    captions = [predict(1, "a dog with people and a teddy bear")]
    for _ in range(300):
        data = copy.deepcopy(INSTANCES)
        place = data[rng.choice(list(data))]
        key = rng.randrange(len(place))
        if rng.random() < 0.7:
            place, key = place[key], rng.choice(list(place[key]))
        place[key] = rng.choice((None, True, -1, 0, 1e300, float("nan"), "", "\ud800", [], [[]] * 4, {}, [1, 2, 3, 4]))
        instances.write_text(json.dumps(data))
        try:
            scores = attention_accuracy(_coco_groundings(captions, instances)[0])
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert scores["words"] <= 3
