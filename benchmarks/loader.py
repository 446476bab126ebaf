"""Measures training images per second, from JPEG files to uint8 batches, against timm's loader with the same transforms.

    python benchmarks/loader.py --out docs/results/performance
    python benchmarks/loader.py --workers 16 --images 4096 --out docs/results/performance     # in wall-clock time

All read the same files, take a random crop of each, flip it, and apply RandAugment where named. timm's loader is
`create_loader` with its prefetcher, up to the batch that the prefetcher would normalise, as scalekd too normalises for
each model on its device. scalekd runs with both values of `data.decoder`. The files are drawn (photos.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write
from photos import KINDS, photo
from timm.data import create_dataset, create_loader

from scalekd.data.batches import train_batches, training_images
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.split import open_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
DRAWN = 64  # different photos; more files repeat them
RECIPES: dict[str, dict[str, Any]] = {
    "crop, flip": {},
    "crop, flip, RandAugment": {"auto_augment": "rand-m7-mstd0.5"},
}
CASES = [("crop, flip", kind) for kind in KINDS] + [("crop, flip, RandAugment", "500x375")]


def photos(folder: Path, kind: str, count: int) -> float:
    """Writes two classes of JPEG files. Returns their mean size in kB."""
    drawn = [photo(kind, i) for i in range(min(count, DRAWN))]
    for i in range(count):
        path = folder / f"class-{i % 2}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[i % len(drawn)])
    return sum(map(len, drawn)) / len(drawn) / 1000


def of_scalekd(folder: Path, augment: Augment, batch: int, workers: int, decoder: str) -> Callable[[], int]:
    data = Data.model_validate({"train": str(folder), "image_size": SIZE, "val_fraction": 1e-3, "decoder": decoder})
    split = open_split(data, strict=False)  # drawn photos repeat, also in validation
    split = split._replace(train_indices=range(len(split.train)), labelled=len(split.train))
    images = training_images(split, data, augment, MEAN, STD, seed=0)

    def epoch() -> int:
        sampler = TrainSampler(len(images), batch, seed=0, total_steps=len(images) // batch)
        return sum(len(b.images) for b in train_batches(images, sampler, workers, pin=False))

    return epoch


def of_timm(folder: Path, augment: Augment, batch: int, workers: int) -> Callable[[], int]:
    def epoch() -> int:
        loader = create_loader(
            create_dataset("", root=str(folder), is_training=True, batch_size=batch),
            input_size=(3, SIZE, SIZE),
            batch_size=batch,
            is_training=True,
            use_prefetcher=True,
            scale=augment.scale,
            hflip=augment.flip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=MEAN,
            std=STD,
            num_workers=workers,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        return sum(len(images) for images, _ in loader.loader)

    return epoch


def measure(count: int, batch: int, workers: int, rounds: int) -> list[dict[str, Any]]:
    found = []
    for recipe, kind in CASES:
        augment = Augment(**RECIPES[recipe])
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "photos"
            size = photos(folder, kind, count)
            epochs = {
                "timm": of_timm(folder, augment, batch, workers),
                "pillow": of_scalekd(folder, augment, batch, workers, "pillow"),
                "simplejpeg": of_scalekd(folder, augment, batch, workers, "simplejpeg"),
            }
            assert {epoch() for epoch in epochs.values()} == {count // batch * batch}
            seconds = in_turns(epochs, torch.device("cpu"), rounds)
        a_second = {name: quartiles([count // batch * batch / s for s in values]) for name, values in seconds.items()}
        ratios = {name: ratio(seconds["timm"], seconds[name]) for name in ("pillow", "simplejpeg")}
        found.append({"recipe": recipe, "photos": kind, "kB": size, "images a second": a_second, "of timm's": ratios})
    return found


def main() -> None:
    args_parser = parser(__doc__, rounds=7)
    args_parser.add_argument("--images", type=int, default=128)
    args_parser.add_argument("--batch", type=int, default=32)
    args_parser.add_argument(
        "--workers", type=int, default=0, help="worker processes; 0: load in this one and measure CPU time"
    )
    args = args_parser.parse_args()
    if args.workers:
        args.threads = max(args.threads, 2)  # makes the harness use wall-clock time
    device = prepare(args)
    found = about(device) | {"images": args.images, "batch": args.batch, "workers": args.workers}
    found |= {"rounds": args.rounds, "cases": measure(args.images, args.batch, args.workers, args.rounds)}
    rows = [
        [
            f"{case['photos']}, {case['kB']:.0f} kB; {case['recipe']}",
            *(median_text(case["images a second"][name], 0) for name in ("timm", "pillow", "simplejpeg")),
            *(median_text(case["of timm's"][name]) for name in ("pillow", "simplejpeg")),
        ]
        for case in found["cases"]
    ]
    clock = "of the clock" if args.workers else "of the processor"
    columns = ["files; augmentation", "timm images/s", "pillow images/s", "simplejpeg images/s", "pillow / timm"]
    lines = [
        f"JPEG files to uint8 batches of {args.batch} at {SIZE} pixels, {args.workers} workers; by `data.decoder`",
        "",
        *table([*columns, "simplejpeg / timm"], rows),
        "",
        f"{found['machine']}; timm {timm.__version__}; {args.rounds} rounds of {args.images} images; seconds {clock}; "
        "medians (quartiles).",
    ]
    write(args.out, "loader", found, lines)


if __name__ == "__main__":
    main()
