"""What detection and segmentation share of a run: its optimiser, its checks, its folder, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from .. import parallel
from ..errors import UserError, counted
from ..memory import keep_freed_memory
from ..optim import of_groups
from ..preflight import finish
from ..provenance import provenance
from ..report.run import write_run_report
from ..run_folder import Outcome, open_folder, run_into
from ..runs import as_written
from ..shortages import shortages_told
from ..stop import StopRequest
from ..trackers import check_trackers
from ..training import expect_batches
from .backbone import weights_check
from .decay import layer_groups
from .deploy import FILES, export


def prepared(model: nn.Module, config: Any, device: torch.device) -> nn.Module:
    """On the device, in the recipe's memory format and with its batch norms. Raises `UserError`."""
    if config.train.sync_batchnorm:
        if device.type == "cpu":
            raise UserError("train.sync_batchnorm needs GPUs; torch has it for CUDA only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model


def optimizer_of(model: nn.Module, backbone: nn.Module, config: Any) -> Optimizer:
    optim = config.optim
    groups = layer_groups(backbone, model.parameters(), optim.lr, optim.weight_decay, optim.stage_decay)
    lowest, schedule = min(group["lr"] for group in groups), config.schedule
    warms_up = (schedule.model_dump().get("warmup_epochs") or 0) or schedule.model_dump().get("warmup_iterations")
    for name, rate in (("warmup_lr", schedule.warmup_lr if warms_up else 0.0), ("min_lr", schedule.min_lr)):
        if rate > lowest:
            raise UserError(
                f"schedule.{name} {rate:g} is above the rate of the first layer, {lowest:.2g} after optim.stage_decay "
                f"{optim.stage_decay:g}: that layer would learn faster than it should; set schedule.{name}=0"
            )
    return of_groups(optim, groups)


def steps_per_epoch(images: int, config: Any) -> int:
    """Raises `UserError` for a batch that is larger than the data, or does not divide."""
    expect_batches(config.train, images)
    return images // config.train.batch_size


def run_task(
    task: str,
    build: Any,
    config: Any,
    folder: Path,
    device: torch.device,
    console: Console,
    stop: StopRequest | None,
    dry_run: bool,
) -> dict[str, Any] | None:
    """Builds, checks and trains a recipe into `folder`, or goes on there. Returns the summary; None for a dry run.

    build: (config, device) -> a `Training` with `card()`, what is needed to use the model, and `told()`, lines on the
    data. Raises what `run_into` raises.
    """
    if not dry_run:
        open_folder(folder, config)
        parallel.wait_for_all()  # rank 0 writes into the folder below
    check_trackers(config.track)
    if device.type == "cpu":
        keep_freed_memory()
    way_out = _way_out(config)
    with shortages_told(device, way_out):
        run = build(config, device)
        _preflight(run, console)
    if dry_run:
        return None
    outcome = Outcome(
        Path(FILES[task]).with_suffix(".json").name, _card, lambda run, at, summary: _finish(task, run, at, summary)
    )
    return run_into(folder, run, outcome, console, title=config.name, way_out=way_out, stop=stop)


def _preflight(run: Any, console: Console) -> None:
    if parallel.rank() == 0:
        for line in run.told():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    spec, loaded = run.config.backbone, run.loaded["backbone"]
    finish(run, f"{spec.model}, {run.title()}", [weights_check(spec, loaded, run.config.seed)], console)


def _way_out(config: Any) -> str:
    train = config.train
    parts = 2 * train.accumulate
    more = f"train.accumulate={parts} (the same batch in more parts), or " * (
        train.batch_size % (parts * parallel.world()) == 0
    )
    now = f"train.batch_size={train.batch_size} train.accumulate={train.accumulate}"
    return f"Now {now}; try {more}smaller images."


def _card(run: Any) -> dict[str, Any]:
    return run.card() | {"provenance": provenance(run)}


def _finish(task: str, run: Any, folder: Path, summary: dict[str, Any]) -> None:
    file = folder / FILES[task]
    figures = {key: summary[key] for key in run.figures}
    summary["model"] = str(file)
    summary["reload_difference"] = export(run.deployed, file, _card(run) | {"figures": figures})
    write_run_report(folder, summary, facts(run))


def facts(run: Any) -> dict[str, str]:
    """For the report: what was trained, on what, for how long."""
    config, loaded, made = run.config, run.loaded["backbone"], provenance(run)
    millions = sum(p.numel() for p in run.student.parameters()) / 1e6
    epochs = counted(run.epochs(run.total_steps), "epoch")
    return {
        "data": run.told()[0],
        "model": f"{run.title()} on {config.backbone.model}, {millions:.2f} M parameters",
        "backbone": f"{config.backbone.model}, weights: {loaded.source}",
        "budget": f"{epochs}, {counted(run.total_steps, 'step')}, batch {config.train.batch_size}, {config.optim.name}, "
        f"lr {config.optim.lr:g}, stage decay {config.optim.stage_decay:g}, seed {config.seed}",
        "machine": made["machine"],
        "versions": f"scalekd {made['scalekd']}, torch {made['torch']}, timm {made['timm']}",
        "command": made["command"],
    }


def input_of(mean: torch.Tensor | list[float], std: torch.Tensor | list[float]) -> dict[str, list[float]]:
    """A card's mean and std."""
    return {"mean": as_written(torch.as_tensor(mean)), "std": as_written(torch.as_tensor(std))}
