"""Two split files of a folder in COCO's layout: to train a captioner, and to go on from it on other images.

PYTHONPATH=. python tests/benchmarks/split_for_start.py COCO_DIR COCO_SPLIT OUT_DIR [SEED] [BASE] [OTHERS] [VALIDATION]

Writes base.json and others.json as Karpathy's split files are. If not said otherwise, base.json trains on 2,000 images
and others.json on 300 others; both validate on the same 100, and test on all that are left.
"""

import json
import pathlib
import sys

import numpy as np

from captioning.data.coco import read_coco_captions


def main(argv):
    folder, split, out, *rest = argv
    seed, base, others, validation = [*map(int, rest), *(42, 2_000, 300, 100)[len(rest) :]]
    images = read_coco_captions(pathlib.Path(folder, "annotations", f"captions_{split}.json"), max_words=10_000)
    order = np.random.default_rng(seed).permutation(len(images))
    train, validated, tested = np.split(order, [base + others, base + others + validation])
    for name, trained in (("base", train[:base]), ("others", train[base:])):
        names = dict.fromkeys(trained, "train") | dict.fromkeys(validated, "val") | dict.fromkeys(tested, "test")
        records = [
            {
                "imgid": images[number].image_id,
                "filename": images[number].file_name,
                "split": names[number],
                "sentences": [{"raw": text} for text in images[number].references],
            }
            for number in sorted(names)
        ]
        pathlib.Path(out, f"{name}.json").write_text(json.dumps({"images": records}))


if __name__ == "__main__":
    main(sys.argv[1:])
