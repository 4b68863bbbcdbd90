"""What it costs that the lines of features outlive a power cut: extraction with and without fsync, in alternation.

PYTHONPATH=. python tests/benchmarks/fsync_cost.py [FOLDER]

It extracts the demo's drawn scenes, with a network that only averages pixels in place of InceptionV3, so that nothing
but reading, writing and fsync takes time. FOLDER is on the disk to be measured; without it, that of temporary files is.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import time
from unittest import mock

import tensorflow as tf

from captioning.data.captioned_images import CaptionedImage
from captioning.demo.scenes import draw_demo
from captioning.features import extraction
from captioning.settings import make_config

IMAGES, ROUNDS = 160, 9


def main(argv):
    with tempfile.TemporaryDirectory(dir=argv[0] if argv else None) as folder:
        config = make_config({"coco_dir": f"{folder}/scenes"})
        draw_demo(config.coco_dir, IMAGES, config.seed, replace=True)
        names = sorted(path.name for path in pathlib.Path(config.coco_dir, config.coco_split).iterdir())
        images = [CaptionedImage(number, name) for number, name in enumerate(names)]
        extract(images, f"{folder}/warm-up", config.coco_dir)
        ratios = []
        for number in range(ROUNDS):
            synced = extract(images, f"{folder}/synced{number}", config.coco_dir)
            with mock.patch.object(os, "fsync", lambda file: None):
                plain = extract(images, f"{folder}/plain{number}", config.coco_dir)
            ratios.append(synced / plain)
            print(
                f"{IMAGES / synced:.0f} images/s with fsync, {IMAGES / plain:.0f} without: {ratios[-1]:.3f} of the time"
            )
    print(f"median ratio of the time {sorted(ratios)[ROUNDS // 2]:.3f}")


def extract(images, data_dir, coco_dir):
    """Seconds to cache the features of images."""
    config = make_config({"coco_dir": coco_dir, "data_dir": data_dir})
    pathlib.Path(data_dir, "features").mkdir(parents=True)
    begun = time.perf_counter()
    with (
        mock.patch.object(extraction, "feature_network", lambda *args: average),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        extraction.cache_features(images, [], config)
    return time.perf_counter() - begun


@tf.function(reduce_retracing=True)
def average(pixels):
    means = tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))  # (B,)
    return tf.tile(means[:, None, None], (1, 64, 2048))  # (B, P, F)


if __name__ == "__main__":
    main(sys.argv[1:])
