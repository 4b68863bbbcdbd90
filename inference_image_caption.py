"""Script 3: caption validation images, or your own, and plot where the model looked for each word.

python inference_image_caption.py [--dataset NAME | --run_dir DIR]
    [--image FILE_FOLDER_OR_URL ... | --evaluate | --export DIR [--format litert] | --serve [PORT]]
    [--output DIR] [--captions N [--sample]] [--<setting> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import collections
import dataclasses
import os
import pathlib
import sys

import numpy as np

from captioning import settings
from captioning.captioner import decoding_settings
from captioning.evaluation import evaluate
from captioning.export import formats
from captioning.features import cache, image_files
from captioning.inference import caption_images, captions_file, own_images
from captioning.training import run_folder
from config import Config
from support import devices
from support.command_line import parse_command_line
from support.errors import UserError, printable
from support.files import locked, remove_leftovers
from support.process import run_script

_UNUSED = {  # options that have no place beside another
    "--image": ("split",),
    "--evaluate": ("attention", "anew"),
    **dict.fromkeys(("--export", "--serve"), ("split", "output", "attention", "anew")),
}


def add_options(parser):
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="FILE_FOLDER_OR_URL",
        help="caption these images instead of validation images; http and https addresses are fetched, @list.txt names "
        "one in each line, and a JSON file may list images as COCO's image_info files do",
    )
    parser.add_argument("--evaluate", action="store_true", help="score the captions of the whole split")
    parser.add_argument("--split", choices=("validation", "test"), help="(default: validation)")
    formats.add_options(parser)
    for name, kind, text in (
        ("--output", "DIR", "where captions and figures go (default: <run_dir>/captions)"),
        ("--results", "FILE", "also write the captions in COCO's results format"),
    ):
        parser.add_argument(name, metavar=kind, type=os.path.expanduser, help=text)
    parser.add_argument(
        "--attention",
        choices=("drawn", "all"),
        help="the images whose attention weights captions.jsonl keeps: those with a figure, or all (default: drawn)",
    )
    parser.add_argument(
        "--anew",
        action="store_true",
        help="first delete the captions and figures that the output folder's captions.jsonl lists, of all images",
    )


def main(argv):
    # The settings captions, a table's file, and seed, the data's, are script 1's. This script knows both from the run.
    renamed = {"captions": "captions_per_image", "seed": "sample_seed"}
    given, options = parse_command_line(argv, __doc__, Config, add_options, renamed)
    check_options(options)
    # Command line and preset tell where the run is. The run's own settings then count for all that is not given.
    config = settings.make_config(given)
    # In this block, a message about a damaged file ends with the command that makes the file anew.
    with settings.naming_commands(config):
        config = decoding_settings(given, run_folder.run_settings(given, config.run_dir))
    image_files.set_up_pillow()
    devices.set_up_devices()
    with settings.naming_commands(config):
        caption(options, config)


def caption(options, config):
    """Do what the options ask for: export, serve, or caption the user's images or a split's."""
    if options.export or options.serve is not None:
        export(options, config)
        return
    output = pathlib.Path(options.output or pathlib.Path(config.run_dir, "captions"))
    # Two calls would each add lines to one captions.jsonl, and delete each other's figures.
    with locked(output):
        remove_leftovers(output)
        if options.image:
            caption_own(output, options, config)
            return
        captioner, split = run_folder.load_captioner(config), options.split or "validation"
        if options.evaluate:
            evaluate.evaluate(captioner, split_images(split, config), split, output, config)
        else:
            images = choose_images(split_images(split, config), config)
            # Features are read a batch at a time, and only of those images that have no caption yet.
            make_batches = lambda wanted: cache.cached_batches(wanted, config)  # noqa: E731
            caption_images.write_captions(captioner, images, make_batches, output, options, config)
            if options.results:
                captions_file.write_results(options.results, images, output / "captions.jsonl")


def check_options(options):
    """UserError where the options ask for several things at once."""
    asked = [f"--{name}" for name in ("image", "evaluate", "export") if getattr(options, name)]
    asked += ["--serve"] * (options.serve is not None)  # the port may be 0
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} do not go together: run the script once for each")
    for name in _UNUSED.get(asked[0], ()) if asked else ():
        if getattr(options, name):
            raise UserError(f"--{name} does not go with {asked[0]}: leave it out")
    if options.results and asked and not options.image:
        raise UserError("--results does not go with --evaluate, which writes such files itself, nor with an export")
    formats.check_options(options)


def export(options, config):
    """Write the captioner in the format that the options name, or serve its page."""
    # A bfloat16 graph runs on few machines, and an export goes to any.
    anywhere = dataclasses.replace(config, extract_precision="float32")
    # As functions: both take seconds to load, and what is wrong with the options is told before.
    load_captioner, make_network = run_folder.load_captioner, run_folder.run_network
    formats.export(lambda: load_captioner(config), lambda: make_network(anywhere), options, config)


def split_images(split, config):
    """The images of a split that data_utils.py prepared, with their cached features: list of ImageToCaption.

    Raises:
      UserError: there is no such split, or the data are not those that the run fits.
    """
    prepared = cache.load_data(config, to_caption=True)
    # The images may be others than the run's, but the CNN must be the same: a model understands no other features.
    run_folder.check_other_data(config.run_dir, config.data_dir, prepared)
    images = getattr(prepared, split)
    if not images:
        raise UserError(f"{config.data_dir} has no {split} split: leave out --split, or prepare data that have one")
    return cache.dataset_images(images, config)


def choose_images(images, config):
    """`plot_images` of the images, a choice that depends on the seed alone."""
    # The same images in each call, so that captions before and after more training can be compared.
    count = min(config.plot_images, len(images))
    chosen = np.random.default_rng(config.seed).choice(len(images), count, replace=False)
    return [images[i] for i in chosen]


def caption_own(output, options, config):
    """Caption the user's images; the exit status is 0 only if all were captioned."""
    run_folder.check_model_settings(config.run_dir, config)  # which costs nothing
    # What a folder holds besides images, and what cannot be read, is counted and told at the end.
    skipped = collections.Counter()
    images = own_images.find_images(options.image, output, skipped)
    network = run_folder.run_network(config, keep=True)  # before anything is downloaded, as it may not be had
    captioner = run_folder.load_captioner(config)  # meanwhile the network gets ready
    fetched, cut = own_images.fetch_images(images, config.download_workers, skipped, config.contact), []
    make_batches = lambda wanted: own_images.extract_batches(network, wanted, config, skipped, cut)  # noqa: E731
    # Features of the user's images are not kept on disk: an image is captioned once, and they take 262 kB each.
    done = caption_images.write_captions(captioner, fetched, make_batches, output, options, config, skipped)
    if options.results:
        captions_file.write_results(options.results, images, output / "captions.jsonl")
    if cut:
        print(printable(f"{len(cut)} JPEG files lack their end and are captioned all the same, such as {cut[0]}"))
    if done < len(images):
        print(f"{len(images) - done} of {len(images)} images have no caption; the lines above say why")
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
