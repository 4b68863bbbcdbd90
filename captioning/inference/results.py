"""COCO's results format: [{"image_id": ..., "caption": ...}], which pycocoevalcap and evaluation servers take."""

from captioning.inference.captions_file import image_key, read_records
from support.files import write_json


def write_results(path, images, records_path):
    """Write the captions of some images as a results file.

    Args:
      path: path of the file.
      images: list of ImageToCaption. Those without a line in the captions file are left out.
      records_path: pathlib.Path of captions.jsonl.

    Returns:
      int, how many captions the file holds. An image has the id of its annotation file, or else its name.
    """
    captions = {record.key: record.caption for record in read_records(records_path)}
    found = [(image, captions.get(image_key(image.name, image.path))) for image in images]
    results = [
        {"image_id": image.name if image.image_id is None else image.image_id, "caption": caption}
        for image, caption in found
        if caption is not None
    ]
    write_json(path, results)
    return len(results)
