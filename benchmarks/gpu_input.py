"""The input part of `gpu.py`: how fast workers load JPEG files, and how long steps wait for them. Each function is a row."""

from __future__ import annotations

import contextlib
import io
import time
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_models import LEVERS, pair_of, run_of
from PIL import Image

from scalekd.data.batches import Images, train_batches, training_images
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.split import open_split
from scalekd.train.engine import looks_at_every_step, train_step

WIDTH, HEIGHT = 500, 375  # of most images of ImageNet-1K
DRAWN = 32  # different images, under as many names as needed
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES: dict[str, dict[str, Any]] = {
    "crop, flip": {},
    "crop, flip, RandAugment, erase": {"auto_augment": "rand-m9-mstd0.5", "erase": 0.25},
}


@lru_cache(maxsize=1)
def _photos(count: int) -> TemporaryDirectory[str]:
    """Two classes of JPEG files with detail at all scales, about 100 kB each like those of ImageNet-1K.

    train/ has `count` of them, val/ two others.
    """
    folder = TemporaryDirectory()
    generator = torch.Generator().manual_seed(0)
    drawn = min(count, DRAWN)
    files = [_photo(generator) for _ in range(drawn + 2)]
    names = [f"train/class-{i % 2}/{i:06}.jpg" for i in range(count)] + [f"val/class-{i}/0.jpg" for i in range(2)]
    for i, name in enumerate(names):
        path = Path(folder.name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[i % drawn if i < count else drawn + i - count])
    return folder


def _photo(generator: torch.Generator) -> bytes:
    image = torch.zeros(3, HEIGHT, WIDTH)
    for cells in (3, 12, 48, 192):  # each octave of noise has the amplitude of its wavelength, as in photos
        noise = torch.rand(1, 3, cells * 3 // 4, cells, generator=generator) - 0.5
        image += torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")[0] * 3 / cells**0.35
    pixels = ((image / image.std() * 50 + 120).clamp(0, 255)).to(torch.uint8).permute(1, 2, 0).contiguous()
    encoded = io.BytesIO()
    Image.frombytes("RGB", (WIDTH, HEIGHT), pixels.numpy().tobytes()).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def _images(count: int, recipe: str, size: int) -> Images:
    folder = Path(_photos(count).name)
    data = Data(train=str(folder / "train"), val=str(folder / "val"), image_size=size)
    split = open_split(data)
    return training_images(split, data, Augment(**RECIPES[recipe]), MEAN, STD, seed=0)


def loading(device: str, recipe: str, workers: int, count: int, batch: int, seconds: float) -> dict[str, Any]:
    """Images per second of `workers` processes, after the batches that they load ahead."""
    images = _images(count, recipe, 224)
    sampler = TrainSampler(len(images), batch, seed=0, total_steps=10**6)
    pin = torch.device(device).type == "cuda"
    with contextlib.closing(train_batches(images, sampler, workers, pin)) as batches:
        for _ in range(2 * workers + 1):
            next(batches)
        began, loaded = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            loaded += len(next(batches).images)
        rate = loaded / (time.perf_counter() - began)
    kb = sum(path.stat().st_size for path in Path(_photos(count).name, "train").rglob("*.jpg")) / count / 1000
    return {"images_per_s": rate, "per_worker": rate / max(1, workers), "file_kb": kb}


def waiting(
    device: str, pair: str, form: str, batch: int, levers: str, recipe: str, workers: int, count: int, seconds: float
) -> dict[str, Any]:
    """Steps on loaded images: images per second, and the share of the time in which the step waits for a batch."""
    chosen = torch.device(device)
    run = run_of(pair, form, batch, LEVERS[levers], chosen)
    images, checked = _images(count, recipe, pair_of(pair).size), looks_at_every_step(run)
    sampler = TrainSampler(len(images), batch, seed=0, total_steps=10**6)
    waited, done = 0.0, 0
    with contextlib.closing(train_batches(images, sampler, workers, chosen.type == "cuda")) as batches:
        for _ in range(2 * workers + 3):
            train_step(run.distiller.train(), [next(batches)], run, 0, checked)
        _wait(chosen)
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            made = next(batches)
            waited += time.perf_counter() - now
            train_step(run.distiller, [made], run, 0, checked)
            if chosen.type == "cuda":
                torch.cuda.current_stream(chosen).synchronize()  # so that waiting is not hidden in a queue of steps
            done += batch
        _wait(chosen)
        whole = time.perf_counter() - began
    return {"images_per_s": done / whole, "waits": waited / whole}


def _wait(chosen: torch.device) -> None:
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)
