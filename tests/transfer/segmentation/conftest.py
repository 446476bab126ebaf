"""Fixtures for the tests of segmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from mask_files import write_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "set")
    return tmp_path / "set"
