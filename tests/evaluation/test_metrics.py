import json
import math
import os
import shutil
import subprocess
import tempfile
import threading

import numpy as np
import pycocoevalcap.eval
import pytest
from pycocotools.coco import COCO

from captioning.evaluation import metrics
from captioning.evaluation.metrics import (
    METRICS,
    cider_by_image,
    format_score,
    format_table,
    note_few_images,
    score_best,
    score_captions,
    write_metrics,
)
from support.errors import UserError

REFERENCES = {
    9: ["A dog runs on the beach.", "The brown dog is running, by the sea", "a dog; a beach\nand the sea"],
    2: ["Two cats sleep on a red sofa", "There's a sofa with 2 cats on it!"],
    5: ["Ein Café mit Übergröße am Meer", "Кот сидит на столе", "a café 😀 by the sea\u2028at night"],
    3: ["A boat on the sea"],
}
CAPTIONS = {2: "two cats on a red sofa", 3: "", 9: "a dog on the beach", 5: "a café by the sea"}

LOWER_CASE = 'tr A-Z a-z < "$last"'  # a simple tokeniser, as a shell command


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """A function that puts a shell script in Java's place.

    Its arguments are the script's commands: as METEOR, as the PTB tokeniser, and when asked for its version. It returns
    the path of a file with the process ids of all METEORs.
    """
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write(meteor, tokenise=LOWER_CASE, version="exit 0"):
        script = tmp_path / "bin" / "java"
        script.write_text(
            "#!/bin/sh\nfor last; do :; done\n"
            f'case "$*" in\n-version) {version};;\n*PTBTokenizer*) {tokenise}; exit;;\nesac\n'
            f"echo $$ >> {tmp_path / 'pids'}\n{meteor}\n"
        )
        script.chmod(0o755)
        return tmp_path / "pids"

    return write


def used_project_tokens(scores, printed):
    return (
        scores["METEOR"] is None
        and scores["tokens"] == "project"
        and all(math.isfinite(scores[name]) for name in METRICS if name != "METEOR")
        and len(printed.splitlines()) == 1
        and "METEOR is left out" in printed
        and "project's own tokens" in printed
    )


