"""What script 3 leaves: captions.jsonl and captions.csv, attention figures, and the page of attention.

Captions stream: none but a batch's are in memory, so a million images need no more of it than a hundred.
"""

import contextlib

from tqdm import tqdm

from captioning.attention.boxes import boxes_by_position, find_groundings
from captioning.attention.figure import plot_attention
from captioning.attention.fonts import letters_in_fonts
from captioning.attention.page import PageCaption, PageImage, is_page, remove_further_pages, write_pages
from captioning.captioner import caption_batch
from captioning.inference import captions_file
from captioning.inference.captions_file import image_key
from captioning.inference.own_images import describe_skipped
from support.errors import UserError, printable

_MOST_PRINTED_IMAGES = 100  # images up to which each caption is printed; for more a bar tells how far it is


def write_captions(captioner, images, make_batches, output, options, config, skipped=()):
    """Caption images, and write captions.jsonl, captions.csv, figures and pages.

    What an earlier call finished is not done again, and its other images stay, unless `options.anew`.

    Args:
      images: list of ImageToCaption.
      make_batches: function of a list of ImageToCaption -> iterator of (list of B ImageToCaption, features (B, P, F)).
      output: pathlib.Path of the folder.
      options: the script's own options; `anew`, and `attention`, "drawn" or "all".
      config: Config; `figures`, and the settings of decoding.
      skipped: Counter of what has no caption, by kind, as it is when the last batch is done; told at the end.

    Returns:
      int, how many of the images have a caption

    Raises:
      UserError: the folder holds captions by another checkpoint or other settings, or it cannot be written.
    """
    path = output / "captions.jsonl"
    captions_file.begin_captions(path, captions_file.describe_maker(config, captioner.identity), options.anew)
    all_attention = options.attention == "all"
    finished = captions_file.find_finished(path, images, config.figures, all_attention, config.attention_map)
    if finished:
        again = f"--anew deletes all captions in {printable(output)} and begins again"
        print(f"{len(finished)} of {len(images)} images were captioned before ({again})")
    done, few = _caption_missing(captioner, images, finished, make_batches, path, options, config)
    captions_file.keep_latest(path)
    captions_file.write_table(output / "captions.csv", path)
    page = _write_attention_pages(images[: config.figures], path, output, config)
    figures = ", captions.csv and attention figures" if config.figures else " and captions.csv"
    print(f"captions.jsonl{figures} are in {printable(output)}")
    if done > config.figures:
        print(f"{done} images are captioned: --figures {done} draws all of them")
    if few:
        wanted = config.captions_per_image
        print(f"{few} images have fewer than {wanted} captions, as no more different ones were found")
    if skipped:
        print(f"skipped: {describe_skipped(skipped)}")
    if page:
        print(f"open {printable(page)} to look at the attention")
    else:
        print("no page of attention is written: it has no images")
    return done


def _caption_missing(captioner, images, finished, make_batches, path, options, config):
    """Add a line to a captions file for each image that is not finished, and draw its figure where one is wanted.

    Returns:
      done: int, how many of the images have a caption
      few: int, how many of those captioned now have fewer than `captions_per_image`
    """
    keys = [image_key(image.name, image.path) for image in images]
    missing = [image for key, image in zip(keys, images, strict=True) if key not in finished]
    states = {image.path: captions_file.file_state(image.path) for image in missing}  # before they are read
    drawn = {image.path for image in images[: config.figures]}
    all_attention, printed = options.attention == "all", len(images) <= _MOST_PRINTED_IMAGES
    done, few = len(finished), 0
    bar = tqdm(total=len(images), initial=done, desc="captioning", unit=" images", disable=printed)
    fonts = letters_in_fonts(captioner.vocabulary) if config.figures else contextlib.nullcontext()
    with bar, fonts, captions_file.appending(path) as add:
        for batch, features in make_batches(missing):
            shown = all_attention or any(image.path in drawn for image in batch)
            for prediction in caption_batch(captioner, batch, features, config, with_evidence=shown):
                is_drawn = prediction.path in drawn
                figure = _draw_figure(prediction, path.parent, config.attention_map) if is_drawn else ("", "")
                add(captions_file.make_record(prediction, states[prediction.path], *figure, is_drawn or all_attention))
                few += 1 + len(prediction.others) < config.captions_per_image
                if printed:
                    _print_caption(prediction)
            done += len(batch)
            bar.update(len(batch))
    return done, few


