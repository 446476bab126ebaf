"""Reports versions and devices of this machine, and whether a distillation step works on them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from scalekd.common.processor import bf16_instructions

PACKAGES = ["torch", "torchvision", "timm", "numpy", "pydantic", "safetensors", "tensorboard"]
OPTIONAL = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}  # package -> extra
OPTIONAL |= {name: name for name in ("wandb", "mlflow", "trackio", "simplejpeg")}
OPTIONAL |= {"matplotlib": "figures", "faster_coco_eval": "detection", "segmentation_models_pytorch": "segmentation"}


def examine(as_json: bool) -> int:
    """Prints versions, devices and problems. Returns 1 if a run could not start, otherwise 0."""
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": bf16_instructions(),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
    }
    report |= {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    report["torch"] = torch.__version__  # with the build: +cpu, +cu126, ...
    report["gpus"] = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    report["problems"] = problems = _problems()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            if key != "problems":
                print(f"{key:14} {', '.join(value) or 'none' if isinstance(value, list) else value or _absent(key)}")
        for problem in problems:
            print(f"problem        {problem}")
        print("a run can start" if not problems else "a run cannot start until this is fixed")
    return 1 if problems else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(package: str) -> str:
    return f"not installed: pip install 'scalekd[{OPTIONAL[package]}]'" if package in OPTIONAL else "not installed"


def _problems() -> list[str]:
    """Runs a small distillation step on every device and checks its gradients; returns a line for each failure."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    problems = []
    for device in devices:
        try:
            _smallest_step(torch.device(device))
        except Exception as error:  # any failure is a finding of this command
            problems.append(f"{device}: a distillation step fails: {type(error).__name__}: {error}")
    return problems


def _smallest_step(device: torch.device) -> None:
    """A ScaleKD step between two tiny models. Raises if a gradient is missing or not finite."""
    import timm

    from scalekd.checks.step import dead_parameters
    from scalekd.distill.distiller import Distiller

    student = timm.create_model("test_resnet", num_classes=3)
    teacher = timm.create_model("test_vit", num_classes=3, depth=4, img_size=64)
    distiller = Distiller(student, teacher, {"ce": {}, "kd": {}, "scalekd": {}}, image_size=(64, 64)).to(device)
    losses = distiller(torch.rand(4, 3, 64, 64, device=device), torch.arange(4, device=device) % 3)
    losses["total"].backward()
    grads = [p.grad for p in distiller.parameters() if p.grad is not None]
    if dead_parameters(distiller) or not all(bool(g.isfinite().all()) for g in grads):
        raise RuntimeError("a gradient is missing or not finite")
