"""Measures the frequencies of models' last maps: `scalekd analyze frequency`, docs/how-to/analyze.md.

ScaleKD's Figures 2 and 5: "we first collect the output feature maps of 1600 samples, then conduct DCT on each channel,
and finally take the average value across these samples after converting all responses into absolute values". Here the
DCT is orthonormal: the squares of its coefficients add up to the squares of the map (its energy), so the direct component
(frequency zero) has a share of the energy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import timm
import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, write_text
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.text import shortened
from scalekd.data.batches import Images, eval_batches
from scalekd.data.options import Augment, Data
from scalekd.data.sources.open import evaluated_part, open_source
from scalekd.data.transforms import eval_transform
from scalekd.models.build import timm_model
from scalekd.models.inputs import (
    Statistics,
    default_statistics,
    interpolation,
    per_channel,
    resized,
    scaled,
    usual_size,
)
from scalekd.models.stages import StageView
from scalekd.models.student_file import load_student
from scalekd.train.hardware import workers_for

from .figures import COLOURS, MARKERS, figure_class, short, write_csv, write_figure
from .tables import print_table


@dataclass
class Subject:
    """A model to analyse, and the preprocessing of its images."""

    label: str
    model: nn.Module  # in eval mode
    source: str  # of its weights
    sha256: str | None
    size: tuple[int, int]
    stats: Statistics  # one value per channel
    interpolation: str
    crop_pct: float


# ---------------------------------------------------------------- the spectrum


class Spectrum:
    """Sums the frequencies of maps (B, D, H, W) over batches."""

    def __init__(self) -> None:
        self.magnitude: Any = 0.0  # (H, W): absolute coefficients, mean over channels, sum over images
        self.energy: Any = 0.0  # (H, W): shares of each image, which sum to 1, summed over images
        self.direct: list[float] = []  # the direct component's share, by image

    def add(self, maps: Tensor) -> None:
        """Adds the orthonormal DCT-II over height and width of each channel.

        Raises ValueError if a map is zero everywhere or not finite.
        """
        coefficients = scipy.fft.dctn(maps.double().cpu().numpy(), type=2, norm="ortho", axes=(2, 3))
        energy = (coefficients**2).sum(axis=1)  # (B, H, W)
        whole = energy.sum(axis=(1, 2), keepdims=True)
        if not np.isfinite(whole).all() or not whole.all():
            raise ValueError("its last map is zero everywhere or not finite")
        share = energy / whole
        self.magnitude = self.magnitude + np.abs(coefficients).mean(axis=1).sum(axis=0)
        self.energy = self.energy + share.sum(axis=0)
        self.direct += share[:, 0, 0].tolist()

    def result(self) -> dict[str, Any]:
        """Plain data. Frequencies are in half waves over the map: (v, u) has v down and u across.

        `radial`: by ring, which has the frequencies at this rounded distance from zero. Magnitudes are averaged over the
        frequencies of a ring, energy shares are summed.
        """
        n = len(self.direct)
        magnitude, energy = self.magnitude / n, self.energy / n
        rings = ring_of(*magnitude.shape)
        counts = np.bincount(rings.ravel())
        by_ring = [np.bincount(rings.ravel(), weights=values.ravel()) for values in (magnitude, energy)]
        return {
            "grid": list(magnitude.shape),
            "images": n,
            "direct_share": {
                "mean": float(np.mean(self.direct)),
                "std": float(np.std(self.direct, ddof=1)) if n > 1 else 0.0,
                "least": min(self.direct),
                "most": max(self.direct),
            },
            "magnitude": magnitude.tolist(),
            "energy_share": energy.tolist(),
            "radial": [
                {"ring": r, "frequencies": int(count), "magnitude": float(m / count), "energy_share": float(e)}
                for r, (count, m, e) in enumerate(zip(counts, *by_ring, strict=True))
                if count
            ],
        }


def ring_of(height: int, width: int) -> Any:
    """The rounded distance of each frequency from zero (H, W)."""
    return np.rint(np.hypot(*np.indices((height, width)))).astype(int)


# ---------------------------------------------------------------- models and images


def analyze(
    models: Sequence[str],
    data: str,
    images: int,
    device: torch.device,
    *,
    random: bool = False,
    batch: int = 32,
    out: Path | None = None,
) -> dict[str, Any]:
    """The spectra of the models' last maps, after the final norm, on the same images.

    models: timm names (pre-trained, or initial values with `random`), `NAME=FILE`, or exported students. data: any
    source; its validation part if it has one. images: how many, spread evenly over the source. out: the folder for the
    figure; if given, a missing matplotlib is reported at once. Raises `UserError`.
    """
    if out is not None:
        figure_class()
    for name, value in (("images", images), ("batch", batch)):
        if value < 1:
            raise UserError(f"`{name}` {value}: must be 1 or more")
    if double := [text for i, text in enumerate(models) if text in models[:i]]:
        raise UserError(f"{double[0]} is given twice; name each model once")
    place = evaluated_part(data)
    source = open_source(place, "`data`")
    n = min(images, len(source))
    indices = [i * len(source) // n for i in range(n)]
    found = []
    for text in models:
        subject = _subject(text, random)
        spec = Data.model_validate({"train": place, "image_size": subject.size, "channels": len(subject.stats[0])})
        augment = Augment.model_validate({"interpolation": subject.interpolation, "crop_pct": subject.crop_pct})
        chosen = Images(source, indices, eval_transform(spec, augment), None)
        with explain_out_of_memory(device, f"Try a smaller `batch` (now {batch}), or `device` cpu."):
            workers = (
                workers_for(spec.workers, device) if n > 10 * batch else 0
            )  # few images: not worth starting workers
            pixels = (b.images for b in eval_batches(chosen, batch, workers, device.type == "cuda"))
            spectrum = spectrum_of(subject, pixels, device)
        known = {"model": subject.label, "weights": subject.source, "sha256": subject.sha256}
        found.append(known | {"image_size": list(subject.size)} | spectrum)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "scipy": scipy.__version__}
    return {"data": place, "images": n, "of_images": len(source), "models": found, "versions": versions}


@torch.no_grad()
def spectrum_of(subject: Subject, batches: Iterable[Tensor], device: torch.device) -> dict[str, Any]:
    """`Spectrum.result` over batches of pixels (B, C, H, W) uint8. Raises `UserError` for a model without stage maps."""
    model = subject.model.to(device).eval()
    try:
        view = StageView(model, name=subject.label, image_size=subject.size)
    except ValueError as error:
        raise UserError(f"{subject.label}: {error}") from None
    if view.refusal or view.shapes.final is None:
        raise UserError(str(view.refusal))
    if view.shapes.final[1:] == (1, 1):
        raise UserError(f"{subject.label}: its last map has a single position, so it has only frequency zero")
    mean, std = (per_channel(values).to(device) for values in subject.stats)
    spectrum = Spectrum()
    try:
        for pixels in batches:
            inputs = resized(scaled(pixels.to(device)), subject.size, model)
            final = view((inputs - mean) / std).final
            assert final is not None
            spectrum.add(final)
    except ValueError as error:
        raise UserError(f"{subject.label}: {error}") from None
    return spectrum.result()


def _subject(text: str, random: bool) -> Subject:
    """The model for `text`, a name, `NAME=FILE` or an exported student, with its weights. Raises `UserError`."""
    name, equals, file = text.partition("=")
    if not equals and Path(text).exists():
        model, card = load_student(Path(text))
        stats = (tuple(card["mean"]), tuple(card["std"]))
        size = (card["image_size"][0], card["image_size"][1])
        return Subject(text, model, text, card.get("sha256"), size, stats, card["interpolation"], card["crop_pct"])
    weights = file if equals else "random" if random else "pretrained"
    size = usual_size(name)
    try:
        model, loaded, _ = timm_model(
            name, weights, size, f"Use {name}=FILE for weights in a file, or `random` for initial values."
        )
    except UserError as error:
        raise UserError(f"{shortened(text)}: {error}") from None
    own = resolve_model_data_config(model)
    stats = default_statistics(model)
    return Subject(text, model, loaded.source, loaded.sha256, size, stats, interpolation(model), own["crop_pct"])


# ---------------------------------------------------------------- output


COLUMNS = ("model", "map", "direct component", "least", "most", "ring 1", "direct : rest")


def show(found: dict[str, Any], console: Console) -> None:
    rows = []
    for m in found["models"]:
        share = m["direct_share"]
        cells = [f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f} %"]
        cells += [f"{100 * value:.1f} %" for value in (share["least"], share["most"], m["radial"][1]["energy_share"])]
        rows.append([m["model"], "x".join(map(str, m["grid"])), *cells, f"{_over_the_rest(m['magnitude']):.1f}"])
    notes = [
        "Shares of the energy, ± the standard deviation over images. direct : rest compares magnitudes.",
        f"{found['images']} of {found['of_images']} images of {found['data']}.",
    ]
    print_table(console, COLUMNS, ("model",), rows, notes)


def _over_the_rest(magnitude: list[list[float]]) -> float:
    """The magnitude of the direct component divided by the mean of all others."""
    values = np.array(magnitude).ravel()
    return float(values[0] / max(values[1:].mean(), np.finfo(float).tiny))


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes frequency.json, .csv, .svg and .png to `folder`. Raises `UserError`."""
    make_folder(folder)
    write_text(folder / "frequency.json", json.dumps(found, indent=2) + "\n")
    rows = (
        [m["model"], v, u, m["magnitude"][v][u], m["energy_share"][v][u]]
        for m in found["models"]
        for v, u in np.ndindex(*m["grid"])
    )
    write_csv(folder / "frequency.csv", ["model", "down", "across", "magnitude", "energy_share"], rows)
    write_figure(draw(found["models"]), folder, "frequency")


