"""What script 3 leaves: captions.jsonl and captions.csv, attention figures, and the page of attention.

Captions stream: none but a batch's are in memory, so a million pictures need no more of it than a hundred.
"""

from tqdm import tqdm

from captioning.attention_page import PageCaption, PagePicture, write_pages
from captioning.caption_records import (
    appending,
    describe_maker,
    keep_finished,
    make_record,
    read_records,
    restore_prediction,
    write_table,
)
from captioning.captioner import caption_batch
from captioning.figures import plot_attention


def write_captions(captioner, pictures, make_batches, output, options, config):
    """Caption pictures, and write captions.jsonl, captions.csv, figures and pages.

    What an earlier run of the same command finished is not done again, unless `options.anew`.

    Args:
      captioner: Captioner
      pictures: list of Pictures.
      make_batches: function of a list of Pictures -> iterator of (list of B Pictures, features (B, P, F)).
      output: pathlib.Path of the folder.
      options: the script's own options; `anew`, and `attention`, "drawn" or "all".
      config: Config; `figures`, and the settings of decoding.

    Returns:
      int, how many of the pictures have a caption
    """
    path = output / "captions.jsonl"
    keeps_attention = lambda number: options.attention == "all" or number < config.figures  # noqa: E731
    maker = describe_maker(config, captioner.identity)
    finished = keep_finished(path, [] if options.anew else pictures, maker, keeps_attention)
    positions = {picture.name: number for number, picture in enumerate(pictures)}
    missing = [picture for picture in pictures if picture.name not in finished]
    if finished:
        print(f"{len(finished)} of {len(pictures)} pictures were captioned before: --anew captions all")
    few = len(pictures) <= config.figures
    bar = tqdm(total=len(pictures), initial=len(finished), desc="captioning", unit=" pictures", disable=few)
    done = len(finished)
    with bar, appending(path) as add:
        for batch, features in make_batches(missing):
            records = []
            for prediction in caption_batch(captioner, batch, features, config):
                number = positions[prediction.name]
                figure = draw_figure(prediction, number, output) if number < config.figures else ""
                records.append(make_record(prediction, figure, keeps_attention(number)))
                if few:
                    print_caption(prediction)
            add(records)
            done += len(records)
            bar.update(len(records))
    write_table(output / "captions.csv", path)
    page = write_attention_pages(pictures[: config.figures], path, output)
    print(f"captions.jsonl, captions.csv and attention figures are in {output}")
    if done > config.figures:
        print(f"{done} pictures are captioned: --figures {done} draws all of them")
    print(f"open {page} to look at the attention" if page else "no page of attention was asked for")
    return done


def draw_figure(prediction, number, output):
    """Draw the figure of a picture. Returns its file name, or "" where it cannot be drawn, which is printed."""
    name = f"{number + 1:03d}_{prediction.path.stem}.png"
    try:
        plot_attention(prediction, output / name)
    except ValueError as error:
        print(f"warning: no figure, {error}")
        return ""
    return name


def print_caption(prediction):
    print(prediction.name)
    for reference in prediction.references:
        print(f"  real       {reference}")
    print(f"  predicted  {prediction.caption}")


def write_attention_pages(pictures, records_path, output):
    """Write the pages of the pictures whose attention is kept. Returns the path of the first, None without pictures."""
    if not pictures:
        return None
    wanted = {picture.name for picture in pictures}
    records = {record.image: record for record in read_records(records_path) if record.image in wanted}
    pages = (
        PagePicture(picture.path.name, picture.path, [PageCaption(restore_prediction(records[picture.name], picture))])
        for picture in pictures
        if picture.name in records
    )
    return write_pages(output, "Where the model looked", pages)[0]