def has_ended(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


# --- Values


def test_captions_that_repeat_a_reference_score_full(no_java):
    references = {1: ["A dog runs on the beach."], 2: ["Two cats sleep on a sofa!"], 3: ["A plane is up in the sky"]}
    captions = {1: "a dog runs on the beach", 2: "two cats sleep on a sofa", 3: "a plane is up in the sky"}
    scores = score_captions(captions, references)
    assert list(scores) == [*METRICS, "tokens"]
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert scores[name] == pytest.approx(100, abs=1e-4)
    assert scores["CIDEr"] == pytest.approx(10)
    assert json.loads(json.dumps(scores)) == scores


def test_values_computed_by_hand(no_java):
    references = {1: ["a dog runs on the beach", "a cat"], 2: ["the red boat"]}
    captions = {1: "a dog a dog the", 2: "the red boat"}
    scores = score_captions(captions, references)
    # Unigrams: a (once, as in a reference), dog, the; the, red, boat. That is 6 of 8.
    # Bigrams: a dog; the red, red boat. That is 3 of 6.
    # The references closest in length have 6 + 3 words, the captions 8.
    brevity = math.exp(1 - 9 / 8)
    assert scores["BLEU-1"] == pytest.approx(100 * 6 / 8 * brevity)
    assert scores["BLEU-2"] == pytest.approx(100 * math.sqrt(6 / 8 * 3 / 6) * brevity)
    # The longest common subsequence of the first image is "a dog the": 3 of the caption's 5 words, 3 of the reference's
    # 6. Beta is 1.2. The reference "a cat" gives less precision (1 of 5) and the same recall (1 of 2).
    precision, recall = 3 / 5, 3 / 6
    rouge = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert scores["ROUGE-L"] == pytest.approx(100 * (rouge + 1) / 2)


def test_cider_prefers_what_the_references_of_that_image_alone_say(no_java):
    common = {image_id: ["a photo of a street"] for image_id in range(10, 16)}
    references = {1: ["a photo of a zebra in the grass", "a zebra eats grass in a photo"], **common}
    said = {image_id: "a photo of a street" for image_id in common}

    def cider(caption):
        return mean_cider({1: caption, **said}, references)

    assert cider("a photo of a zebra in the grass") > cider("a zebra in the grass") > cider("a zebra") > cider("dogs")
    assert cider("a photo of a dog") == cider("")  # "a photo of a" is in every image's references


def mean_cider(captions, references):
    return float(np.mean(list(cider_by_image(captions, references).values())))


def test_the_mean_of_the_images_ciders_is_the_full_score_on_the_projects_tokens(no_java, capsys):
    quick = mean_cider(CAPTIONS, REFERENCES)
    assert capsys.readouterr().out == ""
    assert quick == score_captions(CAPTIONS, REFERENCES)["CIDEr"]
    loud = {image_id: f"  {caption.upper()} ." for image_id, caption in CAPTIONS.items()}
    assert mean_cider(loud, REFERENCES) == quick


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
@pytest.mark.parametrize("said", ["", "..."])
def test_captions_without_words_stop_no_metric(said, capfd):
    scores = score_captions({**CAPTIONS, 2: said, 3: said}, REFERENCES)
    assert scores["tokens"] == "PTB" and 0 < scores["METEOR"] < score_captions(CAPTIONS, REFERENCES)["METEOR"]
    nothing = score_captions(dict.fromkeys(CAPTIONS, said), REFERENCES)
    assert all(nothing[name] == 0 for name in METRICS)
    assert capfd.readouterr().out == ""


def test_few_images_are_said_to_make_cider_what_it_is_not():
    assert "0 whatever the caption" in note_few_images(1) and mean_cider({1: "a dog"}, {1: ["a dog"]}) == 0
    assert "CIDEr of 99 images is too high" in note_few_images(99)
    assert note_few_images(100) == ""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="the official evaluation needs Java")
