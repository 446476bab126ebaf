"""Fixtures for the tests of detection."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_files import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path)
