"""Measures how well an exported student finds images of the same class (`scalekd evaluate --retrieval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.files import replacing
from scalekd.common.intervals import bootstrap_interval, share_interval
from scalekd.common.results import Retrieval
from scalekd.common.text import counted, printable, say
from scalekd.data.description import of_source, part, tell_data
from scalekd.data.sources.open import evaluated_part, open_source, parts_of
from scalekd.data.sources.source import Source
from scalekd.data.targets import one_each
from scalekd.heads.retrieval import RANKS, figures_of_scores, retrieval_scores
from scalekd.models.open_student import features_of
from scalekd.report.contact_sheet import BAR, COLUMNS, OTHER, Cell, contact_sheet

from .predict import use
from .prediction_files import check_outputs
from .students import opened

ROWS = 15  # queries of a sheet
BATCH = 64


class Embedded(NamedTuple):
    """The images of a source that can be read, with their embeddings."""

    source: Source
    numbers: list[int]  # in the source
    embeddings: Tensor  # (N, E), on the device
    skipped: dict[str, str]

    @property
    def classes(self) -> list[str]:
        """The class of each image."""
        targets = one_each(self.source.targets, "retrieval")
        return [self.source.classes[targets[i]] for i in self.numbers]


def evaluate_retrieval(
    student: Path, data: str, gallery: str | None, sheet: Path | None, device_name: str | None, console: Console
) -> Retrieval:
    """The figures of retrieval with the images of `data` as queries, in a gallery or among each other.

    An image that is in both finds the others only. sheet: a picture of some queries with the nearest images, or None.
    Raises `UserError` for sets of labels, without a class in common, and for a gallery with fewer images than recall
    looks at.
    """
    check_outputs(sheet=sheet)
    device = parallel.pick_device(device_name)
    model, card = opened(student, device)
    sources = [_opened(data, "`data`")] + ([_opened(gallery, "`gallery`")] if gallery is not None else [])
    _check(sources)
    described = of_source(sources[0], data)
    if gallery is not None:
        described["gallery"] = part(len(sources[1]), gallery, "", sources[1].left_out)
    tell_data(console, described)
    found = []
    for source in sources:
        used = use(model, card, source, lambda x: list(features_of(model, x)), BATCH, "auto", device, console)
        found.append(Embedded(source, used.numbers, torch.stack(used.outputs), used.skipped))
        if not found[-1].embeddings.isfinite().all():
            raise UserError(f"{student}: some embeddings are not finite; its run diverged or its file is damaged")
    queries, known = found[0], found[-1]
    itself = _places(queries, known)
    _check_size(known, itself, "`data`" if gallery is None else "`gallery`")
    names = {name: i for i, name in enumerate(dict.fromkeys([*queries.classes, *known.classes]))}
    ours, theirs = (torch.tensor([names[name] for name in each.classes], device=device) for each in (queries, known))
    scores = retrieval_scores(queries.embeddings, ours, known.embeddings, theirs, itself)
    figures = figures_of_scores(scores)
    count, alone = int(figures.pop("queries")), int(figures.pop("left_out"))
    if not count:
        raise UserError("`data`: no query has an image of its class to find; name images with two or more of a class")
    if sheet is not None:
        used_ones = (~scores["map_at_r"].isnan()).nonzero().flatten().tolist()
        _write_sheet(sheet, queries, known, itself, used_ones)
    twice = int((itself >= 0).sum()) if gallery is not None else 0
    if twice:
        say(console, f"{_queries(twice)} in the gallery too: none finds itself")
    intervals = {
        key: bootstrap_interval(100 * values[~values.isnan()].numpy())
        if key == "map_at_r"
        else share_interval(figures[key], count)
        for key, values in scores.items()
    }
    skipped = queries.skipped | known.skipped
    return Retrieval(figures, intervals, count, alone, len(known.numbers), twice, skipped, described)


def _opened(text: str, where: str) -> Source:
    if len(parts_of(text)) > 1:
        raise UserError(f"{where}: {text} has several splits; name one of them, such as {evaluated_part(text)}")
    source = open_source(text, where)
    one_each(source.targets, f"{where}: retrieval")
    return source


def _check(sources: Sequence[Source]) -> None:
    """Raises `UserError` for a single class, and for a gallery without a class of the queries."""
    named = [set(source.classes) for source in sources]
    if len(set.union(*named)) < 2:
        raise UserError(f"`data` has a single class, {_some(named[0])}: every image would be found; name more classes")
    if not set.intersection(*named):
        raise UserError(
            f"`gallery` has no class of the queries: {_some(named[1])} there, {_some(named[0])} in `data`; name another one"
        )


def _some(names: set[str]) -> str:
    listed = printable(", ".join(sorted(names)[:4]))
    return listed + f", ... ({len(names)})" * (len(names) > 4)


def _places(queries: Embedded, gallery: Embedded) -> Tensor:
    """Where each query is in the gallery, (M,) int64; -1 if it is not there."""
    device = queries.embeddings.device
    if queries is gallery:
        return torch.arange(len(queries.numbers), device=device)
    places = {gallery.source.identity(number): i for i, number in enumerate(gallery.numbers)}
    return torch.tensor([places.get(queries.source.identity(i), -1) for i in queries.numbers], device=device)


def _check_size(gallery: Embedded, itself: Tensor, where: str) -> None:
    """Raises `UserError` if there are fewer images to find than recall looks at."""
    images = len(gallery.numbers) - bool((itself >= 0).any())
    if images < max(RANKS):
        raise UserError(
            f"{where}: a query has {counted(images, 'image')} to find, fewer than the {max(RANKS)} of recall@{max(RANKS)}; name "
            "more images"
        )


def _write_sheet(file: Path, queries: Embedded, gallery: Embedded, itself: Tensor, used: Sequence[int]) -> None:
    """Draws evenly spaced queries, each with the nearest images on its right."""
    chosen = [used[i * len(used) // min(ROWS, len(used))] for i in range(min(ROWS, len(used)))]
    similarity = F.normalize(queries.embeddings[chosen], dim=1) @ F.normalize(gallery.embeddings, dim=1).T
    for row, i in zip(similarity, chosen):
        if itself[i] >= 0:
            row[itself[i]] = -torch.inf
    nearest = similarity.topk(min(COLUMNS - 1, len(gallery.numbers) - 1), dim=1)
    ours, theirs = queries.classes, gallery.classes
    cells: list[Cell] = []
    for i, values, places in zip(chosen, nearest.values.tolist(), nearest.indices.tolist()):
        cells.append(_cell(queries, i, ours[i], "query", 1.0, BAR))
        for value, place in zip(values, places):
            colour = BAR if theirs[place] == ours[i] else OTHER
            cells.append(_cell(gallery, place, theirs[place], f"{value:.2f}", max(0.0, value), colour))
    title = f"{_queries(len(chosen))}, each with its nearest images"
    with replacing(file) as opened_file:
        picture = contact_sheet(cells, title, 1 + nearest.indices.shape[1])
        picture.save(opened_file, "png" if file.suffix.lower() == ".png" else "jpeg", quality=92)


def _queries(count: int) -> str:
    return "1 query" if count == 1 else f"{count} queries"


def _cell(images: Embedded, i: int, title: str, number: str, share: float, colour: str) -> Cell:
    number_there = images.numbers[i]
    picture: Any = images.source[number_there][0]
    return Cell(picture, title, number, share, images.source.where(number_there), colour)