def test_scores_are_those_of_the_official_evaluation_of_the_files_written(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")  # in German METEOR would write 0,5
    scores = score_captions(CAPTIONS, REFERENCES)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Duser.language=de -Duser.country=DE"
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    write_metrics(tmp_path, "val2014", {"beam 3": CAPTIONS}, {"beam 3": scores})
    assert json.loads((tmp_path / "metrics_val2014.json").read_text()) == {"beam 3": scores}

    annotations = [
        {"id": 100 * image_id + number, "image_id": image_id, "caption": caption.replace("\u2028", " ")}
        for image_id, group in REFERENCES.items()
        for number, caption in enumerate(group)
    ]
    (tmp_path / "captions.json").write_text(
        json.dumps({"info": {}, "images": [{"id": i} for i in REFERENCES], "annotations": annotations})
    )
    coco = COCO(tmp_path / "captions.json")
    results = coco.loadRes(str(tmp_path / "captions_val2014_beam3_results.json"))

    class NoSpice:  # the real one would download its models
        method = staticmethod(lambda: "SPICE")
        compute_score = staticmethod(lambda references, captions: (0.0, []))

    monkeypatch.setattr(pycocoevalcap.eval, "Spice", NoSpice)
    official = pycocoevalcap.eval.COCOEvalCap(coco, results)
    official.evaluate()

    assert scores["tokens"] == "PTB"
    assert scores["METEOR"] > 10
    theirs = {name: 100 * official.eval[name.replace("BLEU-", "Bleu_").replace("-", "_")] for name in METRICS[:-1]}
    theirs["CIDEr"] = official.eval["CIDEr"]
    assert {name: scores[name] for name in METRICS} == pytest.approx(theirs, rel=1e-12)


# --- Java missing, failing, hanging


def test_without_java_one_line_says_so(no_java, capsys):
    scores = score_captions(CAPTIONS, REFERENCES)
    assert used_project_tokens(scores, printed := capsys.readouterr().out)
    assert "Java is not installed" in printed


@pytest.mark.parametrize(
    ("tokenise", "version", "patience"),
    [
        ("exit 1", "exit 0", 60),
        ('head -n 1 "$last"', "exit 0", 60),
        (LOWER_CASE, "echo No Java runtime present; exit 1", 60),
        (LOWER_CASE, "exec sleep 1000", 0.2),
    ],
    ids=["fails", "breaks off", "is no Java", "hangs"],
)
def test_a_tokeniser_that(tokenise, version, patience, fake_java, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "_JAVA_SECONDS", patience)
    fake_java("exit 1", tokenise, version)
    assert used_project_tokens(score_captions(CAPTIONS, REFERENCES), capsys.readouterr().out)


def test_a_read_only_package_folder(fake_java, monkeypatch, capsys):
    def read_only(**options):
        raise PermissionError(13, "Permission denied", options["dir"])

    fake_java("exit 1")
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    assert used_project_tokens(score_captions(CAPTIONS, REFERENCES), printed := capsys.readouterr().out)
    assert "Permission denied" in printed


@pytest.mark.parametrize(
    ("meteor", "patience"),
    [("exit 1", 60), ("while read -r line; do echo oops; done", 60), ("exec sleep 1000", 5)],
    ids=["fails", "talks nonsense", "hangs"],
)
def test_a_meteor_that(meteor, patience, fake_java, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "_JAVA_SECONDS", patience)
    pids = fake_java(meteor)
    scores = score_captions(CAPTIONS, REFERENCES)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "METEOR is left out" in printed
    assert scores["METEOR"] is None
    assert scores["tokens"] == "PTB"
    assert math.isfinite(scores["CIDEr"])
    assert all(map(has_ended, pids.read_text().split()))


def test_evaluations_after_one_another_end_their_java(fake_java, capfd):
    answer = "while read -r line; do echo 0.25; case $line in EVAL*) echo 0.25;; esac; done"
    pids = fake_java(answer)
    scores = [score_captions({7: "a dog"}, {7: ["a dog"]}) for _ in range(3)]
    assert [score["METEOR"] for score in scores] == [25, 25, 25]
    assert len(pids.read_text().split()) == 3
    assert all(map(has_ended, pids.read_text().split()))
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


@pytest.mark.parametrize("caption", ["一只狗在草地上奔跑", "سگی روی چمن می\u200cدود", "кот спит на столе now"])
def test_references_outside_latin_script_are_scored_without_javas_english(fake_java, capsys, caption):
    fake_java("echo 0.25")
    scores = score_captions({1: caption, 2: "a dog"}, {1: [f"{caption}。", caption], 2: ["a dog"]})
    assert used_project_tokens(scores, printed := capsys.readouterr().out)
    assert "Most letters of the references are outside Latin script" in printed
    assert scores["BLEU-4"] == pytest.approx(100, abs=0.1)
    assert "project |" in format_table({"greedy": scores}) and " - |" in format_table({"greedy": scores})


def test_characters_are_the_tokens_of_chinese(no_java):
    score = score_captions({1: "一只狗", 2: "a cat"}, {1: ["一只猫"], 2: ["a cat"]})
    assert score["BLEU-1"] == pytest.approx(100 * 4 / 5)


# --- Unusual captions


def test_one_image_and_empty_captions(no_java):
    alone = score_captions({391895: "a dog runs by the sea"}, {391895: ["a dog runs by the sea"]})
    assert alone["BLEU-4"] == pytest.approx(100, abs=1e-4)
    assert alone["CIDEr"] == 0  # all n-grams are equally rare
    nothing = score_captions(dict.fromkeys(REFERENCES, ""), REFERENCES)
    assert all(nothing[name] == pytest.approx(0, abs=1e-4) for name in METRICS if name != "METEOR")


@pytest.mark.parametrize("score", [score_captions, cider_by_image])
@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({1: "a dog", 2: "a cat"}, {1: ["a dog"]}, "image 2 has no references"),
        ({1: "a dog"}, {1: []}, "image 1 has no references"),
        ({1: "a dog"}, {1: ["a dog"], 2: ["a cat"]}, "image 2 has no caption"),
        ({1: "a dog"}, {1: ["...", ""]}, "no reference has a word"),
    ],
)
def test_what_cannot_be_scored_is_the_users_error(score, captions, references, message, no_java):
    with pytest.raises(UserError, match=message):
        score(captions, references)


