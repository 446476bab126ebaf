"""Creates scenes of several overlapping items with exact boxes and masks, in COCO's and ADE20K's formats at once.

    python -m scalekd.transfer.scenes scenes --train 800 --val 200
    python -m scalekd.transfer.scenes scenes --train-items idx:/data/fashion-mnist/train \\
        --val-items idx:/data/fashion-mnist/t10k --background textured --rgb

The items are images of a source whose background is black, such as Fashion-MNIST. One folder serves both formats:

    images/training/000000.png        annotations/training/000000.png      ADE20K: 0 is "other", class c is c + 1
    images/validation/000000.png      annotations/validation/000000.png
    instances_train.json              classes.txt                          one name per line, without "other"
    instances_val.json                classes-with-background.txt          the same after "background"
    scenes.json                                                            the options used

In the COCO files `file_name` is relative to images/, category ids start at 1, masks are uncompressed RLE (polygons
would not be exact and cannot have holes), and `item` is the item's index in its source.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from scalekd.common.errors import UserError
from scalekd.common.files import cannot_write, make_folder, write_text
from scalekd.common.seeds import seed_from
from scalekd.data.sources.open import open_source
from scalekd.data.sources.source import Source
from scalekd.data.targets import classes_in

Grey = NDArray[np.float32]  # (H, W), 0 to 255
Mask = NDArray[np.bool_]  # (H, W)

BLACK = 12  # pixels of an item are brighter; darker ones are scanning noise of the background
SPECK = 4  # pixels: smaller pieces of an item are noise and would enlarge its box
VISIBLE = 0.3  # at least this share of every item stays visible
TRIES = 20  # positions tried for an item before it is skipped


@dataclass(frozen=True)
class Options:
    """Properties of the scenes."""

    size: int = 128  # height and width of a scene in pixels
    items: tuple[int, int] = (2, 6)  # fewest and most items on a scene
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)  # factors of an item's size, drawn with equal probability
    background: str = "plain"  # one shade per scene; or textured
    rgb: bool = False  # random colours of items and backgrounds; else grey
    seed: int = 0


@dataclass
class Item:
    index: int  # in its source
    target: int  # class, from 0
    visible: Mask  # pixels that no later item covers
    pixels: int  # including covered ones


def make_scenes(
    out: Path, train_items: str, val_items: str, train: int, val: int, options: Options | None = None
) -> dict[str, int]:
    """Writes `train` and `val` scenes into the new folder `out`; returns the number of items by part.

    train_items, val_items: sources as for `open_source`. They must be two different sources, so that no training item
    occurs in validation.
    The files depend only on the sources' images and the options. Raises `UserError`.
    """
    options = options or Options()
    _check(options, train, val)
    if train_items == val_items:
        raise UserError(f"both parts would use the items of {train_items}; choose another source for one of them")
    sources = {"train": open_source(train_items, "train items"), "val": open_source(val_items, "val items")}
    classes = list(sources["train"].classes)
    if list(sources["val"].classes) != classes:
        raise UserError(
            f"{train_items} has the classes {classes}, {val_items} has {list(sources['val'].classes)}; they must be equal"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose a new folder, or remove it")
    counts = {}
    for part, long, number in (("train", "training", train), ("val", "validation", val)):
        coco = _write_part(out, sources[part], part, long, number, options)
        coco["categories"] = [{"id": c + 1, "name": name} for c, name in enumerate(classes)]
        write_text(out / f"instances_{part}.json", json.dumps(coco) + "\n")
        counts[part] = len(coco["annotations"])
    write_text(out / "classes.txt", "".join(f"{name}\n" for name in classes))
    write_text(out / "classes-with-background.txt", "".join(f"{name}\n" for name in ["background", *classes]))
    write_text(out / "scenes.json", json.dumps(asdict(options) | {"train": train, "val": val}, indent=2) + "\n")
    return counts


def _check(options: Options, train: int, val: int) -> None:
    fewest, most = options.items
    if train < 1 or val < 1 or options.size < 8 or not 1 <= fewest <= most or not options.scales:
        raise UserError("scenes need at least 1 scene per part, 8 pixels, 1 item (fewest before most) and 1 scale")
    if min(options.scales) <= 0:
        raise UserError(f"scenes: scales must be above 0, not {min(options.scales)}")
    if options.background not in ("plain", "textured"):
        raise UserError(f"scenes: the background must be plain or textured, not {options.background}")


def _write_part(out: Path, source: Source, part: str, long: str, number: int, options: Options) -> dict[str, Any]:
    """Writes images and ADE20K masks of one part; returns its COCO dict without categories."""
    folders = [out / kind / long for kind in ("images", "annotations")]
    for folder in folders:
        make_folder(folder)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(number):
        picture, items = scene(source, options, np.random.default_rng(seed_from("scene", options.seed, part, i)))
        name = f"{i:06}.png"
        for folder, pixels in zip(folders, (picture, semantic(items, options.size))):
            try:
                Image.fromarray(pixels).save(folder / name)
            except OSError as error:
                raise cannot_write(folder / name, error) from None
        images.append({"id": i + 1, "file_name": f"{long}/{name}", "height": options.size, "width": options.size})
        annotations += [{"id": len(annotations) + k, "image_id": i + 1} | annotation(x) for k, x in enumerate(items, 1)]
    return {"images": images, "annotations": annotations}


# ---------------------------------------------------------------- one scene


def scene(source: Source, options: Options, random: np.random.Generator) -> tuple[NDArray[np.uint8], list[Item]]:
    """A picture, (H, W) or (H, W, 3), and its items from the bottom to the top, each at least partly visible."""
    picture = _background(options, random)
    items: list[Item] = []
    for _ in range(random.integers(options.items[0], options.items[1], endpoint=True)):
        index = int(random.integers(len(source)))
        image, target = source[index]
        grey, mask = _cut_out(image, float(random.choice(options.scales)), options.size)
        covered = _place(mask, items, options.size, random)
        if covered is None:
            continue
        for item in items:
            item.visible &= ~covered
        (label,) = classes_in(target)
        items.append(Item(index, label, covered, int(covered.sum())))
        colour = random.uniform(0.4, 1, 3) if options.rgb else np.ones(1)
        picture[covered] = grey[mask][:, None] * colour
    pixels = picture.round().clip(0, 255).astype(np.uint8)
    return (pixels if options.rgb else pixels[:, :, 0]), items


def _background(options: Options, random: np.random.Generator) -> NDArray[np.float64]:
    """(H, W, 1 or 3). Textured: clouds of two sizes around the shade, and noise."""
    size, channels = options.size, 3 if options.rgb else 1
    shade = random.uniform(30, 200, channels)
    if options.background == "plain":
        return np.broadcast_to(shade, (size, size, channels)).copy()
    clouds = np.zeros((size, size, channels))
    for cells, strength in ((4, 30), (16, 20)):
        for c in range(channels):
            coarse = Image.fromarray(random.normal(0, strength, (cells, cells)).astype(np.float32))
            clouds[:, :, c] += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return shade + clouds + random.normal(0, 5, clouds.shape)


def _cut_out(image: Image.Image, scale: float, most: int) -> tuple[Grey, Mask]:
    """An item at a scale, or smaller to fit into `most` pixels, cropped to its tight box."""
    grey = np.asarray(image.convert("L"), np.float32)
    mask = _without_specks(grey > BLACK)
    scale = min(scale, most / max(grey.shape))
    width, height = (max(2, round(side * scale)) for side in image.size)
    grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
    soft = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    mask = _without_specks(np.asarray(soft) > 0.5)
    if not mask.any():
        return grey, mask
    x, y, w, h = tight_box(mask)
    return grey[y : y + h, x : x + w], mask[y : y + h, x : x + w]


def _without_specks(mask: Mask) -> Mask:
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes[labels] >= SPECK


def _place(mask: Mask, items: list[Item], size: int, random: np.random.Generator) -> Mask | None:
    """The scene's pixels that an item covers at a random position where every other item stays visible; or None."""
    if not mask.any():
        return None
    h, w = mask.shape
    for _ in range(TRIES):
        y, x = random.integers(size - h, endpoint=True), random.integers(size - w, endpoint=True)
        covered = np.zeros((size, size), bool)
        covered[y : y + h, x : x + w] = mask
        if all((item.visible & ~covered).sum() >= VISIBLE * item.pixels for item in items):
            return covered
    return None


