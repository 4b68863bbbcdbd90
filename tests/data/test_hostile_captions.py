import json

import pytest
from hypothesis import example, given

from hostile_captions import COCO, KARPATHY, check_captions_file, check_karpathy_file, check_table_file, tables
from strategies import files_of


def coco_file(name):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": name}]
    annotations = [{"image_id": n, "caption": "a dog"} for n in (1, 2, 3)]
    return json.dumps({"images": images, "annotations": annotations}).encode()


@pytest.mark.slow
@example(b'{"images": ["\\ud800"], "annotations": ["two\\nlines"]}')
@example(coco_file("x" * 300 + ".jpg"))
@example(coco_file("é" * 112 + ".jpg"))
@given(files_of(COCO))
def test_any_captions_file_loads_or_is_one_line(data):
    check_captions_file(data)


@pytest.mark.slow
@given(files_of(KARPATHY))
def test_any_karpathy_file_loads_or_is_one_line(data):
    check_karpathy_file(data)


@pytest.mark.slow
@example(b"image,caption\n" + b'1.jpg,"a dog\n' * 300)
@example(b'{"file_name": "1.jpg", "text": "a dog"}\n' + b"[" * 100_000)
@given(tables())
def test_any_table_loads_or_is_one_line(data):
    check_table_file(data)