# --- Files and table


def test_results_files_are_read_by_cocos_own_reader(tmp_path):
    runs = {"greedy": CAPTIONS, "beam 3": dict.fromkeys(CAPTIONS, "a dog")}
    write_metrics(tmp_path / "new", "train2014", runs, {"greedy": {"CIDEr": 1.0}, "beam 3": {"CIDEr": 0.5}})
    (tmp_path / "captions.json").write_text(
        json.dumps({"info": {}, "images": [{"id": i} for i in CAPTIONS], "annotations": []})
    )
    for run, said in runs.items():
        path = tmp_path / "new" / f"captions_train2014_{run.replace(' ', '')}_results.json"
        results = COCO(tmp_path / "captions.json").loadRes(str(path))
        assert {i: results.imgToAnns[i][0]["caption"] for i in results.getImgIds()} == said
    assert json.loads((tmp_path / "new" / "metrics_train2014.json").read_text())["beam 3"] == {"CIDEr": 0.5}


def test_a_file_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "metrics_train2014.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_metrics(tmp_path, "train2014", {"greedy": CAPTIONS}, {})


def test_the_table_aligns_rounds_and_marks_what_is_missing():
    full = dict(zip(METRICS, (71.849, 50.4, 34.5, 24.25001, 23.9, 100.0, 0.91149), strict=True)) | {"tokens": "PTB"}
    assert format_table({"greedy": full, "beam 3": {**full, "METEOR": None, "tokens": "project"}}).splitlines() == [
        "| run    | BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | METEOR | ROUGE-L | CIDEr |  tokens |",
        "| ------ | -----: | -----: | -----: | -----: | -----: | ------: | ----: | ------: |",
        "| greedy |   71.8 |   50.4 |   34.5 |   24.3 |   23.9 |   100.0 | 0.911 |     PTB |",
        "| beam 3 |   71.8 |   50.4 |   34.5 |   24.3 |      - |   100.0 | 0.911 | project |",
    ]
    quick = {"BLEU-4": 24.25001, "CIDEr": 0.5, "tokens": "project"}
    assert format_table({"epoch 1": quick}).count(" - |") == 5
    assert format_score("CIDEr", 1) == "1.000"


# --- Every reference counts -----------------------------------------------------------------------------------------

SEVERAL = {
    1: ["a dog runs on the beach", "the brown animal is near water", "somebody looks at a wave"],
    2: ["two cats sleep on a red sofa", "a pair of pets is lying down", "one striped blanket lies there"],
    3: ["a boat on the sea", "some people sail in the evening sun", "nobody swims out there today"],
}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_caption_that_repeats_any_of_its_references_scores_as_if_it_were_the_first(number, no_java):
    captions = {image_id: group[number] for image_id, group in SEVERAL.items()}
    full = score_captions(captions, SEVERAL)
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"):
        assert full[name] == pytest.approx(100, abs=1e-4)
    assert full["ROUGE-L"] == pytest.approx(100, abs=1e-4)
    assert (
        full["CIDEr"] == mean_cider(captions, SEVERAL) > 10 / 3 - 1e-6
    )  # 10 for the one, little for the others; their mean
    assert min(cider_by_image(captions, SEVERAL).values()) > 10 / 3 - 1e-6


def test_each_images_cider_is_its_own(no_java):
    captions = {3: "nothing of it", 2: SEVERAL[2][0], 1: SEVERAL[1][0]}
    by_image = cider_by_image(captions, SEVERAL)
    assert by_image[1] > 3 and by_image[2] > 3 and by_image[3] < 1


