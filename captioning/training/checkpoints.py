"""Checkpoints: written whole, tested before they count as good, newest first.

Beside each lies ckpt-N.json with the digest of the model.py that it was trained with.
"""

import contextlib
import functools
import hashlib
import pathlib
import re
import shutil
import tempfile
import weakref

import tensorflow as tf

import model
from support.distribution import is_chief
from support.errors import FileError, UserError
from support.files import free_space, is_pattern, list_folder, read_json, write_json

# What is written for a checkpoint, and the folder that TensorFlow writes it in first. All else is somebody's own.
_WRITTEN = re.compile(r"(ckpt-(?:0|[1-9][0-9]*))(\.index|\.json|\.data-[0-9]{5}-of-[0-9]{5}|_temp)")


def captioner_checkpoint(encoder, decoder):
    """What `best` holds: encoder and decoder, without the optimizer."""
    return tf.train.Checkpoint(encoder=encoder, decoder=decoder)


def save_checkpoint(objects, folder, number):
    """Write a tf.train.Checkpoint as `folder`/ckpt-`number`, and keep the one before it and no others.

    Of several workers only the chief writes.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    if not is_chief():
        return
    path = folder / f"ckpt-{number}"
    try:
        objects.write(path)
        write_json(path.with_name(f"{path.name}.json"), {"model": model_digest()})
    except tf.errors.OpError as error:
        reason = error.message.rpartition("; ")[2].partition(" [Op")[0]
        raise UserError(f"cannot write {path}: {reason} ({free_space(folder)})") from error
    finally:
        kept = [path.name for path in list_checkpoints(folder) if _checkpoint_number(path) <= number][:2]
        for file in list_folder(folder, "ckpt-*"):
            name, part = match.groups() if (match := _WRITTEN.fullmatch(file.name)) else ("", "")
            if part == "_temp" and file.is_dir():  # of a save that was killed or failed
                shutil.rmtree(file)
            elif part not in ("", "_temp") and name not in kept and not file.is_dir():
                file.unlink()


def restore_newest(objects, folders):
    """Restore a tf.train.Checkpoint's objects from the newest checkpoint that can be read.

    Args:
      folders: list of pathlib.Path; one is tried when nothing in those before it can be read.

    Returns:
      pathlib.Path of the checkpoint without its ending, or None where there is none.

    Raises:
      FileError: there are some, and none can be read.
    """
    damaged = []
    for path in (path for folder in folders for path in list_checkpoints(folder)):
        try:
            objects.read(_readable_path(path, objects)).assert_existing_objects_matched().expect_partial()
        except Exception as error:  # TensorFlow raises many kinds for damaged files
            damaged.append(FileError(path, _describe_error(error)))
            continue
        for problem in damaged:
            print(f"{problem}: {path.parent.name}/{path.name} is taken instead")
        _compare_model(path)
        return path
    if damaged:
        raise damaged[0]
    return None


@functools.cache  # the file may be edited while this process goes on with what it has read
def model_digest():
    """A digest of model.py without its comments and empty lines, a str."""
    lines = pathlib.Path(model.__file__).read_text(encoding="utf-8").splitlines()
    code = [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def _compare_model(path):
    """Say where a checkpoint is of another model.py. Its weights may fit all the same, and mean something else."""
    trained_with = model_digest()  # what an older run has no word of is taken to be the same
    with contextlib.suppress(FileError):
        trained_with = read_json(path.with_name(f"{path.name}.json"), dict).get("model")
    if trained_with != model_digest():
        name, run = f"{path.parent.name}/{path.name}", path.parent.parent
        print(
            f"note: model.py has changed since {name} was trained. If it computes something else now, the captions are "
            f"wrong: train anew, with another --run_dir or after moving {run} away"
        )


def _describe_error(error):
    """What is wrong with a checkpoint. It may be whole, and the user may have changed the model since. -> str"""
    text = str(error)
    if found := re.search(r"with shape (\(.*?\)) .*variable with shape (\(.*?\)) and name (\S+?)(:0)?\.?$", text, re.M):
        shapes = f"{found[3]} has the shape {found[2]} by them, and {found[1]} in the checkpoint"
        return f"does not fit model.py and the vocabulary: {shapes}"
    if isinstance(error, AssertionError):  # TensorFlow names what is in the model alone
        found = re.search(r"<Variable path=([^,>]+)", text)
        return f"does not fit model.py: it has no weights for {found[1] if found else 'all of it'}"
    return f"cannot be read ({text.partition(chr(10))[0]})"


def _readable_path(path, owner):
    """The path of a checkpoint as TensorFlow can read it.

    Where `is_pattern` holds, the path returned goes through a link. The link is there as long as `owner`, because
    TensorFlow reads again when something is added to what it restored.
    """
    if not is_pattern(path):
        return path
    folder = tempfile.mkdtemp()
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    link = pathlib.Path(folder, "folder")
    link.symlink_to(path.parent.absolute(), target_is_directory=True)
    return link / path.name


def list_checkpoints(folder):
    """The paths of the checkpoints in a folder, without endings, the newest first."""
    paths = (path.with_suffix("") for path in list_folder(folder, "ckpt-*.index") if _WRITTEN.fullmatch(path.name))
    return sorted(paths, key=_checkpoint_number, reverse=True)


def checkpoint_digest(path):
    """A digest of a checkpoint's index file, which holds a checksum of every tensor: no other weights have the same."""
    return hashlib.sha256(path.with_name(f"{path.name}.index").read_bytes()).hexdigest()[:16]


def _checkpoint_number(path):
    return int(path.name.removeprefix("ckpt-"))
