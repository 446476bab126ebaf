"""Pooled features of a frozen model, computed once and cached on disk, for `scalekd head` and `scalekd probe`."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import make_folder, replacing
from scalekd.common.seeds import seed_from
from scalekd.common.text import counted, duration, printable, say, shortened
from scalekd.data.batches import Images, eval_batches
from scalekd.data.images import BadImages
from scalekd.data.options import Augment, Data
from scalekd.data.sources.source import Source
from scalekd.data.split import by_class
from scalekd.data.targets import as_tensor, classes_in
from scalekd.data.transforms import eval_transform
from scalekd.models.build import timm_model
from scalekd.models.features import pooled
from scalekd.models.inputs import default_statistics, interpolation, per_channel, scaled, sensible_crop, usual_size
from scalekd.models.student_file import load_student
from scalekd.models.weights.match import sha256_of
from scalekd.models.weights.trained import backbone_sha256

FEATURES = Path("runs/features")
CHUNK = 512  # images per cache file
BATCH = 64  # divides CHUNK
WORKERS = 8  # processes that read images, with a GPU; on a CPU the model is the bottleneck
PROGRESS_EVERY = 15.0  # seconds


class Backbone:
    """A frozen model with its preprocessing.

    card: model, kwargs, weights (their source), sha256, channels, image_size, mean, std, interpolation and crop_pct.
        The cache is keyed by all of these except `weights`.
    doubts: warnings about the model, for the user.
    """

    def __init__(self, model: nn.Module, card: dict[str, Any], device: torch.device, doubts: Sequence[str] = ()):
        self.doubts = doubts
        self.model = model.to(device).eval().requires_grad_(False)
        self.card, self.device = card, device
        self.size: tuple[int, int] = (card["image_size"][0], card["image_size"][1])
        self.mean, self.std = (per_channel(card[k]).to(device) for k in ("mean", "std"))
        shown = {"image_size": self.size, "channels": card["channels"]}
        augment = Augment.model_validate({k: card[k] for k in ("interpolation", "crop_pct")})
        self.transform = eval_transform(Data.model_validate({"train": "any"} | shown), augment)

    @torch.inference_mode()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to features (B, D), float32, on the CPU: the input of the model's own classifier."""
        return pooled(self.model, self.normalised(images)).float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to the model's input, on its device."""
        return (scaled(images.to(self.device)) - self.mean) / self.std


# ---------------------------------------------------------------- models by name


def named_backbone(text: str, image_size: tuple[int, int] | None, device: torch.device) -> Backbone:
    """The backbone that `text` names: an exported student, a timm name for timm's pre-trained weights, or NAME=FILE.

    A student is named by its run's folder or its weights file, and uses the preprocessing of its card.

    image_size: (height, width) for models given by name; timm's default if None. Raises `UserError`, also for untrained
    weights and for a size that the model does not accept.
    """
    name, equals, file = text.partition("=")
    student = not equals and Path(text).exists()
    size = image_size or usual_size(name)
    try:
        backbone = _student(Path(text), device) if student else _of_timm(name, file, size, device)
        size = backbone.size
        backbone.pooled(torch.zeros(1, backbone.card["channels"], *size, dtype=torch.uint8))
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(text) else f"{shortened(text)}: {message}") from None
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # timm models raise anything on a size they do not accept
        usual = "x".join(map(str, usual_size(name)))
        remedy = (
            "Export it again." if student else f"Choose another `image_size`; timm's default for {name} is {usual}."
        )
        message = f"{text} does not accept images of {size[0]}x{size[1]} pixels: {shortened(first_line(error))}"
        raise UserError(f"{message}\n{remedy}") from None
    return backbone


def _student(path: Path, device: torch.device) -> Backbone:
    model, exported = load_student(path)
    card = {k: exported[k] for k in ("model", "kwargs", "image_size", "mean", "std", "interpolation", "crop_pct")}
    sha256 = sha256_of(path / "student.safetensors" if path.is_dir() else path)
    return Backbone(model, card | {"weights": str(path), "sha256": sha256, "channels": len(exported["mean"])}, device)


def _of_timm(name: str, file: str, size: tuple[int, int], device: torch.device) -> Backbone:
    model, loaded, verdict = timm_model(
        name, file or "pretrained", size, f"To use weights in a file, write {name}=FILE"
    )
    mean, std = default_statistics(model)
    card = {
        "model": name,
        "kwargs": {},
        "weights": loaded.source,
        "sha256": backbone_sha256(model, loaded),
        "channels": 3,
        "image_size": list(size),
        "mean": list(mean),
        "std": list(std),
        "interpolation": interpolation(model),
        "crop_pct": sensible_crop(resolve_model_data_config(model)["crop_pct"]),
    }
    return Backbone(model, card, device, [verdict.text] if verdict.meaning else [])


