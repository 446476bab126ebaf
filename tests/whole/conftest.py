"""A finished run for tests that only look at its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_images import write_images
from whole_runs import TINY, changed

from scalekd.cli.app import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run in `run`, its recipe.yaml next to it as `tiny.yaml`, and its images."""
    root = tmp_path_factory.mktemp("stranger")
    write_images(root / "train", per_class=8)
    write_images(root / "val", per_class=4, seed=1)
    recipe = changed(TINY, losses={"ce": {}}, teacher=None, train={"epochs": 1}, track=["tensorboard"])
    recipe["data"] |= {"train": str(root / "train"), "val": str(root / "val")}
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(root / "tiny.yaml"), "--out", str(root / "run"), "--no-preflight"]) == 0
    return root
