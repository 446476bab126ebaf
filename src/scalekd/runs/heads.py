"""Fits the classifier of a teacher whose recipe says `teacher.head: fit`, before the run is built.

It does the same as `scalekd head`, on the run's labelled images, at most `MOST` of them. The head is saved in the run's
folder, or in that of a comparison for all its runs, and recipe.yaml names it, so that resuming, reports and analyses treat
it like any other head.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.files import in_use, is_file
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.text import say
from scalekd.config.recipe import Config
from scalekd.data.split import open_split
from scalekd.distill.build import label_faults
from scalekd.heads.features import FEATURES
from scalekd.heads.fit_head import fit_head
from scalekd.models.options import FIT, Model

MOST = 50_000  # labels that a head is fitted to, balanced by class: the fit keeps their features in memory, in float64
MOST_ASIDE = 2_000  # for a dry run, whose head is thrown away


def with_heads(config: Config, folder: Path) -> Config:
    """The recipe with the heads' folders in place of `fit`: `folder`/head, or `folder`/head-NAME for several teachers."""

    def named(spec: Model, head: str) -> Model:
        return spec.model_copy(update={"head": str(folder / head)}) if spec.fits_head else spec

    teachers = {name: named(spec, f"head-{name}") for name, spec in config.teachers.items()}
    teacher = config.teacher and named(config.teacher, "head")
    return config.model_copy(update={"teacher": teacher, "teachers": teachers})


def heads_of(config: Config) -> list[Path]:
    """The folders of the teachers' fitted heads."""
    return [Path(str(spec.head)) for spec in config.all_teachers.values() if spec.has_head_folder]


def fit_heads(
    config: Config, folder: Path, device: torch.device, console: Console, cache: Path = FEATURES, most: int = MOST
) -> Config:
    """Fits the heads that the recipe asks for into `folder`, unless its run has begun. Returns `with_heads`.

    The first process fits, the others wait. Heads of a start that failed before its run are fitted again, because the
    recipe may have changed. cache: a folder for features. most: labels to fit to. Raises what `fit_head` raises.
    """
    fitted = with_heads(config, folder)
    if fitted == config:
        return config
    if parallel.rank() == 0 and not is_file(folder / "recipe.yaml"):
        if faults := label_faults(config, open_split(config.data, strict=False)):  # before minutes of fitting
            raise UserError("\n".join(faults))
        with in_use(folder):
            fit_into(folder, config, device, console, cache, most)
    # wait for the first process; over gloo, whose timeout of half an hour is longer than NCCL's ten minutes
    parallel.from_first(None)
    return fitted


def fit_into(
    folder: Path, config: Config, device: torch.device, console: Console, cache: Path = FEATURES, most: int = MOST
) -> None:
    """Fits the heads that the recipe asks for, where `with_heads` says."""
    fitted = with_heads(config, folder)
    with explain_out_of_memory(device, "Try a smaller teacher.image_size, or set `device` to cpu."):
        for name, spec in config.all_teachers.items():
            if spec.fits_head:
                out = Path(str(fitted.all_teachers[name].head))
                _fit(config, spec, config.key_of(name), out, device, console, cache, most)


def _fit(
    config: Config, spec: Model, where: str, out: Path, device: torch.device, console: Console, cache: Path, most: int
) -> None:
    say(console, f"{where}.head: {FIT}: fitting a classifier into {out}")
    as_in_the_run = {"head": None, "image_size": spec.image_size or config.data.image_size}
    labelled = {"unlabelled": None, "unlabelled_limit": None, "limit": min(config.data.limit or most, most)}
    fit_head(
        spec.model_copy(update=as_in_the_run),
        config.data.model_copy(update=labelled),
        out,
        device,
        console,
        where=where,
        crop_pct=config.augment.crop_pct,
        interpolation=config.augment.interpolation,
        cache=cache,
    )


@contextmanager
def heads_aside(config: Config, device: torch.device, console: Console) -> Iterator[Config]:
    """For a dry run: `fit_heads` to fewer labels, into a temporary folder, which also holds the features."""
    if with_heads(config, Path()) == config:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="scalekd-") as temporary:
        folder = Path(parallel.from_first(temporary))
        yield fit_heads(config, folder, device, console, cache=folder / "features", most=MOST_ASIDE)
        parallel.wait_for_all()  # before the first process deletes the folder
