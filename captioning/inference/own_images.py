"""The user's own images: files, folders and addresses to ImageToCaption, and these to features."""

import codecs
import contextlib
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re

import numpy as np
from PIL import Image
from tqdm import tqdm

from captioning.data.coco import read_image_list
from captioning.features.cache import ImageToCaption
from captioning.features.cnn import CNNS
from captioning.features.extraction import extract_features
from captioning.features.image_files import load_image
from captioning.features.network import extraction_graphs
from support.downloads import download_all
from support.errors import FileError, UserError, mended_by, printable
from support.files import walk_folder

_EXTRACTED = 300  # images whose features are held in memory before they are captioned
_MOST_IMAGE_BYTES = 50_000_000  # bytes of an image fetched from an address
_SHOWN_KINDS = 8  # kinds of what was skipped that are counted each

# Of the many formats that Pillow registers, those that hold images: not PDF, not video, not HDF5.
_IMAGE_FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA"}
_IMAGE_FORMATS |= {"QOI", "SGI", "TIFF", "WEBP"}


def find_images(names, output, skipped):
    """The image files that are named, those in the folders that are named, at any depth, and those of addresses.

    Args:
      names: list of str, files, folders, http or https addresses, JSON files that list images as COCO's do, patterns
        such as images/*.jpg, and @list.txt for what a text file names, see `_read_list`. ~ is the home folder.
      output: pathlib.Path of the folder that captions go to. What is in it is left out of a folder that holds it.
        Images of addresses are to be downloaded to `output`/downloads, see `fetch_images`.
      skipped: Counter of what is left out, by kind, such as files in folders that are no images; it is added to.

    Returns:
      list of ImageToCaption, each file once

    Raises:
      UserError: there is none.
    """
    images = []
    for name in _expand_names(names):
        path = pathlib.Path(name)
        if is_address(name):
            images.append(ImageToCaption(output / "downloads" / _local_name(name), name))
        elif path.suffix.lower() == ".json":
            images += _listed_images(path)
        elif os.path.isdir(path):  # unlike path.is_dir, no error where the name is too long
            if path.resolve() == output.resolve():  # the next run would take figures for images
                other = path / "captions"  # which `_walk_folder` leaves out
                raise UserError(f"{path} holds the images: give another folder by --output, such as {other}")
            images += [ImageToCaption(file, str(file)) for file in _walk_folder(path, output.resolve(), skipped)]
        else:
            images.append(ImageToCaption(path, str(path)))
    if not images:
        found = f" ({describe_skipped(skipped)})" if skipped else ""
        raise UserError(f"no image file is in {', '.join(names)}{found}: name image files or folders behind --image")
    different = {}
    for image in images:
        different.setdefault(os.path.abspath(image.path), image)
    return list(different.values())


def _expand_names(names):
    """Yield the names that lists, patterns and ~ stand for. A file of just such a name is that file."""
    for name in names:
        listed = _read_list(name[1:]) if name.startswith("@") and not os.path.exists(name) else [name]
        for each in listed:
            each = each if is_address(each) else os.path.expanduser(each)
            is_pattern = glob.has_magic(each) and not is_address(each) and not os.path.exists(each)
            yield from (_find_matches(each) if is_pattern else []) or [each]


def _find_matches(pattern):
    """What a pattern stands for, in order. Where linked folders lead back to others, ** enters each of them once."""
    real_folder, found = functools.lru_cache(None)(os.path.realpath), {}
    order = lambda match: (len(pathlib.PurePath(match).parts), match)  # noqa: E731
    for match in sorted(glob.glob(pattern, recursive=True), key=order):  # the shortest way to a file is its name
        folder, name = os.path.split(match)
        found.setdefault((real_folder(folder), name), match)
    return sorted(found.values())


