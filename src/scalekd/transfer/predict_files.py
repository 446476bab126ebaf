"""Images to predict on, and the folder that what was predicted goes to."""

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


class Images:
    """The images of `source`, a folder with its sub-folders or one file, and where each one's outputs go below `out`.

    `names`: relative to the folder, sorted. `outputs`: the same with .png in place of the extension; or, if two would
    then be one, .png behind it in all of them. Makes `out`. Raises `UserError`.
    """

    def __init__(self, source: Path, out: Path, console: Console):
        self.folder = source if source.is_dir() else source.parent
        self.names = _names(source)
        self.outputs = output_names(self.names)
        self.out, self.console = out, console
        self.bad: dict[str, str] = {}  # name: reason
        _open_out(out, source)

    def read(self, place: int) -> Image.Image | None:
        """The image, upright, of mode L or RGB; None for one that cannot be read, which is then told and listed."""
        try:
            return decode(read_file(str(self.folder / self.names[place])))
        except BadImage as error:
            self.leave_out(place, str(error))
            return None

    def leave_out(self, place: int, reason: str) -> None:
        name, reason = printable(self.names[place]), printable(reason)
        self.bad[name] = reason
        self.console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Lists those that were left out. Raises `UserError` if no image is left."""
        if self.bad:
            write_text(self.out / BAD, "".join(f"{name}\t{reason}\n" for name, reason in self.bad.items()))
        if len(self.bad) == len(self.names):
            name, reason = next(iter(self.bad.items()))
            raise UserError(
                f"{counted(len(self.names), 'image')}, none of which can be used; the first: {name}: {reason}"
            )
        if self.bad:
            told = f"{len(self.bad)} of {len(self.names)} images were left out; {self.out / BAD} lists them"
            self.console.print(told, markup=False, highlight=False, soft_wrap=True)


def _names(source: Path) -> list[str]:
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        beside = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"no image or folder {source}.{printable(nearest(source.name, beside)) if beside else ''}")
    names = [Path(file).relative_to(source).as_posix() for file in images_below(source)]
    if not names:
        raise UserError(f"{source} holds no images, nor do the folders in it")
    return names


def output_names(names: Sequence[str]) -> list[str]:
    """a.jpg to a.png; if there is an a.png or a.jpeg too, a.jpg.png and so for all, so that none takes another's."""
    short = [Path(name).with_suffix(".png").as_posix() for name in names]
    return short if len(set(short)) == len(short) else [f"{name}.png" for name in names]


def _open_out(out: Path, source: Path) -> None:
    """A new or empty folder, and not one whose pictures would be predicted on next time."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{out} is in {source}, so the next time its pictures would be images; give --out another folder"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give --out a new folder, or remove this one")
    make_folder(out)
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out}: no permission. Give --out a folder that you may write to.")


def save_png(image: Image.Image, file: Path) -> None:
    make_folder(file.parent)
    with replacing(file) as opened:
        image.save(opened, "png")


def write_index(
    out: Path, images: Images, rows: Sequence[tuple[int, str]], title: str, values: Mapping[str, int]
) -> None:
    """index.html: all pictures on a page. rows: place of an image, and what is written below it. values: class names
    with their values in masks, for a legend."""
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
    for place, told in rows:
        link = "pictures/" + quote(os.fsencode(images.outputs[place]))
        caption = html.escape(printable(images.names[place]) + (f": {told}" if told else ""))
        lines.append(
            f"<figure><a href='{link}'><img loading=lazy src='{link}' alt=''></a><figcaption>{caption}</figcaption></figure>"
        )
    if images.bad:
        lines.append(f"<p>Left out: {html.escape(', '.join(images.bad))} (<a href='{BAD}'>why</a>)</p>")
    write_text(out / "index.html", "\n".join(lines) + "\n")
