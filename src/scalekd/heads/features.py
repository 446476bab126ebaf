"""A frozen model's pooled features of images, computed once and kept on disk: for `scalekd head` and `scalekd probe`."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
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
from scalekd.common.text import counted, duration, say, shortened
from scalekd.data.batches import Images, eval_batches
from scalekd.data.options import Augment, Data
from scalekd.data.sources.source import Source
from scalekd.data.split import by_class
from scalekd.data.transforms import eval_transform
from scalekd.models.build import timm_model
from scalekd.models.export import load_student
from scalekd.models.inputs import default_statistics, interpolation, sensible_crop, usual_size
from scalekd.models.weights.match import sha256_of
from scalekd.models.weights.trained import backbone_sha256

FEATURES = Path("runs/features")
CHUNK = 512  # images whose features are written to the cache at a time
BATCH = 64  # divides CHUNK
WORKERS = 8  # processes that read images for a GPU; a CPU is busier with the model than with them
TELL_EVERY = 15.0  # seconds


class Backbone:
    """A frozen model and what it is shown.

    card: model, kwargs, weights (where they are from), sha256, channels, image_size, mean, std, interpolation and
    crop_pct. But for `weights`, features are kept under all of it. doubts: what a person should be told of it.
    """

    def __init__(self, model: nn.Module, card: dict[str, Any], device: torch.device, doubts: Sequence[str] = ()):
        self.doubts = doubts
        self.model = model.to(device).eval().requires_grad_(False)
        self.card, self.device = card, device
        self.size: tuple[int, int] = (card["image_size"][0], card["image_size"][1])
        self.mean, self.std = (torch.tensor(card[k], device=device).view(1, -1, 1, 1) for k in ("mean", "std"))
        shown = {"image_size": self.size, "channels": card["channels"]}
        augment = Augment.model_validate({k: card[k] for k in ("interpolation", "crop_pct")})
        self.transform = eval_transform(Data.model_validate({"train": "any"} | shown), augment)

    @torch.inference_mode()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to (B, D) float32 on the CPU: what the model's own classifier would be given."""
        return pooled(self.model, self.normalised(images)).float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        return (images.to(self.device).float() / 255 - self.mean) / self.std


def pooled(model: Any, images: Tensor) -> Tensor:
    """(B, D): timm's `forward_head(..., pre_logits=True)`, with the model's own pooling and norm. Raises `UserError`."""
    x = model.forward_head(model.forward_features(images), pre_logits=True)
    if isinstance(x, Tensor) and x.ndim == 4 and x.shape[-2:] == (1, 1):
        x = x.flatten(1)  # the classifier is a 1x1 convolution
    if not isinstance(x, Tensor) or x.ndim != 2:
        raise UserError(
            f"{type(model).__name__} does not pool into one vector per image: a linear head does not fit it"
        )
    return x


# ---------------------------------------------------------------- models, by what a command line names


def named_backbone(text: str, image_size: tuple[int, int] | None, device: torch.device) -> Backbone:
    """An exported student (a run's folder or its file), a timm name with timm's own weights, or NAME=FILE.

    image_size: (height, width) for models given by name; timm's own without it. A student sees what its card says.
    Raises `UserError`, also for weights that were never trained and for a size that the model does not take.
    """
    name, equals, file = text.partition("=")
    student = not equals and Path(text).exists()
    size = image_size or usual_size(name)
    try:
        backbone = _student(Path(text), device) if student else _of_timm(name, file, size, device)
        size = backbone.size
        backbone.pooled(torch.zeros(1, backbone.card["channels"], *size, dtype=torch.uint8))
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(text) else f"{shortened(text)}: {told}") from None
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever timm or a model ends with on a size that it was not made for
        usual = "x".join(map(str, usual_size(name)))
        remedy = "Export it anew." if student else f"Give another --image-size; timm's own for {name} is {usual}."
        told = f"{text} does not take images of {size[0]}x{size[1]} pixels: {shortened(first_line(error))}"
        raise UserError(f"{told}\n{remedy}") from None
    return backbone


