"""Evaluates frozen features with few or many labels: `scalekd probe`.

A linear classifier and k nearest neighbours are fitted on the features of sets of labelled images and tested on the
validation images. docs/how-to/transfer.md has the protocol of ScaleKD's Table 12 and explains the numbers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import make_folder, write_text
from scalekd.common.intervals import half_width
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.parallel import pick_device
from scalekd.common.provenance import command_line, git_state, machine, versions
from scalekd.common.sections import height_and_width, section_of
from scalekd.common.seeds import seed_from
from scalekd.common.set_figures import Scores, mean_average_precision
from scalekd.common.text import counted, duration, say
from scalekd.data.description import KEY, tell_data
from scalekd.data.options import Data
from scalekd.data.sources.open import pair_of
from scalekd.data.split import Split, open_split
from scalekd.data.targets import count_of
from scalekd.heads.features import FEATURES, Backbone, cache_folder, features, named_backbone, some
from scalekd.heads.knn import knn_predict
from scalekd.heads.linear import choose, fit
from scalekd.heads.page import main_figure
from scalekd.heads.scores import are_sets, before_and_after
from scalekd.models.options import Model

from .figures import figure_class, write_figure
from .probe_page import drawing, markdown, show
from .shots import ALL, NAMED, Set, Shots, labelled_sets

Fit = dict[str, Any]  # the result of one model on one set

FILE = "results.json"
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of k nearest neighbours, as in DINO


def probe(
    models: Sequence[str],
    data: Data,
    out: Path,
    device: torch.device,
    console: Console,
    *,
    shots: Sequence[Shots],
    draws: int,
    image_size: tuple[int, int] | None = None,
    val_limit: int | None = None,
    cache: Path = FEATURES,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Probes the models, writes results.json, summary.md and the figure to `out`, and returns the results.

    models: as for `named_backbone`; the others are compared with the first. data: `train`, `val` and `seed` of a recipe.
    shots: labelled images per class. draws: number of sets of labelled images of each size, the same for all models.
    image_size: for models given by name. val_limit: number of validation images to use. cache: folder for features.
    Fits that are in `out` already are reused. dry_run: check everything and print what would be done, but write nothing
    and return None. Raises `UserError`.
    """
    if double := [text for i, text in enumerate(models) if text in models[:i]]:
        raise UserError(f"{double[0]} is given twice; name each model once")
    known = _known(out)
    split = _split(data)
    sets = labelled_sets(split, shots, draws, data.seed)
    val = some(split.val, split.val_indices, val_limit, data.seed)
    if split.multi_label and not count_of([split.val.targets[i] for i in val]):
        raise UserError("none of the validation images has a label, so there is no mAP; name others with `val`")
    tell_data(console, split.described)
    _print_data(split, val, data, console)
    can_draw = _can_draw(console)
    backbones = {text: named_backbone(text, image_size, device) for text in models}
    keys = {text: _keys(backbone, split, val, sets, data, cache) for text, backbone in backbones.items()}
    missing = {text: [s for s in sets if keys[text][s] not in known] for text in models}
    for text, backbone in backbones.items():
        _print_model(text, backbone, len(missing[text]), len(sets), console)
    if dry_run:
        return None

    make_folder(out)
    for text, backbone in backbones.items():
        todo = {s: sets[s] for s in missing[text]}
        for s, fitted in _fits(backbone, split, val, todo, data, cache, console) if todo else ():
            name = {"key": keys[text][s], "model": text, "shots": s[0], "seed": data.seed + s[1]}
            known[keys[text][s]] = name | fitted
            _write(out, {"fits": list(known.values())})  # the other results are added when all fits are done
    fits = {text: {s: known[keys[text][s]] for s in sets} for text in models}
    results = {text: {"card": backbones[text].card} | _result(fits[text], shots) for text in models}
    found = {
        "data": _data_facts(data, split, val),
        "metric": "mAP %" if split.multi_label else "top-1 %",
        KEY: dict(split.described),
        "shots": list(shots),
        "draws": draws,
        "neighbours": {"k": NEIGHBOURS, "temperature": TEMPERATURE},
        "models": results,
        "against_first": {text: _differences(results[models[0]], results[text]) for text in models[1:]},
        "provenance": {"command": command_line(), **versions(), "machine": machine(device), "git": git_state()},
        "fits": list(known.values()),
    }
    _write_all(found, out, can_draw, console)
    return found


