"""Captions scored by the field's metrics, every one computed by pycocoevalcap, COCO's evaluation code."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import threading

from command_line import UserError, silenced_stderr
from data_utils import standardize
from files import write_json

import tensorflow as tf
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def score_captions(captions, references, patience=120):
    """Score captions as COCO's official evaluation does.

    METEOR and the PTB tokeniser need Java. Where it is missing, fails or hangs, one line on standard output says so:
    METEOR is then None, and without PTB's tokens the others are on the project's own.

    Args:
      captions: dict of image id to str.
      references: dict of the same image ids to list of str, one or more.
      patience: seconds to wait for Java to start; METEOR gets 1/20 s more for each image.

    Returns:
      dict of each of METRICS to float or None, and of "tokens" to "PTB" or "project". BLEU, METEOR and ROUGE-L are
      from 0 to 100, CIDEr from 0 to 10. CIDEr weighs n-grams by how few of these images have them: 0 for one image.

    Raises:
      UserError: there are no captions, an image lacks its caption or its references, or no reference has a word.
    """
    captions, references = pair_by_image(captions, references)
    with java_settings():
        try:
            captions, references = ptb_tokens(captions, patience), ptb_tokens(references, patience)
        except RuntimeError as error:
            print(f"{error}: METEOR is left out, the other metrics are on the project's own tokens instead of PTB's")
            captions, references = project_tokens(captions), project_tokens(references)
            scores = {"METEOR": None, "tokens": "project"}
        else:
            scores = {"METEOR": score_meteor(captions, references, patience), "tokens": "PTB"}
    rouge, _ = Rouge().compute_score(references, captions)
    scores |= {"ROUGE-L": 100 * float(rouge), **score_ngrams(captions, references)}
    return {name: scores[name] for name in (*METRICS, "tokens")}


def quick_score(captions, references):
    """BLEU-1..4 and CIDEr on the project's own tokens, in seconds and without Java, to compare epochs by.

    Takes and raises what `score_captions` does; the same keys, without METEOR and ROUGE-L.
    """
    captions, references = map(project_tokens, pair_by_image(captions, references))
    return {**score_ngrams(captions, references), "tokens": "project"}


def pair_by_image(captions, references):
    """Captions {image id: [str]} and references {image id: [str, ...]} of the same images, by ascending id."""
    if not captions:
        raise UserError("there are no captions to score: run python data_utils.py again to prepare validation images")
    image_ids = sorted(captions.keys() | references.keys())
    for image_id in image_ids:
        if image_id not in captions or not references.get(image_id):
            missing = "references" if image_id in captions else "caption"
            raise UserError(f"image {image_id} has no {missing}, and cannot be scored: run python data_utils.py again")
    return {i: [captions[i]] for i in image_ids}, {i: references[i] for i in image_ids}


def score_ngrams(captions, references):
    """BLEU-1..4 and CIDEr of captions {image id: [tokens]} against references {image id: [tokens, ...]}."""
    if not any(any(group) for group in references.values()):
        raise UserError("no reference has a word to score captions by: run python data_utils.py again")
    bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
    cider, _ = Cider().compute_score(references, captions)
    return {**{f"BLEU-{n}": 100 * float(score) for n, score in enumerate(bleu, 1)}, "CIDEr": float(cider)}


# --- Tokens and Java --------------------------------------------------------------------------------------------


def project_tokens(captions):
    """The captions in the words that the vocabulary is made of. {image id: [str, ...]} -> the same."""
    words = standardize(tf.constant([caption for group in captions.values() for caption in group]))
    words = iter(words.numpy().tolist())
    return {image_id: [next(words).decode() for _ in group] for image_id, group in captions.items()}


@contextlib.contextmanager
def java_settings():
    """Java in English, whatever the user's language: METEOR fails on the decimal commas that it writes in others."""
    kept = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{kept or ''} -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
    try:
        yield
    finally:
        del os.environ["JAVA_TOOL_OPTIONS"]
        if kept is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = kept


def ptb_tokens(captions, patience):
    """The captions in the Penn Treebank's tokens, without punctuation. {image id: [str, ...]} -> the same.

    Raises:
      RuntimeError: Java is missing, fails or hangs, or the package's folder, where it writes, is read-only.
    """
    if not shutil.which("java"):
        raise RuntimeError("Java is not installed")
    # A line break that the tokeniser knows would shift all captions after it to other images.
    lines = {i: [{"caption": " ".join(caption.splitlines())} for caption in group] for i, group in captions.items()}
    try:
        # The tokeniser waits for ever for a Java that hangs, so that is found out first.
        subprocess.run(["java", "-version"], capture_output=True, check=True, timeout=patience)
        with silenced_stderr():
            tokens = PTBTokenizer().tokenize(lines)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"Java's PTB tokeniser cannot be run ({error})") from error
    if any(len(tokens.get(image_id, [])) != len(group) for image_id, group in captions.items()):
        raise RuntimeError("Java's PTB tokeniser broke off")
    return tokens


def score_meteor(captions, references, patience):
    """METEOR from 0 to 100; None, and a line that says so, where its Java program fails or hangs."""
    scorer = Meteor()
    java = scorer.meteor_p
    watchdog = threading.Timer(patience + len(captions) / 20, java.kill)
    watchdog.start()
    try:
        score, _ = scorer.compute_score(references, captions)
        return 100 * score
    except (OSError, ValueError):
        print("METEOR is left out: its Java program, which takes up to 2 GB of memory, failed or hung")
        return None
    finally:
        watchdog.cancel()
        java.kill()
        with contextlib.suppress(OSError), java:  # closes its pipes and waits for its end
            pass
        if scorer.lock.locked():  # after a failure; its destructor would wait for it for ever
            scorer.lock.release()


# --- Results ----------------------------------------------------------------------------------------------------


def write_metrics(folder, split, captions, metrics):
    """Write metrics.json, and each run's captions in COCO's results format, which its official evaluation reads.

    Args:
      folder: path of the folder, made where it is missing.
      split: str, what the captions files are named after: captions_<split>_<run>_results.json, blanks left out.
      captions: dict of run name to dict of image id to str.
      metrics: dict of run name to what `score_captions` returned.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    for run, by_image in captions.items():
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in by_image.items()]
        write_json(pathlib.Path(folder, f"captions_{split}_{run.replace(' ', '')}_results.json"), results)
    write_json(pathlib.Path(folder, "metrics.json"), metrics, indent=1)


def format_table(rows):
    """Runs side by side as a Markdown table. dict of run name to metrics -> str; "-" where there is no number."""
    names = (*METRICS, "tokens")
    table = [["run", *names], *([run, *(format_score(name, rows[run].get(name)) for name in names)] for run in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_score(name, value):
    """A metric as papers print it: CIDEr with three decimals, the others with one."""
    if value is None:
        return "-"
    return value if name == "tokens" else f"{value:.3f}" if name == "CIDEr" else f"{value:.1f}"