def _student(path: Path, device: torch.device) -> Backbone:
    model, known = load_student(path)
    card = {k: known[k] for k in ("model", "kwargs", "image_size", "mean", "std", "interpolation", "crop_pct")}
    sha256 = sha256_of(path / "student.safetensors" if path.is_dir() else path)
    return Backbone(model, card | {"weights": str(path), "sha256": sha256, "channels": len(known["mean"])}, device)


def _of_timm(name: str, file: str, size: tuple[int, int], device: torch.device) -> Backbone:
    model, loaded, found = timm_model(name, file or "pretrained", size, f"Weights in a file: {name}=FILE")
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
    return Backbone(model, card, device, [found.told] if found.meaning else [])


# ---------------------------------------------------------------- features, computed once


def features(
    backbone: Backbone, source: Source, indices: Sequence[int], name: str, cache: Path, console: Console
) -> tuple[Tensor, Tensor]:
    """((N, D) float32, (N,) targets) of these images, in their order; read from `cache` as far as they are there.

    name: what the person called the source. Raises `UserError` for an image that cannot be read, and for features
    that are not finite.
    """
    folder = cache_folder(backbone, source, name, cache)
    known = _known_features(folder)
    missing = sorted(set(indices) - known.keys())
    say(console, f"{name}: features of {counted(len(indices), 'image')}, {len(indices) - len(missing)} from {folder}")
    began = told = time.perf_counter()
    done = 0
    workers = WORKERS if backbone.device.type == "cuda" and len(missing) > CHUNK else 0
    batches = eval_batches(Images(source, missing, backbone.transform, None), BATCH, workers, False)
    for first in range(0, len(missing), CHUNK):
        chunk = missing[first : first + CHUNK]
        found = []
        for batch in itertools.islice(batches, CHUNK // BATCH):
            found.append(backbone.pooled(batch.images))
            done += len(batch.images)
            if time.perf_counter() - told > TELL_EVERY:
                told = time.perf_counter()
                left = (told - began) / done * (len(missing) - done)
                say(console, f"  {done} of {len(missing)}, about {duration(left)} left")
        part = torch.cat(found)
        if not part.isfinite().all():
            raise UserError(f"{backbone.card['model']}: its features are not finite; look at its weights, mean and std")
        _keep(folder / f"{seed_from(*chunk):016x}.safetensors", chunk, part)
        known |= dict(zip(chunk, part))
    targets = source.targets
    return torch.stack([known[i] for i in indices]), torch.tensor([targets[i] for i in indices])


def _known_features(folder: Path) -> dict[int, Tensor]:
    """Features (D,) by image, of what was kept in `folder`."""
    known: dict[int, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        try:
            part = load_file(file)
            known |= dict(zip(part["indices"].tolist(), part["features"]))
        except (SafetensorError, OSError, KeyError):  # cut off, or of something else: its images are computed again
            continue
    return known


def _keep(file: Path, indices: Sequence[int], part: Tensor) -> None:
    make_folder(file.parent)
    with replacing(file) as opened:
        opened.write(save({"indices": torch.tensor(indices), "features": part.contiguous()}))


def cache_folder(backbone: Backbone, source: Source, name: str, cache: Path) -> Path:
    """Differs where the weights, the preprocessing or the images differ: names, labels and the pixels of a sample.

    Pixels of all images would cost nearly what a small model costs.
    """
    told = {
        k: v for k, v in backbone.card.items() if k != "weights"
    }  # a copy of the file under another name is as good
    summed = hashlib.sha256(json.dumps([told, name, timm.__version__], sort_keys=True, default=str).encode())
    for i, target in enumerate(source.targets):
        summed.update(f"{source.where(i)} {target}\n".encode())
    sample = range(0, len(source), max(1, len(source) // 16))[:16]
    for batch in eval_batches(Images(source, sample, backbone.transform, None), 16, 0, False):
        summed.update(batch.images.numpy().tobytes())
    return cache / summed.hexdigest()[:24]


# ---------------------------------------------------------------- small things


def some(source: Source, indices: Sequence[int], limit: int | None, seed: int) -> Sequence[int]:
    """`limit` of the indices, the same number per class, chosen by `seed`; all without one."""
    targets = source.targets
    order = by_class([targets[i] for i in indices], seed)
    return sorted(indices[i] for i in order[:limit])
