"""The correctness part of `gpu.py`: what a GPU computes against what the CPU does, and whole runs on it.

Each function is a row. It returns what it found, with `passed`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from gpu_models import LEVERS, classes_of, pair_of, run_of
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from scalekd import Distiller
from scalekd.common.errors import UserError
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.provenance import git_state, machine, versions
from scalekd.config.recipe import Config, check_config
from scalekd.data.batches import Batch
from scalekd.distill.build import build
from scalekd.distill.compiled import compile_step
from scalekd.distill.run import DistillationRun
from scalekd.methods.names import METHODS
from scalekd.models.student_file import load_student
from scalekd.runs.distillation import execute
from scalekd.train.engine import looks_at_every_step, train, train_step
from scalekd.train.log import RunLog

LOSS, GRADIENT = 1e-5, 1e-4  # float32: of a loss relative to itself; of a gradient relative to the largest one
ROUNDING = (
    5  # times the CPU's own error in float32, against float64, is allowed too: at initial weights it can be large
)
AFTER_STEPS = 2e-3  # float32: of the losses, relative, after STEPS steps that change the weights
HALF_TEACHER = 5e-2  # the same with the teacher in bf16
RESUMED = 1e-3  # a resumed run without deterministic algorithms: of a weight, relative to the largest in its tensor
STEPS = 6


def environment(device: str) -> dict[str, Any]:
    """Versions and the machine."""
    found: dict[str, Any] = versions() | {"git": git_state(), "machine": machine(torch.device(device)), "passed": True}
    found |= {"system": platform.platform(), "cuda": torch.version.cuda}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_gb": properties.total_memory / 1e9, "capability": [properties.major, properties.minor]}
        found |= {"multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    return found


# ---------------------------------------------------------------- single steps


def float32_methods(device: str, methods: list[str] | None = None) -> dict[str, Any]:
    """A step of each method, or of all, in float32 without TF32: losses and gradients against the CPU in float64."""
    _without_tf32()
    return _verdict({name: _float32_step(name, device) for name in methods or METHODS})


def _float32_step(method: str, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    small = {"num_classes": 10, "img_size": 48, "depth": 4}
    teacher = timm.create_model("test_vit", **small)
    if method == "deit":  # needs a student with a second head
        student = timm.create_model("deit_tiny_distilled_patch16_224", embed_dim=48, num_heads=3, **small)
    else:
        student = timm.create_model("test_resnet", num_classes=10)
    distiller = Distiller(student, teacher, {method: {}}, image_size=(48, 48)).train()
    with torch.no_grad():
        for tensor in distiller.held():
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.add_(0.05 * torch.randn_like(tensor))
    pixels, targets = torch.rand(4, 3, 48, 48), torch.arange(4)
    return _against_cpu(distiller, pixels, targets, device)


def float32_pair(device: str, pair: str, form: str) -> dict[str, Any]:
    """The same for a pair of full size."""
    _without_tf32()
    torch.manual_seed(0)
    run = run_of(pair, form, 2, LEVERS["float32"], torch.device("cpu"))
    size = (2, 3, *map(max, run.distiller.image_size, run.distiller.teacher_size))
    return _verdict({pair: _against_cpu(run.distiller, torch.rand(size), torch.tensor([1, 3]), device)})


def _against_cpu(distiller: Distiller, pixels: Tensor, targets: Tensor, device: str) -> dict[str, Any]:
    """The errors of the device and of the CPU in float32, both against the CPU in float64, and whether the device's is
    within the tolerance or a few times the CPU's."""
    exact = _step(copy.deepcopy(distiller).double(), pixels.double(), targets)
    there = _errors(_step(copy.deepcopy(distiller).to(device), pixels.to(device), targets.to(device)), exact)
    here = _errors(_step(distiller, pixels, targets), exact)
    passed = all(
        there[key] <= max(most, ROUNDING * here[key]) for key, most in (("loss", LOSS), ("gradient", GRADIENT))
    )
    return {"loss": there["loss"], "gradient": there["gradient"], "gradient_cpu": here["gradient"], "passed": passed}


Losses, Gradients = dict[str, float], dict[str, Tensor]


def _step(distiller: Distiller, pixels: Tensor, targets: Tensor) -> tuple[Losses, Gradients]:
    torch.manual_seed(1)
    with _DrawnOnTheCPU():
        losses = distiller(pixels, targets)
    losses["total"].backward()
    gradients = {name: p.grad.cpu().double() for name, p in distiller.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in losses.items()}, gradients


