"""Uses an exported student on images: class probabilities (`scalekd predict`) and features (`scalekd embed`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.results import Embeddings, Prediction, Predictions
from scalekd.common.text import printable, say
from scalekd.data.batches import Images, eval_batches
from scalekd.data.images import BadImages
from scalekd.data.sources.inputs import Numbered, notes_on, open_inputs
from scalekd.data.sources.source import Source
from scalekd.models.inputs import card_statistics, scaled
from scalekd.models.open_student import features_of
from scalekd.train.hardware import workers_for

from .prediction_files import check_outputs, write_embeddings, write_predictions
from .students import opened, validation_transform


class Used(NamedTuple):
    """What a student gave for the images of a source."""

    source: Source
    numbers: list[int]  # of the images that could be read, in order
    outputs: list[Any]  # one per number
    skipped: dict[str, str]  # name -> reason


def predict(
    student: Path,
    inputs: Sequence[str],
    *,
    top: int | None,
    threshold: float | None,
    csv: Path | None,
    jsonl: Path | None,
    sheet: Path | None,
    batch: int,
    workers: int | str,
    device: str | None,
    console: Console,
) -> Predictions:
    """The most probable classes of every image, which are also written to the files that are given.

    These are the `top` (5) classes; of a student of sets of labels all those, or `top` of them, whose probability is at
    least `threshold`, by default that of its card. Images that cannot be read are printed, skipped and listed. Raises
    `UserError`, also if none can be read, and if the student has no classifier or its outputs are not finite.
    """
    if top is not None and top < 1:
        raise UserError(f"`top` {top}: must be 1 or more")
    check_outputs(csv=csv, jsonl=jsonl, sheet=sheet)
    on = parallel.pick_device(device)
    model, card = opened(student, on)
    classes = card["classes"]
    if not classes:
        raise UserError(
            f"{student} has no classifier, because no loss of its run used logits, so it predicts no classes. "
            "`scalekd embed` gives its features"
        )

    least = _threshold(threshold, card, student)
    most = min(len(classes), top or (len(classes) if card.get("multi_label") else 5))

    def best(images: Tensor) -> list[tuple[list[int], list[float]]]:
        found = probabilities(model, images, student, bool(card.get("multi_label"))).topk(most, dim=1)
        counts = (found.values >= least).sum(1).tolist()
        return [(i[:n], p[:n]) for n, i, p in zip(counts, found.indices.tolist(), found.values.tolist())]

    source = open_inputs(inputs)
    notes = notes_on(source, classes)
    for note in notes:
        say(console, note)
    used = use(model, card, source, best, batch, workers, on, console)
    rows = [
        Prediction(source.where(number), tuple(classes[i] for i in indices), tuple(values))
        for number, (indices, values) in zip(used.numbers, used.outputs)
    ]
    found = Predictions(rows, used.skipped, notes, least if card.get("multi_label") else None)
    write_predictions(found, used.source, used.numbers, csv=csv, jsonl=jsonl, sheet=sheet)
    return found


def _threshold(given: float | None, card: Mapping[str, Any], student: Path) -> float:
    """The probability that a predicted class has at least; 0 for one class per image. Raises `UserError`."""
    if not card.get("multi_label"):
        if given is not None:
            raise UserError(f"`threshold`: {student} was trained on one class per image; use `top`")
        return 0.0
    chosen = card.get("threshold") if given is None else given
    if chosen is None:
        raise UserError(f"`threshold`: the card of {student} has none, because its run has not ended; set it")
    if not 0 < chosen < 1:
        raise UserError(f"`threshold` {chosen:g}: must be above 0 and below 1; it is a probability")
    return chosen


def probabilities(model: nn.Module, images: Tensor, student: Path, multi_label: bool = False) -> Tensor:
    """Class probabilities (B, C) of normalised images: sigmoids with `multi_label`, else softmax.

    Raises `UserError` if they are not finite.
    """
    logits = model(images).float()
    if not logits.isfinite().all():
        raise UserError(
            f"{student}: the student's outputs are not finite. Its run diverged or its file is damaged: train it again, or "
            "export another checkpoint with `scalekd export`"
        )
    return logits.cpu().double().sigmoid() if multi_label else logits.softmax(dim=1).cpu()


def embed(
    student: Path,
    inputs: Sequence[str],
    *,
    out: Path | None,
    batch: int,
    workers: int | str,
    device: str | None,
    console: Console,
) -> Embeddings:
    """The pooled features of every image, also written to `out`. Bad images and errors: as for `predict`."""
    check_outputs(out=out)
    on = parallel.pick_device(device)
    model, card = opened(student, on)
    used = use(
        model,
        card,
        open_inputs(inputs),
        lambda images: list(features_of(model, images).cpu()),
        batch,
        workers,
        on,
        console,
    )
    features = torch.stack(used.outputs)
    if not features.isfinite().all():
        raise UserError(f"{student}: some features are not finite; its run diverged or its file is damaged")
    found = Embeddings(features.numpy(), [used.source.where(i) for i in used.numbers], used.skipped)
    if out is not None:
        write_embeddings(found, out)
    return found


def use(
    model: nn.Module,
    card: dict[str, Any],
    source: Source,
    outputs: Callable[[Tensor], list[Any]],
    batch: int,
    workers: int | str,
    device: torch.device,
    console: Console,
) -> Used:
    """`outputs` of every readable image, which get the normalised pixels of a batch, as in validation.

    Raises `UserError` if no image can be read.
    """
    if batch < 1:
        raise UserError(f"`batch` {batch}: must be 1 or more")
    if isinstance(workers, int) and workers < 0:
        raise UserError(f"`workers` {workers}: must be 0 or more")
    bad = BadImages("images", len(source), 1.0)
    images = Images(Numbered(source), range(len(source)), validation_transform(card), None, bad)
    processes = workers_for(workers, device) if len(source) > batch else 0
    mean, std = card_statistics(card, device)
    numbers: list[int] = []
    results: list[Any] = []
    told = 0
    with explain_out_of_memory(device, "Use a smaller `batch`, or set `device` to cpu."), torch.inference_mode():
        for found in _shown(eval_batches(images, batch, processes, device.type == "cuda"), len(source), batch, console):
            numbers += found.targets.tolist()
            results += outputs((scaled(found.images.to(device)) - mean) / std)
            told = _tell(bad, told, console)
    _tell(bad, told, console)
    if not numbers:
        name, reason = next(iter(bad.found.items()))
        raise UserError(f"no image can be read, of {len(source)}; the first: {name}: {reason}")
    return Used(source, numbers, results, dict(bad.found))


def _shown(batches: Iterator[Any], images: int, batch: int, console: Console) -> Iterator[Any]:
    """The batches, with a progress bar on a terminal."""
    total = -(-images // batch)
    yield from track(batches, "images", total, console=console, transient=True, disable=not console.is_terminal)


def _tell(bad: BadImages, told: int, console: Console) -> int:
    """Prints the bad images after the first `told`; returns how many there are."""
    for name, reason in list(bad.found.items())[told:]:
        say(console, printable(f"skipped: {name}: {reason}"))
    return len(bad.found)
