"""What script 3 leaves: captions.jsonl and captions.csv, attention figures, and the page of attention.

Captions stream: none but a batch's are in memory, so a million pictures need no more of it than a hundred.
"""

import contextlib

from tqdm import tqdm

from captioning.attention_page import (
    PageCaption,
    PagePicture,
    describe_light,
    is_page,
    remove_further_pages,
    write_pages,
)
from captioning.caption_records import (
    appending,
    describe_maker,
    figure_name,
    find_records,
    keep_finished,
    make_record,
    read_record,
    restore_prediction,
    write_table,
)
from captioning.captioner import caption_batch
from captioning.figures import plot_attention
from captioning.fonts import letters_in_fonts
from captioning.known_boxes import boxes_by_position, find_groundings
from captioning.own_pictures import describe_skipped
from support.errors import UserError

PRINTED = 100  # pictures up to which each caption is printed; for more a bar tells how far it is


def write_captions(captioner, pictures, make_batches, output, options, config, skipped=()):
    """Caption pictures, and write captions.jsonl, captions.csv, figures and pages.

    What an earlier run of the same command finished is not done again, unless `options.anew`.

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
    """
    path = output / "captions.jsonl"
    all_attention = options.attention == "all"
    maker = describe_maker(config, captioner.identity)
    finished = keep_finished(path, [] if options.anew else pictures, maker, config.figures, all_attention)
    positions = {picture.name: number for number, picture in enumerate(pictures)}
    missing = [picture for picture in pictures if picture.name not in finished]
    if finished:
        print(f"{len(finished)} of {len(pictures)} pictures were captioned before: --anew captions all")
    few = len(pictures) <= PRINTED
    bar = tqdm(total=len(pictures), initial=len(finished), desc="captioning", unit=" pictures", disable=few)
    done = len(finished)
    fonts = letters_in_fonts(captioner.vocabulary) if config.figures else contextlib.nullcontext()
    with bar, fonts, appending(path) as add:
        for batch, features in make_batches(missing):
            shown = all_attention or any(positions[picture.name] < config.figures for picture in batch)
            with_evidence = shown and config.attention_map == "evidence"
            for prediction in caption_batch(captioner, batch, features, config, with_evidence):
                number = positions[prediction.name]
                drawn = number < config.figures
                figure = draw_figure(prediction, number, output) if drawn else ""
                add(make_record(prediction, figure, drawn or all_attention))
                if few:
                    print_caption(prediction)
            done += len(batch)
            bar.update(len(batch))
    write_table(output / "captions.csv", path)
    page = write_attention_pages(pictures[: config.figures], path, output, config)
    figures = ", captions.csv and attention figures" if config.figures else " and captions.csv"
    print(f"captions.jsonl{figures} are in {output}")
    if done > config.figures:
        print(f"{done} pictures are captioned: --figures {done} draws all of them")
    if skipped:
        print(f"skipped: {describe_skipped(skipped)}")
    print(f"open {page} to look at the attention" if page else "no page of attention is written: it has no pictures")
    return done


def draw_figure(prediction, number, output):
    """Draw the figure of a picture. Returns its file name, or "" where it cannot be drawn, which is printed."""
    name = figure_name(number, prediction)
    try:
        plot_attention(prediction, output / name)
    except UserError:  # the disk is full
        raise
    except Exception as error:  # the others are as good without it
        reason = " ".join(str(error).split())
        tqdm.write(f"warning: no figure of {prediction.name}: {reason}")
        return ""
    return name


def print_caption(prediction):
    print(prediction.name)
    for reference in prediction.references:
        print(f"  real       {reference}")
    print(f"  predicted  {prediction.caption}")


def write_attention_pages(pictures, records_path, output, config):
    """Write the pages of the pictures whose attention is kept, or delete those of an earlier run if there is none.

    Returns:
      pathlib.Path of the first page, or None
    """
    places = find_records(records_path, {picture.name for picture in pictures})
    shown = [picture for picture in pictures if picture.name in places]
    if not shown:
        remove_pages(output / "index.html")
        return None
    read = lambda picture: restore_prediction(read_record(records_path, places[picture.name]), picture)  # noqa: E731
    boxes = boxes_to_show([read(picture) for picture in shown if picture.image_id is not None], config)
    pages = (
        PagePicture(caption.path.name, caption.path, [PageCaption(caption, boxes=boxes.get(caption.image_id, {}))])
        for caption in map(read, shown)
    )
    return write_pages(output, "Where the model looked", pages, intro=describe_light(read(shown[0])))[0]


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
