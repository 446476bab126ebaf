"""Colour icon sets: fetched as npm packages, checked, and drawn as pictures with resvg.

A set is the file icons.json of a package `@iconify-json/NAME`: icon name -> the inside of an SVG. sets.yaml lists the
packages with versions, checksums, licences and artists.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

HERE = Path(__file__).parent
DRAWN = 96  # pixels of a drawn icon
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}">{body}</svg>'
)

IconSet = dict[str, Any]
"""The contents of icons.json."""


class Listed(NamedTuple):
    """A set of sets.yaml."""

    part: str
    version: str
    licence: str
    artists: str
    sha256: str


def listed() -> dict[str, Listed]:
    """Name of a set -> what sets.yaml says of it."""
    return {name: Listed(**fields) for name, fields in yaml.safe_load((HERE / "sets.yaml").read_text()).items()}


def class_names() -> list[str]:
    return (HERE / "classes.txt").read_text().split()


def fetch(name: str, folder: Path) -> IconSet:
    """The set from the package in `folder`, which npm fetches if it is not there. Exits if it is not the listed one."""
    about = listed()[name]
    archive = folder / f"iconify-json-{name}-{about.version}.tgz"
    if not archive.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"@iconify-json/{name}@{about.version}"
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", folder, package], check=True, stdout=sys.stderr
        )
    if hashlib.sha256(archive.read_bytes()).hexdigest() != about.sha256:
        raise SystemExit(f"{archive} is not the file that lab/colour/sets.yaml lists: its sha256 differs")
    with tarfile.open(archive) as package:
        info, icons = (json.load(_member(package, file)) for file in ("info.json", "icons.json"))
    if info["license"]["spdx"] != about.licence:
        raise SystemExit(f"{archive}: the licence is {info['license']['spdx']}, not {about.licence}")
    return icons


def _member(package: tarfile.TarFile, file: str) -> Any:
    member = package.extractfile(f"package/{file}")
    if member is None:
        raise SystemExit(f"{package.name} has no file {file}")
    return member


def draw(icons: IconSet, name: str, size: int = DRAWN) -> Image.Image:
    """The icon on a transparent square. Sets spell names with and without hyphens. Raises `KeyError`."""
    import resvg_py  # fetched by run.sh; what is tested without it needs no SVG

    spelled = {key.replace("-", ""): key for key in icons["icons"]}
    icon = icons["icons"][spelled[name.replace("-", "")]]
    box = {"left": 0, "top": 0, "width": 16, "height": 16}  # the format's defaults
    box |= {key: source[key] for source in (icons, icon) for key in box if key in source}
    svg = SVG.format(size=size, body=icon["body"], **box)
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
