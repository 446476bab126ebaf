"""examples/notebook.ipynb runs from top to bottom, with fewer images and epochs."""

from __future__ import annotations

import json
from pathlib import Path

import launcher
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
SMALLER = {  # 600 images for validation instead of 10,000
    "EPOCHS, IMAGES = 24, 1000": "EPOCHS, IMAGES = 2, 50",
    '"data": {"limit": IMAGES}': '"data": {"limit": IMAGES, "val": None, "val_fraction": 0.01}',
}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, 4)
    for text, smaller in SMALLER.items():
        assert sum(text in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, smaller)
    python = launcher.stand_ins() / "python"
    kernel = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "warm"}
    (tmp_path / "kernels" / "warm").mkdir(parents=True)
    (tmp_path / "kernels" / "warm" / "kernel.json").write_text(json.dumps(kernel | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=250, kernel_name="warm", resources=resources).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "no teacher" in printed and "torch.Size([1, 10])" in printed
    assert "Did you mean `demo`?" in printed and "optim.lrr: unknown" in printed
    assert (tmp_path / "runs/notebook/scalekd/report.html").is_file()


def test_it_is_committed_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    assert not any(cell.get("outputs") for cell in nbformat.read(NOTEBOOK, 4).cells)
