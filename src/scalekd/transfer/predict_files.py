"""Reads the images to predict on, and writes pictures and a page into the output folder."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from rich.console import Console

from scalekd.common.errors import UserError, nearest
from scalekd.common.files import make_folder, replacing, write_text
from scalekd.common.text import counted, printable
from scalekd.data.images import BadImage, decode, read_file
from scalekd.data.sources.folders import images_below

from .palette import palette

BAD = "bad-images.txt"
STYLE = """body{font:15px system-ui,sans-serif;margin:2em}
figure{display:inline-block;margin:0 1em 1.5em 0;vertical-align:top;max-width:22em}
img{max-width:100%;max-height:20em}figcaption{color:#444;overflow-wrap:anywhere}
.legend span{display:inline-block;margin:0 1em .3em 0}
.legend i{display:inline-block;width:1em;height:1em;margin-right:.4em;border:1px solid #000;vertical-align:-2px}
"""


class SourceImages:
    """The images of `source`, one file or a folder that is searched recursively, and the names of their outputs.

    `names`: relative to the folder, sorted. `outputs`: `names` with .png in place of the extension, or with .png
    appended to all of them if two would otherwise be equal. Creates `out`. Raises `UserError`.
    """

    def __init__(self, source: Path, out: Path, console: Console):
        self.folder = source if source.is_dir() else source.parent
        self.names = _names(source)
        self.outputs = output_names(self.names)
        self.out, self.console = out, console
        self.bad: dict[str, str] = {}  # name: reason
        _make_out(out, source)

    def read(self, i: int) -> Image.Image | None:
        """Image `i`, rotated upright, of mode L or RGB; None if it cannot be read: then it is skipped."""
        try:
            return decode(read_file(str(self.folder / self.names[i])))
        except BadImage as error:
            self.skip(i, str(error))
            return None

    def skip(self, i: int, reason: str) -> None:
        """Prints the reason and keeps it for the list of skipped images."""
        name, reason = printable(self.names[i]), printable(reason)
        self.bad[name] = reason
        self.console.print(f"skipped: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Writes the list of skipped images. Raises `UserError` if all were skipped."""
        if self.bad:
            write_text(self.out / BAD, "".join(f"{name}\t{reason}\n" for name, reason in self.bad.items()))
        if len(self.bad) == len(self.names):
            name, reason = next(iter(self.bad.items()))
            raise UserError(f"no usable image among {counted(len(self.names), 'image')}; the first: {name}: {reason}")
        if self.bad:
            line = f"{len(self.bad)} of {len(self.names)} images were skipped; {self.out / BAD} lists them"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _names(source: Path) -> list[str]:
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"no image or folder {source}.{printable(nearest(source.name, siblings)) if siblings else ''}")
    names = [Path(file).relative_to(source).as_posix() for file in images_below(source)]
    if not names:
        raise UserError(f"no images in {source} or its sub-folders")
    return names


def output_names(names: Sequence[str]) -> list[str]:
    """Unique names of PNG files: a.jpg gives a.png. If there is an a.png or a.jpeg too, all names get .png appended."""
    short = [Path(name).with_suffix(".png").as_posix() for name in names]
    return short if len(set(short)) == len(short) else [f"{name}.png" for name in names]


def _make_out(out: Path, source: Path) -> None:
    """Creates `out`. Raises `UserError` if it is not empty, not writable or inside `source`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a folder with `out`")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{out} is inside {source}, so the next prediction would read its pictures; choose another folder with `out`"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose a new folder with `out`, or remove this one")
    make_folder(out)
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out}: no permission; choose another folder with `out`")


def save_png(image: Image.Image, file: Path) -> None:
    """Writes the image and creates its folder."""
    make_folder(file.parent)
    with replacing(file) as opened:
        image.save(opened, "png")


def write_index(
    out: Path, images: SourceImages, rows: Sequence[tuple[int, str]], title: str, values: Mapping[str, int]
) -> None:
    """Writes index.html with all pictures. rows: index of an image and its caption. values: class names and their mask
    values, for a legend."""
    lines = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(printable(title))}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(printable(title))}</h1>",
    ]
    if values:
        swatches = (
            f"<span><i style='background:rgb{colour}'></i>{value} {html.escape(printable(name))}</span>"
            for (name, value), colour in zip(values.items(), palette(len(values)))
        )
        lines.append(f"<p class=legend>{''.join(swatches)}</p>")
    for i, text in rows:
        link = "pictures/" + quote(os.fsencode(images.outputs[i]))
        caption = html.escape(printable(images.names[i]) + (f": {text}" if text else ""))
        lines.append(
            f"<figure><a href='{link}'><img loading=lazy src='{link}' alt=''></a><figcaption>{caption}</figcaption></figure>"
        )
    if images.bad:
        lines.append(f"<p>Skipped: {html.escape(', '.join(images.bad))} (<a href='{BAD}'>why</a>)</p>")
    write_text(out / "index.html", "\n".join(lines) + "\n")
