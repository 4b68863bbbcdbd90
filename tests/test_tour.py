"""The notebook docs/image_captioning.ipynb: executed whole, and kept without outputs."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOUR = ROOT / "docs" / "image_captioning.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    places = f"--data_dir {tmp_path}/data --coco_dir {tmp_path}/scenes --encoder_dim 16 --embedding_dim 16 --units 32"
    monkeypatch.setenv("TOUR_OPTIONS", f"--demo_images 16 --epochs 2 --batch_size 32 --max_words 30 {places}")
    notebook = nbformat.read(TOUR, as_version=4)
    # Where somebody starts Jupyter in the notebook's own folder.
    nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": TOUR.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    assert "vocabulary: " in texts and "the same as BahdanauAttention" in texts and "epoch 2: " in texts
    images = sum("image/png" in output.get("data", {}) for output in outputs)
    assert images == 5  # the batch, the losses, and the words of three captions
