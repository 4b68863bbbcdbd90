"""Captions scored by the field's metrics, all computed by pycocoevalcap, COCO's evaluation code."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import threading
import unicodedata

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.data.captioned_images import id_order
from captioning.words import split_words
from support.errors import UserError
from support.files import write_json
from support.process import silenced_stderr

_FEW_IMAGES = 100  # of fewer, CIDEr is too high and left to chance; see `note_few_images`
_JAVA_SECONDS = 120  # to wait for Java to start; METEOR gets 1/20 s more for each image
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def score_captions(generated, references):
    """Score captions as COCO's official evaluation does.

    METEOR and the PTB tokeniser are for English, and need Java. If most letters of the references are outside Latin
    script, or Java is missing, fails or hangs, one line on standard output says so. METEOR is then None, and the others
    are computed on the project's own tokens, see captioning/words.py. Other languages in Latin script are scored as
    English is, as their letters do not tell them apart.

    Args:
      generated: dict of image id to caption, a str.
      references: dict of the same image ids to list of str, one or more.

    Returns:
      dict of each of METRICS to float or None, and of "tokens" to "PTB" or "project". BLEU, METEOR and ROUGE-L range
      from 0 to 100, CIDEr from 0 to 10. CIDEr weights an n-gram by how few of the images have it in their references,
      and is therefore 0 for a single image.

    Raises:
      UserError: there are no captions, an image has no caption or no references, or no reference has a word.
    """
    generated, references = _pair_by_image(generated, references)
    with _java_settings():
        generated, references, tokens = _tokenize(generated, references)
        scores = {"METEOR": _score_meteor(generated, references)[0] if tokens == "PTB" else None}
    rouge, _ = Rouge().compute_score(references, generated)
    scores |= {"tokens": tokens, "ROUGE-L": 100 * float(rouge), **_score_ngrams(generated, references)}
    return {name: scores[name] for name in (*METRICS, "tokens")}


def note_few_images(count):
    """What to know of the CIDEr of `count` images: a sentence, empty where they are enough.

    CIDEr takes from the scored images' own references how rare an n-gram is. The first caption of 3,000 photographs of
    Flickr8k has 0.80 against the other four. Of 100 drawn from them it has 0.85, give or take 0.07, of 50 0.89 and
    0.09, of 10 0.98 and 0.20, and 0 of a single one.
    """
    if count >= _FEW_IMAGES:
        return ""
    what = "0 whatever the caption" if count == 1 else "too high, and left to chance"
    images = "1 image" if count == 1 else f"{count} images"
    return f"CIDEr of {images} is {what}: compare it from {_FEW_IMAGES} images on"


def score_best(generated, references):
    """Score the best of each image's captions, which an oracle would choose that knows the references.

    Each metric takes the caption of each image that it scores highest by itself. It then scores these captions as
    `score_captions` does. So every metric is of other captions. BLEU counts over all images together, so it could in
    theory be lower than that of the first captions.

    Args:
      generated: dict of image id to list of captions, one or more.
      references: as for `score_captions`.

    Returns, Raises: as for `score_captions`.
    """
    _, references = _pair_by_image({i: group[0] for i, group in generated.items()}, references)
    most = max(map(len, generated.values()))
    # An image with fewer captions has its first one again, which changes nothing.
    candidates = {i: generated[i] + generated[i][:1] * (most - len(generated[i])) for i in references}
    with _java_settings():
        candidates, references, tokens = _tokenize(candidates, references)
        scores = _scores_by_place(candidates, references)
        pairs = {(i, n): [text] for i, group in candidates.items() for n, text in enumerate(group)}
        of_pairs = {pair: references[pair[0]] for pair in pairs}
        meteor = _score_meteor(pairs, of_pairs)[1] if tokens == "PTB" else None
        scores |= {} if meteor is None else {"METEOR": np.reshape(meteor, (len(references), most)).T}  # (N, B)
        best = dict.fromkeys(METRICS) | {"tokens": tokens}
        for name, values in scores.items():
            places = np.argmax(values, axis=0)  # (B,)
            taken = {i: [candidates[i][place]] for i, place in zip(references, places, strict=True)}
            if name == "METEOR":
                best[name] = _score_meteor(taken, references)[0]
            elif name == "ROUGE-L":
                best[name] = 100 * float(np.mean(np.max(values, axis=0)))
            else:
                best[name] = _score_ngrams(taken, references)[name]
    return best


def _scores_by_place(candidates, references):
    """The score of each caption by itself, but for METEOR's: dict of metric to float (N, B).

    candidates: dict of B image ids to list of N str. references: dict of the same ids to list of str. Blanks separate
    their tokens.
    """
    scores = collections.defaultdict(list)
    for texts in zip(*candidates.values(), strict=True):
        generated = {i: [text] for i, text in zip(candidates, texts, strict=True)}
        _, bleu = Bleu(4).compute_score(references, generated, verbose=0)
        for n, values in enumerate(bleu, 1):
            scores[f"BLEU-{n}"].append(values)  # (B,)
        for name, scorer in (("CIDEr", Cider()), ("ROUGE-L", Rouge())):
            scores[name].append(scorer.compute_score(references, generated)[1])  # (B,)
    return {name: np.array(values) for name, values in scores.items()}


def cider_by_image(generated, references):
    """CIDEr of each image, on the project's own tokens: in seconds, and without Java.

    Args, Raises: as for `score_captions`.

    Returns:
      dict of image id to float
    """
    generated, references = map(_project_tokens, _pair_by_image(generated, references))
    _, scores = Cider().compute_score(references, generated)
    return dict(zip(references, map(float, scores), strict=True))


def _pair_by_image(generated, references):
    """Captions and references in the same order, that of the image ids, each caption as a list of one.

    Args, Raises: as for `score_captions`.
    """
    if not generated:
        raise UserError("there are no captions to score: run python data_utils.py again to prepare validation images")
    image_ids = sorted(generated.keys() | references.keys(), key=id_order)
    for image_id in image_ids:
        if image_id not in generated or not references.get(image_id):
            missing = "references" if image_id in generated else "caption"
            raise UserError(f"image {image_id} has no {missing} and cannot be scored: run python data_utils.py again")
    if not any(split_words(text) for group in references.values() for text in group):
        raise UserError("captions cannot be scored, as no reference has a word: run python data_utils.py again")
    return {i: [generated[i]] for i in image_ids}, {i: references[i] for i in image_ids}


def _score_ngrams(generated, references):
    """BLEU-1..4 and CIDEr, dict of metric to float.

    generated, references: dict of image id to list of one str and of several, their tokens separated by blanks.
    """
    bleu, _ = Bleu(4).compute_score(references, generated, verbose=0)
    cider, _ = Cider().compute_score(references, generated)
    return {**{f"BLEU-{n}": 100 * float(score) for n, score in enumerate(bleu, 1)}, "CIDEr": float(cider)}


# --- Tokens and Java --------------------------------------------------------------------------------------------


def _check_script(references):
    """RuntimeError where most letters of the references are outside Latin script. dict of image id to list of str."""
    letters = collections.Counter("".join(text for group in references.values() for text in group))
    letters = {letter: count for letter, count in letters.items() if unicodedata.category(letter).startswith("L")}
    latin = sum(count for letter, count in letters.items() if "LATIN" in unicodedata.name(letter, ""))
    if 2 * latin < sum(letters.values()):
        raise RuntimeError("Most letters of the references are outside Latin script")


def _tokenize(generated, references):
    """Write captions in the tokens that they are scored by: PTB's, or the project's own, which is then said.

    Returns:
      (generated and references, with the tokens of each str separated by blanks; "PTB" or "project")
    """
    try:
        _check_script(references)
        return _ptb_tokens(generated), _ptb_tokens(references), "PTB"
    except RuntimeError as error:
        print(f"{error}: METEOR is left out, and the other metrics use the project's own tokens instead of PTB's")
        return _project_tokens(generated), _project_tokens(references), "project"


def _project_tokens(captions):
    """Write captions in the words that a vocabulary is made of. dict of image id to list of str -> the same."""
    return {i: [" ".join(split_words(caption)) for caption in group] for i, group in captions.items()}


@contextlib.contextmanager
def _java_settings():
    """Make Java speak English inside the block.

    In many other languages METEOR writes numbers with a decimal comma, which it then fails to read.
    """
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
    try:
        yield
    finally:
        del os.environ["JAVA_TOOL_OPTIONS"]
        if before is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = before


def _ptb_tokens(captions):
    """Write captions in the Penn Treebank's tokens, without punctuation. dict of image id to list of str -> the same.

    Raises:
      RuntimeError: Java is missing, fails or hangs, or the folder of pycocoevalcap, where it writes, is read-only.
    """
    if not shutil.which("java"):
        raise RuntimeError("Java is not installed")
    # The tokeniser reads one caption a line. A line break inside a caption would give all later ones to other images.
    lines = {i: [{"caption": " ".join(caption.splitlines())} for caption in group] for i, group in captions.items()}
    try:
        # The tokeniser waits for Java without a limit. So find out first whether Java hangs.
        subprocess.run(["java", "-version"], capture_output=True, check=True, timeout=_JAVA_SECONDS)
        with silenced_stderr():
            tokens = PTBTokenizer().tokenize(lines)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"Java's PTB tokeniser cannot be run ({error})") from error
    if any(len(tokens.get(image_id, [])) != len(group) for image_id, group in captions.items()):
        raise RuntimeError("Java's PTB tokeniser broke off")
    return tokens


def _score_meteor(generated, references):
    """METEOR of captions, given as `_score_ngrams` takes them.

    Returns:
      (float from 0 to 100, list of float from 0 to 1, of each image). If METEOR's Java program fails or hangs, a line
      is printed and (None, None) is returned.
    """
    scorer = Meteor()
    java = scorer.meteor_p
    watchdog = threading.Timer(_JAVA_SECONDS + len(generated) / 20, java.kill)
    watchdog.start()
    try:
        score, by_image = scorer.compute_score(references, generated)
        return 100 * score, by_image
    except (OSError, ValueError):
        print("METEOR is left out: its Java program, which takes up to 2 GB of memory, failed or hung")
        return None, None
    finally:
        watchdog.cancel()
        java.kill()
        with contextlib.suppress(OSError), java:  # closes its pipes and waits until it has ended
            pass
        if scorer.lock.locked():  # so after a failure; the scorer's destructor would wait for this lock for ever
            scorer.lock.release()


# --- Results ----------------------------------------------------------------------------------------------------


def write_metrics(folder, name, captions, metrics):
    """Write metrics_<name>.json, and for each run a file of captions that COCO's official evaluation can read.

    Args:
      folder: path of the folder, which is made if it is missing.
      name: str, a part of all names, as in captions_<name>_<run>_results.json. Blanks in the run's name are left out.
      captions: dict of run name to dict of image id to str.
      metrics: what metrics_<name>.json is to hold, as JSON can.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    for run, by_image in captions.items():
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in by_image.items()]
        write_json(pathlib.Path(folder, f"captions_{name}_{run.replace(' ', '')}_results.json"), results)
    write_json(pathlib.Path(folder, f"metrics_{name}.json"), metrics, indent=1)