def _errors(found: tuple[Losses, Gradients], exact: tuple[Losses, Gradients]) -> dict[str, float]:
    (losses, gradients), (true_losses, true_gradients) = found, exact
    largest = max(g.abs().max().item() for g in true_gradients.values())
    return {
        "loss": max(abs(losses[name] - value) / max(abs(value), 1e-6) for name, value in true_losses.items()),
        "gradient": max((gradients[name] - g).abs().max().item() / largest for name, g in true_gradients.items()),
    }


class _DrawnOnTheCPU(TorchFunctionMode):
    """Random numbers of methods are the same on every device and in every precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.rand, torch.randn, torch.randint):
            return func(*args, **kwargs)
        to = {key: kwargs.pop(key) for key in ("device", "dtype") if key in kwargs}
        return func(*args, **kwargs).to(**to)


def _without_tf32() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def levers_agree(device: str, pair: str, batch: int, levers: list[str], backend: str | None = None) -> dict[str, Any]:
    """STEPS steps with a learning rate, with each lever and without, from the same weights and on the same images.

    In float32 without TF32 and with deterministic algorithms where there are some, so that a wrong order of kernels cannot
    pass for rounding. backend: of torch.compile; None for its own.
    """
    _without_tf32()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        wanted = _losses_after(device, pair, batch, {}, backend)
        found = {}
        for name in levers:
            losses = _losses_after(device, pair, batch, LEVERS[name], backend)
            apart = max(abs(losses[key] - value) / max(abs(value), 1e-6) for key, value in wanted.items())
            found[name] = {"loss": apart, "passed": apart < (HALF_TEACHER if "teacher" in name else AFTER_STEPS)}
    finally:
        torch.use_deterministic_algorithms(False)
    return _verdict(found)


def _losses_after(device: str, pair: str, batch: int, values: dict[str, Any], backend: str | None) -> dict[str, float]:
    torch.manual_seed(0)
    run = run_of(pair, "default", batch, values | LEVERS["float32"], torch.device(device))
    if run.config.train.compile:
        compile_step(run.distiller, batch, run.config.train.cuda_graphs, **({"backend": backend} if backend else {}))
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-4
    generator = torch.Generator().manual_seed(2)
    size = (batch, 3, *map(max, run.distiller.image_size, run.distiller.teacher_size))
    losses: dict[str, Tensor] = {}
    for step in range(STEPS):
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        made = Batch(_pinned(pixels, device), _pinned(torch.arange(batch) % classes_of(pair_of(pair)), device))
        losses = train_step(run.model.train(), [made], run, step, looks_at_every_step(run)).losses
    return {name: value.item() for name, value in losses.items()}


def _pinned(tensor: Tensor, device: str) -> Tensor:
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


# ---------------------------------------------------------------- whole runs


def _small(folder: Path, **train: Any) -> Config:
    """A recipe of a second or two, with images of its own in `folder`."""
    pixels = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for i in range(3 * count):
            path = folder / part / f"class-{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return check_config(
        {
            "name": "small",
            "data": {"train": str(folder / "train"), "val": str(folder / "val"), "image_size": 48, "workers": 0},
            "augment": {"crop": "pad", "mixup": 0.2, "erase": 0.25},
            "student": {"model": "test_resnet"},
            "teacher": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
            "losses": {"ce": {}, "kd": {}, "scalekd": {}},
            "train": {"epochs": 2, "batch_size": 8, "log_every": 1, "save_minutes": 0} | train,
            "track": [],
        },
        "small",
    )


def half_precision(device: str, precision: str) -> dict[str, Any]:
    """Steps in bf16 or fp16; in fp16 also a step whose gradient overflows, which must change no weight."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(_small(Path(folder), precision=precision), torch.device(device))
        batches = list(run.train_batches(run.train_sampler(steps=3), workers=0))
    losses = [train_step(run.model.train(), [batch], run, i).losses["total"].item() for i, batch in enumerate(batches)]
    found: dict[str, Any] = {"losses": losses, "passed": bool(np.isfinite(losses).all())}
    if precision == "fp16":
        before, scale = _weights(run), 2.0**60
        run.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=scale)
        train_step(run.model, [batches[0]], run, 3)
        skipped = all(torch.equal(a, b) for a, b in zip(before, _weights(run)))
        halved = run.scaler.get_scale() == scale / 2
        run.scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=2.0**8)
        train_step(run.model, [batches[0]], run, 4)
        moved = any(not torch.equal(a, b) for a, b in zip(before, _weights(run)))
        found |= {"overflow_skipped": skipped, "scale_halved": halved, "next_step_moves": moved}
        found["passed"] &= skipped and halved and moved
    return found