# ---------------------------------------------------------------- formats


def semantic(items: list[Item], size: int) -> NDArray[np.uint8]:
    """(H, W): 0 without an item, else the class of the visible item plus 1."""
    values = np.zeros((size, size), np.uint8)
    for item in items:
        values[item.visible] = item.target + 1
    return values


def annotation(item: Item) -> dict[str, Any]:
    """COCO's fields for the visible part of an item: `bbox` is [x, y, width, height], `area` in pixels."""
    return {
        "category_id": item.target + 1,
        "iscrowd": 0,
        "bbox": tight_box(item.visible),
        "area": int(item.visible.sum()),
        "segmentation": run_lengths(item.visible),
        "item": item.index,
    }


def tight_box(mask: Mask) -> list[int]:
    """[x, y, width, height] of the pixels that are set; at least one must be set."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]


def run_lengths(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: lengths of runs down the columns, starting with pixels that are not set."""
    values = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *edges, len(values)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if values[0] else counts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scalekd.transfer.scenes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--train-items", default="fashion-mnist:train", help="a data source (default: the embedded one)"
    )
    parser.add_argument("--val-items", default="fashion-mnist:test", help="another data source")
    parser.add_argument("--train", type=int, default=800, help="training scenes")
    parser.add_argument("--val", type=int, default=200, help="validation scenes")
    parser.add_argument("--size", type=int, default=Options.size, help="height and width of a scene in pixels")
    parser.add_argument("--items", type=int, nargs=2, default=Options.items, metavar=("FEWEST", "MOST"))
    parser.add_argument("--scales", type=float, nargs="+", default=Options.scales)
    parser.add_argument("--background", choices=("plain", "textured"), default=Options.background)
    parser.add_argument("--rgb", action="store_true", help="random colours instead of grey")
    parser.add_argument("--seed", type=int, default=Options.seed)
    args = parser.parse_args(argv)
    options = Options(args.size, tuple(args.items), tuple(args.scales), args.background, args.rgb, args.seed)
    try:
        counts = make_scenes(args.out, args.train_items, args.val_items, args.train, args.val, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out}: {counts['train']} items on {args.train} scenes, {counts['val']} on {args.val}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