def _draw_figure(prediction, output, attention_map):
    """Draw the figure of an image. Returns its file name and map, or "" for both where it cannot be drawn."""
    name = captions_file.figure_name(prediction)
    try:
        plot_attention(prediction, output / name, attention_map)
    except UserError:  # the disk is full
        raise
    except Exception as error:  # the others are as good without it
        reason = " ".join(str(error).split())
        tqdm.write(printable(f"warning: no figure of {prediction.name}: {reason}"))
        return "", ""
    return name, attention_map


def _print_caption(prediction):
    print(printable(prediction.name))
    for reference in prediction.references:
        print(printable(f"  reference  {reference}"))
    for each in (prediction, *prediction.others):
        print(printable(f"  generated  {each.caption}"))


def _write_attention_pages(images, records_path, output, config):
    """Write the pages: first these images, then those of which an earlier call has drawn figures.

    Where there is none, the pages of an earlier call are deleted. Files of such names that are no pages of ours stay.

    Args:
      images: list of ImageToCaption. Those whose attention is not kept are left out.
      records_path: pathlib.Path of captions.jsonl.
      output: pathlib.Path of the folder.

    Returns:
      pathlib.Path of the first page, or None
    """
    named = {image_key(image.name, image.path): image for image in images}
    order = {key: number for number, key in enumerate(named)}
    shown = sorted(
        (order.get(record.key, len(order)), place)
        for record, place in captions_file.find_records(records_path)
        if record.attention_weights is not None and (record.figure or record.key in order)
    )
    if not shown:
        first = output / "index.html"
        remove_further_pages(first, 0)
        if is_page(first):  # and not a file of the user's
            with contextlib.suppress(OSError):
                first.unlink()
        return None

    def read(place):
        record = captions_file.read_record(records_path, place)
        return captions_file.restore_prediction(record, named.get(record.key))

    captions = lambda: (read(place) for _, place in shown)  # noqa: E731
    of_data_set = (caption for caption in captions() if caption.image_id is not None)
    boxes = _boxes_to_show([each for caption in of_data_set for each in (caption, *caption.others)], config)
    pages = (_page_image(caption, boxes) for caption in captions())
    return write_pages(output, "Where the model looked", pages, intro=_describe_list(config))[0]


def _page_image(caption, boxes):
    """The PageImage of a GeneratedCaption and of its `others`. boxes: as `boxes_by_position` returns them."""
    several = (caption, *caption.others)
    shown = [
        PageCaption(
            each,
            label=str(number) if caption.others else "",
            note=f"{each.log_probability:.2f}".replace("-", "\N{MINUS SIGN}") if caption.others else "",
            boxes=boxes.get((each.image_id, each.caption), {}),
        )
        for number, each in enumerate(several, 1)
    ]
    return PageImage(caption.path.name, caption.path, shown, is_list=True)


def _describe_list(config):
    """What a list of captions on the page is, for its introduction. "" where images have one caption."""
    if config.captions_per_image == 1:
        return ""
    drawn = config.sample == "yes"
    ranked = f"ranked by log-probability / length to the power {config.length_penalty:g}"
    return (
        f"Each image has up to {config.captions_per_image} captions, "
        f"{'in the order in which they were drawn' if drawn else ranked}. The number beside a caption is its "
        f"log-probability, the natural logarithm of how likely the model holds it{' at temperature 1' * drawn}."
    )


def _boxes_to_show(predictions, config):
    """The boxes of what a data set's captions name, see `boxes_by_position`. A page can do without."""
    if not predictions:
        return {}
    try:
        return boxes_by_position(find_groundings(predictions, config)[0] or [])
    except UserError as error:
        print(f"note: the page of attention has no boxes: {error}")
        return {}