def format_table(rows):
    """The metrics of several runs as a Markdown table, with "-" for a missing value.

    dict of run name to dict of metric to value -> str
    """
    names = (*METRICS, "tokens")
    table = [["run", *names], *([run, *(format_score(name, rows[run].get(name)) for name in names)] for run in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_score(name, value):
    """Write a metric's value as papers do: CIDEr with three decimals, the others with one."""
    if value is None:
        return "-"
    return value if name == "tokens" else f"{value:.3f}" if name == "CIDEr" else f"{value:.1f}"


# Articles, prepositions and conjunctions of English, behind which something must come.
_OPEN_WORDS = frozenset(
    "a an the about above across against along among and around as at because before behind below beneath beside "
    "between beyond but by during for from if in inside into like near of off on onto or over past than that through "
    "to toward towards under until upon when where which while with within without".split()
)


@dataclasses.dataclass(frozen=True)
class CaptionForm:
    """What the captions of a split look like.

    Attributes:
      captions: int, how many there are.
      distinct: int, how many different ones.
      mean_length: float, words.
      broken_endings: int, captions whose last word is an article, a preposition or a conjunction, or that have no word.
    """

    captions: int
    distinct: int
    mean_length: float
    broken_endings: int

    def __str__(self):
        return (
            f"{self.distinct} of {self.captions} captions differ; {self.mean_length:.1f} words each; "
            f"{self.broken_endings} break off"
        )


def describe_form(captions):
    """The CaptionForm of some captions. list of str -> CaptionForm."""
    words = [split_words(caption) for caption in captions]
    return CaptionForm(
        captions=len(captions),
        distinct=len(set(captions)),
        mean_length=sum(map(len, words)) / max(len(words), 1),
        broken_endings=sum(not each or each[-1] in _OPEN_WORDS for each in words),
    )