def _read_list(name):
    """The names in a text file, one a line, relative to the current folder. Blank lines and those with # do not count.

    It is UTF-8, or UTF-16 with a byte order mark. A name may have other bytes, as file names may.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        data = pathlib.Path(os.path.expanduser(name)).read_bytes()
        is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16") if is_wide else data.decode("utf-8-sig", "surrogateescape")
        if "\0" in text:
            raise ValueError("it is no text")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "name a text file behind @ that has a file, folder or address in each line"
        raise UserError(f"the list {name} cannot be read ({reason}): {remedy}") from None
    lines = (line.strip(" \t\r") for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


@mended_by("name a file such as annotations/image_info_test2014.json behind --image, with its images in test2014/")
def _listed_images(path):
    """The images that a file in COCO's layout lists. They are in its own folder, or where COCO's archives put them.

    Raises:
      UserError: the file cannot be used, or none of its images is there.
    """
    listed, split = read_image_list(path), path.stem.rpartition("_")[2]
    places = [path.parent, path.parent.parent / split, path.parent.parent]
    for place in places:
        paths = [place / image.folder / image.file_name for image in listed]
        if any(map(os.path.isfile, paths)):
            return [ImageToCaption(file, str(file), image.image_id) for file, image in zip(paths, listed, strict=True)]
    raise FileError(path, f"lists {len(listed)} images, none of which is in {', '.join(map(str, places))}")


def describe_skipped(skipped):
    """The most frequent kinds of what was skipped, and how many are of other kinds. Counter -> str."""
    by_count = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    shown = {kind: count for kind, count in by_count[:_SHOWN_KINDS] if kind.isprintable()}
    parts = [f"{count} {kind}" for kind, count in sorted(shown.items())]
    others = skipped.total() - sum(shown.values())
    return ", ".join([*parts, f"{others} others"] if others else parts)


def _walk_folder(folder, output, skipped):
    """The image files in a folder, at any depth, and in linked folders, in order of their names: list of pathlib.Path.

    Args:
      output: pathlib.Path, resolved; this folder is not entered.
      skipped: Counter of the kinds of files that are no images; it is added to.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in _IMAGE_FORMATS}
    found = []
    unreadable = lambda error: skipped.update(["folders that cannot be read"])  # noqa: E731
    for place, folders, files in walk_folder(folder, unreadable):
        folders[:] = [name for name in folders if pathlib.Path(place, name).resolve() != output]
        for name in files:
            ending = pathlib.PurePath(name).suffix.lower()
            if name.startswith("._"):
                skipped["macOS side files (._*)"] += 1
            elif ending in endings:
                found.append(pathlib.Path(place, name))
            else:
                skipped[f"*{ending}" if ending else "files without an ending"] += 1
    return sorted(found)


def is_address(name):
    return re.match("[a-z][a-z0-9+.-]*://", name, re.IGNORECASE) is not None


def _local_name(address):
    """A file name for an address: letters and digits of its last part, and a digest that no other address has."""
    last = re.sub("[^A-Za-z0-9]+", "_", address.split("?")[0].rsplit("/", 1)[-1])
    return f"{last[-40:]}_{hashlib.sha256(os.fsencode(address)).hexdigest()[:16]}"


def fetch_images(images, workers, skipped, contact=""):
    """Download the images of addresses, anew in each run. Those that cannot be had are named, counted and left out.

    Args:
      workers: int, images fetched at a time.
      skipped: as in `find_images`.
      contact: str, as in `downloads.download`.
    """
    jobs = [(image.name, image.path) for image in images if is_address(image.name)]
    for _, path in jobs:
        with contextlib.suppress(OSError):
            path.unlink()
    limits = {"attempts": 2, "timeout": 10.0, "limit": _MOST_IMAGE_BYTES, "give_up": None, "contact": contact}
    failed = dict(download_all(jobs, workers, progress=False, **limits))
    for image in images:
        if image.path in failed:
            print(printable(f"{image.name} cannot be fetched ({failed[image.path]})"))
            skipped["not fetched"] += 1
    if not contact and any("status 403" in reason for reason in failed.values()):
        print("some servers refuse (403) whoever names no contact: give your e-mail or web address by --contact")
    return [image for image in images if image.path not in failed]


def extract_batches(network, images, config, skipped, cut=None):
    """Features of image files, about `decode_batch` at a time, but whole batches of extraction.

    Images that cannot be read are named, counted and left out.

    Args:
      network: function, as feature_network returns.
      skipped: as in `find_images`.
      cut: list or None, as in `load_image`.

    Yields:
      (list of B ImageToCaption, features float32 (B, P, F))
    """
    cnn = CNNS[config.cnn]
    load = functools.partial(load_image, side=cnn.image_size, cut=cut)
    together = max(config.decode_batch // config.extract_batch, 1)
    for start in range(0, len(images), _EXTRACTED):
        by_path = {image.path: image for image in images[start : start + _EXTRACTED]}
        # Decoding, whose captions are to be float32's, stays outside of the block.
        with extraction_graphs(config):
            extracted = list(extract_features(network, cnn, list(by_path), config.extract_batch, load))
        for i in range(0, len(extracted), together):
            done, features, failed = zip(*extracted[i : i + together], strict=True)
            for path, reason in itertools.chain(*failed):
                name = by_path[path].name
                tqdm.write(printable(f"{name}: {reason}" if is_address(name) else reason))
                skipped["not readable"] += 1
            readable = [by_path[path] for path in itertools.chain(*done)]
            if readable:
                yield readable, np.concatenate(features)  # (B, P, F)