def probe_named(
    models: Sequence[str],
    data: str,
    val: str | None,
    out: Path,
    console: Console,
    *,
    shots: Sequence[Shots],
    draws: int,
    image_size: Any,
    seed: int | None,
    val_limit: int | None,
    cache: Path | None,
    device_name: str | None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """`probe` with plain values. `data` may be a source with both a training and a validation part. Raises `UserError`."""
    for name, count in (("draws", draws), ("val_limit", val_limit)):
        if count is not None and count < 1:
            raise UserError(f"`{name}` {count}: must be 1 or more")
    train, held = pair_of(data, test=True) or (data, None)
    size = None if image_size is None else section_of(Model, {"model": "resnet50", "image_size": image_size}, "teacher")
    device = pick_device(device_name)
    with explain_out_of_memory(device, "Try device cpu, a smaller image_size, or fewer shots."):
        return probe(
            models,
            section_of(Data, {"train": train, "val": val or held, "seed": seed}, "data"),
            out,
            device,
            console,
            shots=shots,
            draws=draws,
            image_size=None if size is None or size.image_size is None else height_and_width(size.image_size),
            val_limit=val_limit,
            cache=cache or FEATURES,
            dry_run=dry_run,
        )


# ---------------------------------------------------------------- images


def _split(data: Data) -> Split:
    if data.val == data.train:
        raise UserError(
            f"data.val equals data.train, {data.val}: models would be tested on their training images; choose other images"
        )
    return open_split(data)


def _keys(
    backbone: Backbone, split: Split, val: Sequence[int], sets: dict[Set, list[int]], data: Data, cache: Path
) -> dict[Set, str]:
    """By set: a key of everything that a fit depends on: weights, preprocessing, images, labels, seed, version."""
    folders = [cache_folder(backbone, *source, cache).name for source in _sources(split, data)]
    shared = seed_from(*folders, *val, NEIGHBOURS, repr(TEMPERATURE), versions()["scalekd"])
    return {s: f"{seed_from(shared, data.seed + s[1], *images):016x}" for s, images in sets.items()}


def _sources(split: Split, data: Data) -> list[tuple[Any, str]]:
    return [(split.train, str(data.train)), (split.val, str(data.val or data.train))]


# ---------------------------------------------------------------- fits


def _fits(
    backbone: Backbone,
    split: Split,
    val: Sequence[int],
    sets: dict[Set, list[int]],
    data: Data,
    cache: Path,
    console: Console,
) -> Iterator[tuple[Set, Fit]]:
    """The result of each set; prints the progress."""
    needed = sorted({i for images in sets.values() for i in images})
    train, test = _sources(split, data)
    say(console, f"{backbone.card['model']} from {backbone.card['weights']}")
    x, y = features(backbone, train[0], needed, train[1], cache, console)
    queries, truth = (t.to(backbone.device) for t in features(backbone, test[0], val, test[1], cache, console))
    row = {image: k for k, image in enumerate(needed)}
    began = time.perf_counter()
    with console.status("") as status:
        for done, (s, images) in enumerate(sets.items()):
            left = f", about {duration((time.perf_counter() - began) / done * (len(sets) - done))} left" if done else ""
            status.update(f"{done} of {len(sets)} fits{left}")
            rows = torch.tensor([row[i] for i in images])
            known = x[rows].to(backbone.device), y[rows].to(backbone.device)
            fitted = fit_and_score(*known, queries, truth, len(split.classes), seed_from("probe", data.seed + s[1]))
            name = f"all {len(rows)} images" if s[0] == ALL else f"{s[0]} per class, draw {s[1] + 1}"
            called, linear = main_figure(fitted["linear"])
            figures = f"{called}: linear {linear:.2f} %, {NEIGHBOURS}-nn {main_figure(fitted['knn'])[1]:.2f} %"
            say(console, f"  {name}: {figures}, {fitted['seconds']:.1f} s")
            yield s, fitted


def fit_and_score(x: Tensor, y: Tensor, queries: Tensor, truth: Tensor, classes: int, seed: int) -> Fit:
    """Fits both classifiers on features x (N, D) with labels y, and tests them on `queries` (M, D) with labels `truth`.

    Labels are classes, (N,), or sets of classes, (N, classes) of 0 and 1. The test images choose no hyperparameter.
    """
    began = time.perf_counter()
    choice = choose(x, y, classes, seed)
    linear = fit(x, y, classes, choice.strength)
    votes = knn_predict(x, y, queries, k=NEIGHBOURS, temperature=TEMPERATURE, classes=classes)
    return {
        "images": len(x),
        "features": x.shape[1],
        "strength": choice.strength,
        "tried": choice.tried,
        "linear": before_and_after(linear(queries), truth, choice.temperature, choice.threshold)["before"],
        "knn": _of_votes(votes, truth),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _of_votes(votes: Tensor, truth: Tensor) -> dict[str, float]:
    """Top-1, or mAP with sets of classes, in %. votes: (M, classes)."""
    if are_sets(truth):
        return {"map": mean_average_precision(Scores(votes.cpu(), truth.cpu() > 0.5))}
    return {"top1": 100 * (votes.argmax(1) == truth).double().mean().item()}


# ---------------------------------------------------------------- results


def _result(fits: dict[Set, Fit], shots: Sequence[Shots]) -> dict[str, Any]:
    """By shots: mean and interval over the draws, for the linear classifier and the nearest neighbours."""
    first = next(iter(fits.values()))
    result: dict[str, Any] = {"features": first["features"], "shots": {}}
    key = "map" if "map" in first["linear"] else "top1"
    for n in shots:
        drawn = [fitted for s, fitted in fits.items() if s[0] == n]
        result["shots"][str(n)] = {
            "images": drawn[0]["images"],
            "strengths": [fitted["strength"] for fitted in drawn],
            "linear": over_draws([fitted["linear"][key] for fitted in drawn], key),
            "knn": over_draws([fitted["knn"][key] for fitted in drawn], key),
        }
    return result


def _differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """By shots: `other` minus `first` on the same labelled images."""

    def of(n: str, kind: str) -> dict[str, Any]:
        mine, theirs = first["shots"][n][kind], other["shots"][n][kind]
        key = "map" if "map" in mine else "top1"
        return over_draws([b - a for a, b in zip(mine[key], theirs[key])], key)

    return {n: {kind: of(n, kind) for kind in ("linear", "knn")} for n in first["shots"]}


def over_draws(figures: list[float], key: str = "top1") -> dict[str, Any]:
    return {key: figures, "mean": statistics.fmean(figures), "half_width_95": half_width(figures)}


def _known(out: Path) -> dict[str, Fit]:
    """The fits in `out`, by key. Raises `UserError` if `out` holds something else."""
    file = out / FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"`out`: {out} is a file; choose a folder")
    if not file.exists():
        return {}
    try:
        return {fitted["key"]: fitted for fitted in json.loads(file.read_text())["fits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} was not written by `scalekd probe` ({first_line(error)}); choose another folder with `out`"
        ) from None


def _write(out: Path, found: dict[str, Any]) -> None:
    write_text(out / FILE, json.dumps(found, indent=2) + "\n")


def _data_facts(data: Data, split: Split, val: Sequence[int]) -> dict[str, Any]:
    return {
        "train": data.train,
        "val": data.val or f"{data.val_fraction:.0%} of the same images, held out",
        "seed": data.seed,
        "classes": len(split.classes),
        "train_images": len(split.train_indices),
        "val_images": len(val),
    }


# ---------------------------------------------------------------- output


def _write_all(found: dict[str, Any], out: Path, can_draw: bool, console: Console) -> None:
    _write(out, found)
    if can_draw:
        write_figure(drawing(found), out, "probe")
    write_text(out / "summary.md", markdown(found, "probe.svg" if can_draw else None))
    show(found, console)
    say(console, f"{out / 'summary.md'}  {out / FILE}" + f"  {out / 'probe.svg'}" * can_draw)


def _print_data(split: Split, val: Sequence[int], data: Data, console: Console) -> None:
    held = "" if data.val else " (held out)"
    images = counted(len(split.train_indices), "image")
    say(console, f"{len(split.classes)} classes, {images} for training, {len(val)} for testing{held}")
    tested = count_of([split.val.targets[i] for i in val])
    if untested := [name for c, name in enumerate(split.classes) if c not in tested]:
        names = ", ".join(untested[:NAMED]) + ", ..." * (len(untested) > NAMED)
        say(console, f"{len(untested)} classes have no test image: {names}; the figures are those of the others")


def _print_model(text: str, backbone: Backbone, missing: int, total: int, console: Console) -> None:
    card = backbone.card
    size = "x".join(map(str, card["image_size"])) + (", greyscale" if card["channels"] == 1 else "")
    name = f"{text}: {card['model']}, sha256 {card['sha256'][:12]}, input {size}"
    say(console, f"{name}; {counted(missing, 'fit')} to do, {total - missing} reused")
    for doubt in backbone.doubts:
        say(console, f"warn: {text}: {doubt}")


def _can_draw(console: Console) -> bool:
    try:
        figure_class()
    except UserError:
        say(console, "no figure, because matplotlib is missing: pip install 'scalekd[figures]'")
        return False
    return True
