"""Measures training images per second, from JPEG files to uint8 batches, against timm's loader with the same transforms.

    python benchmarks/loader.py --out docs/results/performance
    python benchmarks/loader.py --workers 16 --images 4096 --out docs/results/performance     # in wall-clock time

Both read the same files, take a random crop of each, flip it, and apply RandAugment where named. timm's loader is
`create_loader` with its prefetcher, up to the batch that the prefetcher would normalise, as scalekd too normalises for
each model on its device. The files are scenes of Fashion-MNIST items, saved as JPEG of about the size of a photo.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from harness import about, in_turns, median_text, parser, prepare, quartiles, ratio, table, write
from PIL import Image
from timm.data import create_dataset, create_loader

from scalekd.data.batches import train_batches, training_images
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.split import open_split
from scalekd.transfer.synthetic_scenes import main as make_scenes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS, SIZE = 400, 224
RECIPES: dict[str, dict[str, Any]] = {
    "crop, flip": {},
    "crop, flip, RandAugment": {"auto_augment": "rand-m7-mstd0.5"},
}


def photos(folder: Path, count: int) -> None:
    """Two classes of JPEG files: a few hundred scenes, repeated as often as needed."""
    scenes = folder.parent / "scenes"
    drawn = min(count, 256)
    options = ["--train", str(drawn), "--val", "1", "--size", str(PIXELS), "--background", "textured", "--rgb"]
    make_scenes([str(scenes), *options])
    pictures = [Image.open(path).convert("RGB") for path in sorted((scenes / "images/training").iterdir())]
    for i in range(count):
        path = folder / f"class-{i % 2}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[i % drawn].save(path, quality=90)


def of_scalekd(folder: Path, augment: Augment, batch: int, workers: int) -> Callable[[], int]:
    data = Data(train=str(folder), image_size=SIZE, val_fraction=1e-3)
    split = open_split(data)
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


def measure(count: int, batch: int, workers: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "photos"
        photos(folder, count)
        for recipe, options in RECIPES.items():
            augment = Augment(**options)
            epochs = {
                "scalekd": of_scalekd(folder, augment, batch, workers),
                "timm": of_timm(folder, augment, batch, workers),
            }
            loaded = {name: epoch() for name, epoch in epochs.items()}
            assert set(loaded.values()) == {count // batch * batch}, loaded
            seconds = in_turns(epochs, torch.device("cpu"), rounds)
            found[recipe] = {
                "images a second": {
                    name: quartiles([loaded[name] / s for s in values]) for name, values in seconds.items()
                },
                "scalekd / timm": ratio(seconds["timm"], seconds["scalekd"]),
            }
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
    found |= {"rounds": args.rounds, "recipes": measure(args.images, args.batch, args.workers, args.rounds)}
    rows = [
        [
            recipe,
            *(median_text(v["images a second"][loader], 0) for loader in ("scalekd", "timm")),
            median_text(v["scalekd / timm"]),
        ]
        for recipe, v in found["recipes"].items()
    ]
    clock = "of the clock" if args.workers else "of the processor"
    lines = [
        f"JPEG files of {PIXELS}x{PIXELS} pixels to uint8 batches of {args.batch} at {SIZE}, {args.workers} workers",
        "",
        *table(["augmentation", "scalekd images/s", "timm images/s", "scalekd / timm"], rows),
        "",
        f"{found['machine']}; timm {timm.__version__}; {args.rounds} rounds of {args.images} images; seconds {clock}; "
        "medians (quartiles).",
    ]
    write(args.out, "loader", found, lines)


if __name__ == "__main__":
    main()