def _weights(run: DistillationRun) -> list[Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


class _Interrupted(Exception):
    pass


def resume(device: str, deterministic: bool) -> dict[str, Any]:
    """A run that was stopped and resumed against one that was not: bit for bit with deterministic algorithms."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = _small(Path(folder))
            whole = _trained(config, Path(folder) / "whole", device, None)
            with contextlib.suppress(_Interrupted):
                _trained(config, Path(folder) / "resumed", device, stop_at=4)
            resumed = _trained(config, Path(folder) / "resumed", device, None)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = [(a.float(), b.float()) for a, b in zip(whole, resumed)]
    apart = max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in pairs)
    return {"largest_difference": apart, "passed": apart == 0 if deterministic else apart < RESUMED}


def _trained(config: Config, folder: Path, device: str, stop_at: int | None) -> list[Tensor]:
    """The weights after a run into `folder`, which is resumed if it holds a checkpoint."""
    folder.mkdir(exist_ok=True)
    run = build(config, torch.device(device))
    set_rate = run.schedule.step_update

    def step_update(step: int) -> None:
        if step == stop_at:
            raise _Interrupted
        set_rate(step)

    run.schedule.step_update = step_update  # type: ignore[method-assign]
    log = RunLog(folder, Console(file=io.StringIO()))
    try:
        train(run, folder, log)
    finally:
        log.close()
    return [value.cpu() for value in run.student.state_dict().values()]


def one_process(device: str) -> dict[str, Any]:
    """Steps under DDP with NCCL (gloo on a CPU) and, on a GPU, synchronised batch norms: in one process."""
    on_gpu = torch.device(device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        config = _small(Path(folder), sync_batchnorm=on_gpu)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            run = build(config, torch.device(device))
            model = DistributedDataParallel(run.model, device_ids=[run.device.index or 0] if on_gpu else None)
            batches = run.train_batches(run.train_sampler(steps=3), workers=0)
            losses = [train_step(model.train(), [b], run, i).losses["total"].item() for i, b in enumerate(batches)]
        finally:
            torch.distributed.destroy_process_group()
    norms = sum(isinstance(m, torch.nn.SyncBatchNorm) for m in run.model.modules())
    return {
        "losses": losses,
        "sync_batchnorms": norms,
        "passed": bool(np.isfinite(losses).all()) and (norms > 0) == on_gpu,
    }


def export(device: str) -> dict[str, Any]:
    """A whole run with pre-flight and export; the exported student, loaded on the CPU, against the trained one."""
    with tempfile.TemporaryDirectory() as folder:
        config, out = _small(Path(folder), epochs=1), Path(folder) / "run"
        summary = execute(config, out, torch.device(device), Console(file=io.StringIO()), look=False)
        student, card = load_student(out)
        trained = torch.load(out / "last.pt", map_location="cpu", weights_only=False)["deployed"]
        same = all(torch.equal(value, trained[name]) for name, value in student.state_dict().items())
    found = {
        "top1": summary["top1"],
        "reload_difference": summary["reload_difference"],
        "classes": len(card["classes"]),
    }
    return found | {"passed": same}


def out_of_memory(device: str) -> dict[str, Any]:
    """What is said when memory ends: on a GPU of a step that may use 1 % of it, on a CPU of one huge tensor."""
    chosen, message = torch.device(device), ""
    try:
        with explain_out_of_memory(chosen, "Try a smaller batch."):
            if chosen.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(0.01, chosen)
            torch.empty(
                2**50 if chosen.type == "cpu" else torch.cuda.mem_get_info(chosen)[1] // 2,
                dtype=torch.uint8,
                device=chosen,
            )
    except UserError as error:
        message = str(error)
    finally:
        if chosen.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, chosen)
    return {"message": message, "passed": "out of memory" in message and "Try a smaller batch." in message}


def _verdict(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return found | {"passed": all(values["passed"] for values in found.values())}
