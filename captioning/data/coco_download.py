"""Caption files and images that are missing, fetched from MS-COCO's server: one by one, or as an archive."""

import pathlib

from captioning.data.captioned_images import image_path
from support.downloads import download, download_all, unpack
from support.errors import UserError
from support.files import disk_usage, free_space, locked

_COCO_URL = "http://images.cocodataset.org"
_COCO_ARCHIVES = {  # size in bytes and SHA-256, as TensorFlow Datasets lists them in url_checksums/coco.txt
    "annotations_trainval2014.zip": (252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    "annotations_trainval2017.zip": (252_907_541, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
    "train2014.zip": (13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014.zip": (6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    "train2017.zip": (19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    "val2017.zip": (815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
}
_BYTES_PER_IMAGE = 163_000  # on average, in each of these archives
_DISPENSABLE = 0.1  # share of the images that a data set can do without, whatever the server answers
COCO_SPLITS = ("train2014", "val2014", "train2017", "val2017")  # those with captions


def captions_path(config):
    return pathlib.Path(config.coco_dir, "annotations", f"captions_{config.coco_split}.json")


def find_annotations(config, shard=None):
    """Find the caption file of COCO's split, and download it if it is missing. Returns its pathlib.Path.

    Args:
      shard: (number, count) of a shard, or None.

    Raises:
      UserError: the file is missing and COCO has none for this split, or the download failed.
    """
    split = config.coco_split
    path = captions_path(config)
    if not path.is_file():
        if split not in COCO_SPLITS:
            known = ", ".join(COCO_SPLITS)
            raise UserError(
                f"{path} is missing, and COCO has no captions for --coco_split {split}, only for {known}: "
                "give one of these, or set --coco_dir and --coco_split to where the captions are"
            )
        name = f"annotations_trainval{split[-4:]}.zip"
        _fetch_archive(name, config.coco_dir, wanted=lambda name: name.endswith(".json"), shard=shard)
    return path


def _fetch_archive(name, folder, wanted=None, shard=None):
    """Download one of _COCO_ARCHIVES and unpack it. Returns the archive's pathlib.Path.

    Args:
      folder: path of the folder to unpack into. The archive stays there too.
      wanted: function of a member's name, whether to unpack it. None stands for all.
      shard: (number, count) of a shard, or None. A shard downloads to a file of its own, which it deletes afterwards.
    """
    size, sha256 = _COCO_ARCHIVES[name]
    archive = pathlib.Path(folder, name)
    is_own = shard is not None and not archive.is_file()
    if is_own:
        archive = archive.with_stem("{}_shard_{}_of_{}".format(archive.stem, *shard))
    with locked(folder, "download", shared=shard is not None):
        place = "annotations" if name.startswith("annotations") else "zips"
        download(f"{_COCO_URL}/{place}/{name}", archive, size=size, sha256=sha256)
        unpack(archive, folder, wanted)
    if is_own:
        archive.unlink()
    return archive


def fetch_images(images, config, shared=False, total=None):
    """Download those of the images whose files are missing.

    Args:
      images: list of CaptionedImage.
      shared: bool, whether other processes may be downloading other images to the same folder.
      total: int, images that the data set needs, those that are at hand among them; None for no more than `images`.

    Returns:
      dict of an image's name to reason, for the images that could not be had

    Raises:
      UserError: there is no archive of this split, the network fails, the server refuses most of the images and these
        are more than the data set can do without, or the disk is full.
    """
    missing = [image for image in images if not image_path(image, config).is_file()]
    if not missing:
        return {}
    if config.image_source == "zip":
        return _fetch_images_by_archive(missing, config)
    return _fetch_images_one_by_one(missing, config, shared, total or len(images))


def _fetch_images_by_archive(missing, config):
    """Take missing images out of COCO's archives. Arguments and result are those of `fetch_images`."""
    skipped, wanted = {}, {}  # wanted: dict of split to the set of its members' names
    for image in missing:
        split = _coco_split(image, config)
        if config.dataset in ("karpathy", "table") and split not in COCO_SPLITS:  # Flickr's
            skipped[image.name] = _no_address(image, config)
        else:
            member = image_path(image, config).relative_to(_root_folder(config))
            wanted.setdefault(split, set()).add(member.as_posix())
    for split, names in wanted.items():
        if split not in COCO_SPLITS:
            raise UserError(
                f"{len(names)} images of {split} are missing, and there are archives only of {', '.join(COCO_SPLITS)}: "
                "give --image_source each"
            )
        _check_room(f"{split}.zip", _root_folder(config), len(names))
        archive = _fetch_archive(f"{split}.zip", _root_folder(config), names.__contains__)
        _part_with(archive, delete=config.delete_zip == "yes")
    absent = {image.name for image in missing if not image_path(image, config).is_file()}
    return skipped | {name: "not in the zip file" for name in sorted(absent - skipped.keys())}


def _check_room(name, folder, count):
    """Say what an archive and `count` images of it take on disk; UserError where that is more than there is."""
    archive = pathlib.Path(folder, name)
    archive_bytes, image_bytes = _COCO_ARCHIVES[name][0], count * _BYTES_PER_IMAGE
    kept = [path.stat().st_size for path in (archive, archive.with_name(f"{archive.name}.part")) if path.is_file()]
    if kept != [archive_bytes]:
        print(
            f"{name} takes {archive_bytes / 1e9:.1f} GB in {folder}, and the {count} images that are unpacked "
            f"from it about {image_bytes / 1e9:.1f} GB"
        )
    if archive_bytes - sum(kept) + image_bytes > disk_usage(folder).free:
        raise UserError(
            f"{name} and its images do not fit into {folder} ({free_space(folder)}), "
            "or give --image_source each, which fetches only the images that are needed"
        )


def _part_with(archive, delete):
    """Delete an archive out of which all that is needed has been unpacked, or say that the user may."""
    size = archive.stat().st_size / 1e9
    if delete:
        archive.unlink()
        print(f"{archive} is deleted ({size:.1f} GB): all images that are needed are unpacked and checked")
    else:
        print(f"{archive} may be deleted ({size:.1f} GB), as all images that are needed are unpacked and checked")


def _fetch_images_one_by_one(missing, config, shared, total):
    """Download missing images from the addresses in the captions file. The rest is as in `fetch_images`."""
    skipped = {image.name: _no_address(image, config) for image in missing if image.url is None}
    with_address = {image_path(image, config): image for image in missing if image.url is not None}
    jobs = [(image.url, path) for path, image in with_address.items()]
    if not jobs:
        return skipped
    with locked(_root_folder(config), "download", shared):
        # The few that are refused in every run must not block the others for good.
        most = len(jobs) > _DISPENSABLE * total
        failed = download_all(jobs, config.download_workers, need_most=most, contact=config.contact)
    return skipped | {with_address[pathlib.Path(path)].name: reason for path, reason in failed}


def _root_folder(config):
    """The folder that holds the folders of COCO's splits, such as train2014."""
    return pathlib.Path(config.images if config.dataset in ("karpathy", "table") else config.coco_dir)


def _coco_split(image, config):
    return image.folder if config.dataset in ("karpathy", "table") else image.coco_split or config.coco_split


def _no_address(image, config):
    return f"{image_path(image, config)} is missing, and the captions file gives no address for it"
