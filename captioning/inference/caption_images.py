"""What script 3 leaves: captions.jsonl and captions.csv, attention figures, and the page of attention.

Captions stream: none but a batch's are in memory, so a million pictures need no more of it than a hundred.
"""

import contextlib

from tqdm import tqdm

from captioning.attention.boxes import boxes_by_position, find_groundings
from captioning.attention.figure import plot_attention
from captioning.attention.fonts import letters_in_fonts
from captioning.attention.page import (
    PageCaption,
    PagePicture,
    describe_light,
    is_page,
    remove_further_pages,
    write_pages,
)
from captioning.captioner import caption_batch
from captioning.inference.captions_file import (
    appending,
    begin_captions,
    describe_maker,
    figure_name,
    file_state,
    find_finished,
    find_records,
    keep_latest,
    make_record,
    picture_key,
    read_record,
    restore_prediction,
    write_table,
)
from captioning.inference.own_images import describe_skipped
from support.errors import UserError, printable

PRINTED = 100  # pictures up to which each caption is printed; for more a bar tells how far it is


def write_captions(captioner, pictures, make_batches, output, options, config, skipped=()):
    """Caption pictures, and write captions.jsonl, captions.csv, figures and pages.

    What an earlier call finished is not done again, and its other pictures stay, unless `options.anew`.

    Args:
      captioner: Captioner
      pictures: list of Pictures.
      make_batches: function of a list of Pictures -> iterator of (list of B Pictures, features (B, P, F)).
      output: pathlib.Path of the folder.
      options: the script's own options; `anew`, and `attention`, "drawn" or "all".
      config: Config; `figures`, and the settings of decoding.
      skipped: Counter of what has no caption, by kind, as it is when the last batch is done; told at the end.

    Returns:
      int, how many of the pictures have a caption

    Raises:
      UserError: the folder holds captions by another checkpoint or other settings, or it cannot be written.
    """
    path = output / "captions.jsonl"
    begin_captions(path, describe_maker(config, captioner.identity), options.anew)
    finished = find_finished(path, pictures, config.figures, options.attention == "all")
    if finished:
        again = f"--anew deletes all captions in {printable(output)} and begins again"
        print(f"{len(finished)} of {len(pictures)} pictures were captioned before ({again})")
    done = caption_missing(captioner, pictures, finished, make_batches, path, options, config)
    keep_latest(path)
    write_table(output / "captions.csv", path)
    page = write_attention_pages(pictures[: config.figures], path, output, config)
    figures = ", captions.csv and attention figures" if config.figures else " and captions.csv"
    print(f"captions.jsonl{figures} are in {printable(output)}")
    if done > config.figures:
        print(f"{done} pictures are captioned: --figures {done} draws all of them")
    if skipped:
        print(f"skipped: {describe_skipped(skipped)}")
    opened = f"open {printable(page)} to look at the attention"
    print(opened if page else "no page of attention is written: it has no pictures")
    return done


def caption_missing(captioner, pictures, finished, make_batches, path, options, config):
    """Add a line to a captions file for each picture that is not finished, and draw its figure where one is wanted.

    Returns:
      int, how many of the pictures have a caption
    """
    keys = [picture_key(picture.name, picture.path) for picture in pictures]
    missing = [picture for key, picture in zip(keys, pictures, strict=True) if key not in finished]
    states = {picture.path: file_state(picture.path) for picture in missing}  # before they are read
    drawn = {picture.path for picture in pictures[: config.figures]}
    all_attention, few, done = options.attention == "all", len(pictures) <= PRINTED, len(finished)
    bar = tqdm(total=len(pictures), initial=done, desc="captioning", unit=" pictures", disable=few)
    fonts = letters_in_fonts(captioner.vocabulary) if config.figures else contextlib.nullcontext()
    with bar, fonts, appending(path) as add:
        for batch, features in make_batches(missing):
            shown = all_attention or any(picture.path in drawn for picture in batch)
            with_evidence = shown and config.attention_map == "evidence"
            for prediction in caption_batch(captioner, batch, features, config, with_evidence):
                is_drawn = prediction.path in drawn
                figure = draw_figure(prediction, path.parent) if is_drawn else ""
                add(make_record(prediction, states[prediction.path], figure, is_drawn or all_attention))
                if few:
                    print_caption(prediction)
            done += len(batch)
            bar.update(len(batch))
    return done


def draw_figure(prediction, output):
    """Draw the figure of a picture. Returns its file name, or "" where it cannot be drawn, which is printed."""
    name = figure_name(prediction)
    try:
        plot_attention(prediction, output / name)
    except UserError:  # the disk is full
        raise
    except Exception as error:  # the others are as good without it
        reason = " ".join(str(error).split())
        tqdm.write(printable(f"warning: no figure of {prediction.name}: {reason}"))
        return ""
    return name


def print_caption(prediction):
    print(printable(prediction.name))
    for reference in prediction.references:
        print(printable(f"  real       {reference}"))
    print(printable(f"  predicted  {prediction.caption}"))


def write_attention_pages(pictures, records_path, output, config):
    """Write the pages: first these pictures, then those of which an earlier call has drawn figures.

    Where there is none, the pages of an earlier call are deleted.

    Args:
      pictures: list of Pictures. Those whose attention is not kept are left out.
      records_path: pathlib.Path of captions.jsonl.
      output: pathlib.Path of the folder.
      config: Config

    Returns:
      pathlib.Path of the first page, or None
    """
    named = {picture_key(picture.name, picture.path): picture for picture in pictures}
    order = {key: number for number, key in enumerate(named)}
    shown = sorted(
        (order.get(record.key, len(order)), place)
        for record, place in find_records(records_path)
        if record.attention_weights is not None and (record.figure or record.key in order)
    )
    if not shown:
        remove_pages(output / "index.html")
        return None

    def read(place):
        record = read_record(records_path, place)
        return restore_prediction(record, named.get(record.key))

    captions = lambda: (read(place) for _, place in shown)  # noqa: E731
    boxes = boxes_to_show([caption for caption in captions() if caption.image_id is not None], config)
    pages = (
        PagePicture(caption.path.name, caption.path, [PageCaption(caption, boxes=boxes.get(caption.image_id, {}))])
        for caption in captions()
    )
    return write_pages(output, "Where the model looked", pages, intro=describe_light(next(captions())))[0]


def boxes_to_show(predictions, config):
    """The boxes of what a data set's captions name, see `boxes_by_position`. A page can do without."""
    if not predictions:
        return {}
    try:
        return boxes_by_position(find_groundings(predictions, config)[0] or [])
    except UserError as error:
        print(f"note: the page of attention has no boxes: {error}")
        return {}


def remove_pages(first):
    """Delete the pages that an earlier call wrote. Files of such names that are no pages of ours stay."""
    remove_further_pages(first, 0)
    if is_page(first):
        with contextlib.suppress(OSError):
            first.unlink()
