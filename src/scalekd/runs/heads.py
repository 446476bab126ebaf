"""`teacher.head: fit` of a recipe: `scalekd head` on the run's own labelled images, before the run is built.

The head goes into the run's folder, and the recipe that the run keeps names it there: what comes later (resuming,
reports, analyses) sees a head like any other. Only runs call this; nothing else knows of `fit`.
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
from scalekd.common.shortages import explain_out_of_memory
from scalekd.common.text import say
from scalekd.config.recipe import Config
from scalekd.heads.features import FEATURES
from scalekd.heads.fit import fit_head
from scalekd.models.options import FIT, Model


def with_heads(config: Config, folder: Path) -> Config:
    """The recipe that names, in place of `fit`, where the run in `folder` has its heads: head, or head-NAME."""

    def named(spec: Model, head: str) -> Model:
        return spec.model_copy(update={"head": str(folder / head)}) if spec.fits_head else spec

    teachers = {name: named(spec, f"head-{name}") for name, spec in config.teachers.items()}
    teacher = config.teacher and named(config.teacher, "head")
    return config.model_copy(update={"teacher": teacher, "teachers": teachers})


def heads_of(config: Config) -> list[Path]:
    """The folders of its teachers' heads."""
    return [Path(spec.head) for spec in config.all_teachers.values() if spec.head]


def fit_heads(config: Config, folder: Path, device: torch.device, console: Console, cache: Path = FEATURES) -> Config:
    """Fits what the recipe asks for into `folder`, but not for a run that has begun there. Returns `with_heads`.

    The first process fits, the others wait. Heads that a start left which came to nothing are fitted anew: the recipe
    may be another now. cache: where features are kept. Raises what `fit_head` raises.
    """
    found = with_heads(config, folder)
    if found == config:
        return config
    if parallel.rank() == 0 and not is_file(folder / "recipe.yaml"):
        with in_use(folder), explain_out_of_memory(device, "Try a smaller teacher.image_size, or --device cpu."):
            for name, spec in config.all_teachers.items():
                if spec.fits_head:
                    out = Path(str(found.all_teachers[name].head))
                    _fit(config, spec, config.key_of(name), out, device, console, cache)
    parallel.from_first(None)  # gloo waits for half an hour, NCCL's own barrier for ten minutes
    return found


def _fit(
    config: Config, spec: Model, where: str, out: Path, device: torch.device, console: Console, cache: Path
) -> None:
    say(console, f"{where}.head: {FIT}, into {out}")
    as_in_the_run = {"head": None, "image_size": spec.image_size or config.data.image_size}
    labelled = {"unlabelled": None, "unlabelled_limit": None}
    try:
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
    except UserError as error:
        if config.data.on_bad_image == "error" or not str(error).startswith("cannot read "):
            raise
        told = str(error).partition(". Remove")[0]
        raise UserError(f"{told}. A head is fitted on all labelled images: remove or replace that file") from None


@contextmanager
def heads_aside(config: Config, device: torch.device, console: Console) -> Iterator[Config]:
    """`fit_heads` into a folder that is gone afterwards, features too: for a dry run."""
    if with_heads(config, Path()) == config:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="scalekd-") as own:
        folder = Path(parallel.from_first(own))
        yield fit_heads(config, folder, device, console, cache=folder / "features")
        parallel.wait_for_all()  # before the first process removes it