def draw(models: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: a heat map per model above, their profiles below; readable in greyscale."""
    figure_of, colours = figure_class()
    columns = min(4, len(models))
    rows = math.ceil(len(models) / columns)
    figure = figure_of(figsize=(max(7.0, 3.2 * columns), 3.0 * rows + 3.6), layout="constrained")
    heat, lines = figure.subfigures(2, 1, height_ratios=[3.0 * rows, 3.6])
    panels = heat.subplots(rows, columns, squeeze=False).ravel()
    relative = [np.array(m["magnitude"]) / m["magnitude"][0][0] for m in models]
    norm = colours.LogNorm(max(1e-4, min(r[r > 0].min() for r in relative)), 1.0)
    for panel, m, values in zip(panels, models, relative):
        image = panel.imshow(np.maximum(values, norm.vmin), cmap="viridis", norm=norm, origin="upper")
        panel.set_title(
            f"{short(m['model'])}\ndirect: {100 * m['direct_share']['mean']:.1f} % of the energy", fontsize=9
        )
        panel.set_xlabel("half waves across", fontsize=8)
        panel.set_ylabel("half waves down", fontsize=8)
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    heat.colorbar(image, ax=panels.tolist(), label="magnitude, direct = 1")
    axes = lines.subplots()
    for i, m in enumerate(models):
        profile = m["radial"]
        axes.plot(
            [p["ring"] for p in profile],
            [max(p["magnitude"] / profile[0]["magnitude"], norm.vmin) for p in profile],
            label=short(m["model"]),
            marker=MARKERS[i % 8],
            linestyle=("-", "--", ":", "-.")[i % 4],
            color=COLOURS[i % 6],
        )
    axes.set(
        yscale="log", xlabel="distance from frequency zero, half waves over the map", ylabel="magnitude, direct = 1"
    )
    axes.grid(True, which="major", color="#dddddd")
    axes.legend(fontsize=8)
    return figure
