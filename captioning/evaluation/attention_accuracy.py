"""Does the model look at what it names? Attention peaks, compared with the boxes of demo scenes and of MS-COCO."""

import numpy as np
from PIL import Image

from captioning.attention.maps import upsample


def attention_accuracy(groundings):
    """Measure whether maps point at what the words name, beside the guesses that a reader must know.

    Maps: the evidence; the attention weights; the weights for a word of another image; the feature norm at each
    location, whatever the word; the centre of the image; a uniform map, which is chance. "Off-centre" things are those
    of which no box covers the image's centre.

    Args:
      groundings: list of Grounding, one for each word that names an object.

    Returns:
      dict of "words" and "words_off_centre", how many there are, and of "maps": for each map a dict of shares in 0..1,
      or None where there are no words. "inside": the map's peak is in one of the boxes; "mass_inside": the mean share
      of the map's sum in them (attention correctness, Liu et al., 2017, arXiv 1605.09553); and both again with
      "_off_centre".
    """
    scores = {}
    covered = [_cover(grounding.size, grounding.boxes) for grounding in groundings]
    off_centre = [not pixels[pixels.shape[0] // 2, pixels.shape[1] // 2] for pixels in covered]
    for name, maps in _maps_to_compare(groundings).items():
        rows = np.array([_score_map(*pair) for pair in zip(maps, covered, strict=True)]).reshape(-1, 2)  # (words, 2)
        scores[name] = _named_means(rows, "") | _named_means(rows[off_centre], "_off_centre")
    return {"words": len(groundings), "words_off_centre": sum(off_centre), "maps": scores}


def _named_means(rows, ending):
    """The means of (words, 2) shares as a dict, None where there are no words."""
    means = rows.mean(axis=0).tolist() if len(rows) else (None, None)
    return {f"inside{ending}": means[0], f"mass_inside{ending}": means[1]}


def _maps_to_compare(groundings):
    """The maps that are measured: dict of name to list of (P,) arrays, one for each grounding.

    Evidence and feature norms are left out where they are not known.
    """
    weights = [grounding.attention_weights for grounding in groundings]
    maps = {
        "evidence": [grounding.evidence for grounding in groundings],
        "attention weights": weights,
        "weights of another image": [other.attention_weights for other in _others(groundings)],
        "feature norm": [grounding.feature_norms for grounding in groundings],
        "centre": [_centre_map(len(each)) for each in weights],
        "uniform (chance)": [np.full_like(each, 1 / len(each)) for each in weights],
    }
    return {name: values for name, values in maps.items() if not any(value is None for value in values)}


def _others(groundings):
    """For each grounding one of another image: the next in the list, from halfway round it."""
    count = len(groundings)
    found = []
    for number, grounding in enumerate(groundings):
        candidates = (groundings[(number + count // 2 + step) % count] for step in range(count))
        found.append(next((other for other in candidates if other.image_id != grounding.image_id), grounding))
    return found


def _centre_map(locations):
    """A map of the four locations around the centre of the grid."""
    side = round(locations**0.5)
    grid = np.zeros((side, side), np.float32)
    grid[(side - 1) // 2 : side // 2 + 1, (side - 1) // 2 : side // 2 + 1] = 1
    return grid.ravel() / grid.sum()


def _score_map(weights, covered):
    """Measure one map, (P,), by the pixels in the boxes, bool (height, width).

    Returns:
      (share of the map's peak that lies inside: 0 or 1, or between where several pixels share the peak; share of the
      map's sum that lies inside)
    """
    height, width = covered.shape
    side = round(len(weights) ** 0.5)
    cells = Image.fromarray(covered.astype(np.float32)).resize((side, side), Image.Resampling.BOX)  # share of each cell
    mass = float(np.asarray(cells).ravel() @ weights / max(np.sum(weights), 1e-12))
    if np.ptp(weights) == 0:  # a uniform map peaks everywhere
        return float(covered.mean()), mass
    # Zeros around the grid keep the peak of an outermost location in its middle.
    light = upsample(weights, (width, height), border="constant")  # (height, width)
    return float(covered[light == light.max()].mean()), mass


def _cover(size, boxes):
    """The pixels whose middle is in one of the boxes. (width, height), list of [x, y, w, h] -> bool (height, width)."""
    width, height = size
    down, across = np.ogrid[0.5:height, 0.5:width]  # (height, 1), (1, width): the pixels' middles
    covered = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        covered |= (x <= across) & (across < x + w) & (y <= down) & (down < y + h)  # (height, width)
    return covered