def test_meteor_is_given_every_reference(monkeypatch):
    given = []

    class Recorder:
        def __init__(self):
            self.meteor_p, self.lock = subprocess.Popen(["true"], stdin=subprocess.PIPE), threading.Lock()

        def compute_score(self, references, generated):
            given.append((references, generated))
            return 0.25, []

    monkeypatch.setattr(metrics, "Meteor", Recorder)
    monkeypatch.setattr(metrics, "_ptb_tokens", lambda captions: captions)
    captions = {image_id: "a dog" for image_id in SEVERAL}
    assert score_captions(captions, SEVERAL)["METEOR"] == 25
    assert given == [(SEVERAL, {image_id: ["a dog"] for image_id in SEVERAL})]


# --- The best of several ------------------------------------------------------------------------------------------

CANDIDATES = {
    2: ["two dogs", "two cats sleep on a red sofa", "a sofa"],
    3: ["a boat on the sea"],
    9: ["a dog", "a cat on a sofa", "the brown dog is running by the sea"],
    5: ["a café by the sea", "a café", "by the sea at night"],
}


def check_best(captions):
    """The best by each metric are no worse than any place's captions, and are those of an oracle done by hand."""
    best = score_best(captions, REFERENCES)
    places = [{i: group[n if n < len(group) else 0] for i, group in captions.items()} for n in range(3)]
    scores = [score_captions(texts, REFERENCES) for texts in places]
    for name in METRICS:
        if best[name] is not None:
            assert best[name] >= max(each[name] for each in scores) - 1e-9
    assert best["CIDEr"] == pytest.approx(
        sum(max(cider_by_image(texts, REFERENCES)[i] for texts in places) for i in REFERENCES) / 4, rel=0.05
    )
    return best, scores


def test_the_best_captions_score_at_least_as_the_first_ones(no_java, capsys):
    best, scores = check_best(CANDIDATES)
    assert (best["METEOR"], best["tokens"]) == (None, "project")
    assert best["CIDEr"] > max(each["CIDEr"] for each in scores) and best["BLEU-4"] > scores[0]["BLEU-4"]
    assert list(best) == [*METRICS, "tokens"]
    assert capsys.readouterr().out.count("METEOR is left out") == 4  # of four calls, once each


def test_each_metric_takes_its_own_best_caption(no_java):
    """The short caption has all its words right, and the long one says more of the reference."""
    captions = {1: ["a dog runs on the sand by the blue sea", "a dog"], 2: ["a cat"]}
    references = {1: ["a dog runs on a beach by the blue water"], 2: ["a cat"]}
    best = score_best(captions, references)
    alone = [score_captions({1: text, 2: "a cat"}, references) for text in captions[1]]
    for name in METRICS:
        if name != "METEOR":
            assert best[name] == pytest.approx(max(each[name] for each in alone), rel=1e-6)


def test_one_caption_is_the_best_of_one(no_java):
    assert score_best({i: [text] for i, text in CAPTIONS.items()}, REFERENCES) == score_captions(CAPTIONS, REFERENCES)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_the_best_by_meteor_are_found_with_java():
    best, scores = check_best(CANDIDATES)
    assert best["tokens"] == "PTB" and best["METEOR"] > scores[0]["METEOR"] > 0


def test_a_meteor_that_fails_leaves_the_other_best_scores(fake_java, capsys):
    fake_java("exit 1")
    best = score_best(CANDIDATES, REFERENCES)
    assert best["METEOR"] is None and best["tokens"] == "PTB" and best["CIDEr"] > 0
    assert capsys.readouterr().out.count("METEOR is left out") == 1


@pytest.mark.parametrize("captions", [{}, {2: ["a"]}])
def test_the_best_of_what_cannot_be_scored_is_the_users_error(captions, no_java):
    with pytest.raises(UserError, match="no captions to score|has no caption"):
        score_best(captions, REFERENCES)