# ---------------------------------------------------------------- cached features


def features(
    backbone: Backbone,
    source: Source,
    indices: Sequence[int],
    name: str,
    cache: Path,
    console: Console,
    bad: BadImages | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, D), float32, and targets of these images, in this order: classes (N,), or sets of classes (N, C).

    Features that are not in `cache` are computed.

    name: the user's name of the source. bad: records images that cannot be read, which are left out. Raises `UserError`
    for such an image without `bad`, for more of them than it allows, and for features that are not finite.
    """
    folder = cache_folder(backbone, source, name, cache, bad)
    known = _known_features(folder)
    missing = sorted(set(indices) - known.keys())
    say(console, f"{name}: features of {counted(len(indices), 'image')}, {len(indices) - len(missing)} from {folder}")
    began = shown = time.perf_counter()
    done = 0
    workers = WORKERS if backbone.device.type == "cuda" and len(missing) > CHUNK else 0
    images = Images(source, missing, backbone.transform, None, bad)
    targets = source.targets
    images.alive |= {label for i in known for label in classes_in(targets[i])}  # their classes have readable images
    batches = eval_batches(images, BATCH, workers, False)
    left_to_do = iter(missing)
    while first := next(batches, None):
        chunk, parts = [], []
        for batch in itertools.chain([first], itertools.islice(batches, CHUNK // BATCH - 1)):
            chunk += _next_readable(left_to_do, len(batch.images), source, bad)
            parts.append(backbone.pooled(batch.images))
            done += len(batch.images)
            if time.perf_counter() - shown > PROGRESS_EVERY:
                shown = time.perf_counter()
                left = (shown - began) / done * (len(missing) - done)
                say(console, f"  {done} of {len(missing)}, about {duration(left)} left")
        part = torch.cat(parts)
        if not part.isfinite().all():
            raise UserError(f"{backbone.card['model']}: some features are not finite; check its weights, mean and std")
        _keep(folder / f"{seed_from(*chunk):016x}.safetensors", chunk, part)
        known |= dict(zip(chunk, part))
    if bad and bad.found:
        said = f"{name}: {counted(len(bad.found), 'unreadable image')} left out, such as {next(iter(bad.found))}"
        say(console, said)
    readable = [i for i in indices if i in known]
    found = as_tensor([targets[i] for i in readable], len(source.classes))
    return torch.stack([known[i] for i in readable]), found


def _next_readable(indices: Iterator[int], count: int, source: Source, bad: BadImages | None) -> list[int]:
    """The next indices whose images are in a batch: the others were found bad when it was read."""
    readable = (i for i in indices if bad is None or printable(source.where(i)) not in bad.found)
    return list(itertools.islice(readable, count))


def _known_features(folder: Path) -> dict[int, Tensor]:
    """Cached features (D,) by image index."""
    known: dict[int, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        try:
            part = load_file(file)
            known |= dict(zip(part["indices"].tolist(), part["features"]))
        except (SafetensorError, OSError, KeyError):  # damaged or another file: its images are computed again
            continue
    return known


def _keep(file: Path, indices: Sequence[int], part: Tensor) -> None:
    make_folder(file.parent)
    with replacing(file) as opened:
        opened.write(save({"indices": torch.tensor(indices), "features": part.contiguous()}))


def cache_folder(backbone: Backbone, source: Source, name: str, cache: Path, bad: BadImages | None = None) -> Path:
    """The cache folder of a model and a source.

    It differs if the weights, the preprocessing or the images differ: names, labels, sizes and times of change of the
    files, and the pixels of 16 images. Reading all pixels would take almost as long as running a small model.
    """
    card = {k: v for k, v in backbone.card.items() if k != "weights"}  # a copy of the weights file counts as the same
    summed = hashlib.sha256(json.dumps([card, name, timm.__version__], sort_keys=True, default=str).encode())
    for i, target in enumerate(source.targets):
        summed.update(f"{source.where(i)} {target}\n".encode())
    for stamp in source.stamps():
        summed.update(f"{stamp}\n".encode())
    sample = range(0, len(source), max(1, len(source) // 16))[:16]
    images = Images(source, sample, backbone.transform, None, bad)
    images.alive |= {
        label for target in source.targets for label in classes_in(target)
    }  # the sample says nothing about a class
    for batch in eval_batches(images, 16, 0, False):
        summed.update(batch.images.numpy().tobytes())
    return cache / summed.hexdigest()[:24]


def some(source: Source, indices: Sequence[int], limit: int | None, seed: int) -> Sequence[int]:
    """`limit` of the indices, balanced over the classes and chosen by `seed`; all if `limit` is None."""
    targets = source.targets
    order = by_class([targets[i] for i in indices], seed)
    return sorted(indices[i] for i in order[:limit])
