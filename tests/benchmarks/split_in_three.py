"""Split a folder in COCO's layout into three, so that scores are of images that nothing was chosen on.

PYTHONPATH=. python tests/benchmarks/split_in_three.py COCO_DIR COCO_SPLIT OUT.json [SEED] [VALIDATION] [TEST]

Writes a split file as Karpathy's are: `python data_utils.py --dataset karpathy --karpathy_json OUT.json --images
COCO_DIR/COCO_SPLIT`. Validation and test get 400 images each if not said otherwise; the others are for training.
"""

import json
import pathlib
import sys

import numpy as np

from captioning.data.coco import read_coco_captions


def main(argv):
    folder, split, out, *rest = argv
    seed, validation, test = [*map(int, rest), *(42, 400, 400)[len(rest) :]]
    images = read_coco_captions(pathlib.Path(folder, "annotations", f"captions_{split}.json"), max_words=10_000)
    order = np.random.default_rng(seed).permutation(len(images))
    names = dict.fromkeys(order[:validation], "val") | dict.fromkeys(order[validation : validation + test], "test")
    records = [
        {
            "imgid": image.image_id,
            "filename": image.file_name,
            "split": names.get(number, "train"),
            "sentences": [{"raw": text} for text in image.references],
        }
        for number, image in enumerate(images)
    ]
    pathlib.Path(out).write_text(json.dumps({"images": records}))


if __name__ == "__main__":
    main(sys.argv[1:])
