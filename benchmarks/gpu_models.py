"""The pairs, forms and levers of `gpu.py`, as recipes and as runs without images."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from literal import LiteralScaleKD
from steps import PAIRS, PUBLISHED, Pair, losses_of

from scalekd.config.recipe import Config, check_config
from scalekd.cost.plan_measured import untrained_run
from scalekd.distill.run import DistillationRun

TINY = Pair(
    "test_vit", "test_resnet", 48, 8, (1, 1), "adamw", {"depth": 4, "img_size": 48, "num_classes": 10}, {"num_classes": 10}
)  # fmt: skip
ORDER = ["swin-s-resnet50", "swin-l-vit-s", "swin-l-resnet50", "eva-l-mixer-s"]
FORMS = ["floor", "literal", "kd", "fd", "published", "default"]
LEVERS: dict[str, dict[str, Any]] = {  # name -> values of `train`, and of `teacher` under "teacher"
    "plain": {},
    "float32": {"precision": "float32"},
    "tf32": {"precision": "float32", "tf32": True},
    "contiguous": {"channels_last": False},
    "teacher": {"teacher": {"precision": "bf16"}},
    "streams": {"streams": True},
    "teacher+streams": {"streams": True, "teacher": {"precision": "bf16"}},
    "checkpointing": {"grad_checkpointing": True},
    "compile": {"compile": True},
    "teacher+compile": {"compile": True, "teacher": {"precision": "bf16"}},
    "streams+compile": {"compile": True, "streams": True},
    "graphs": {"compile": True, "cuda_graphs": True},
    "teacher+graphs": {"compile": True, "cuda_graphs": True, "teacher": {"precision": "bf16"}},
}


@lru_cache
def pair_of(name: str) -> Pair:
    return TINY if name == "tiny" else PAIRS[name]


def losses_for(pair: Pair, form: str) -> dict[str, dict[str, Any]]:
    """The losses of a form, as in a recipe. `floor` has its label loss, and a teacher that runs for nothing."""
    if form == "floor":
        return {"ce": {}}
    if form in ("kd", "fd"):
        return losses_of(pair.heads)[form]
    options = {"heads": list(pair.heads)} | (PUBLISHED if form == "published" else {})
    return {"ce": {}, "kd": {}} | ({} if form == "literal" else {"scalekd": options})


def recipe(name: str, form: str, batch: int, values: dict[str, Any]) -> Config:
    """The recipe of a row: bf16 and channels-last, with the values of some levers on top."""
    pair, train = pair_of(name), {key: value for key, value in values.items() if key != "teacher"}
    teacher = {"model": pair.teacher, "weights": "random", "kwargs": dict(pair.teacher_kwargs)}
    return check_config(
        {
            "name": f"{name} {form}",
            "data": {"train": "none", "val": "none", "image_size": pair.size, "workers": 0},
            "student": {"model": pair.student, "kwargs": dict(pair.student_kwargs)},
            "losses": losses_for(pair, form),
            "train": {"epochs": 1, "batch_size": batch, "precision": "bf16", "channels_last": True} | train,
            "optim": {"name": pair.optimizer},
        }
        | ({} if form == "floor" else {"teacher": teacher | values.get("teacher", {})}),
        f"{name} {form}",
    )


def classes_of(pair: Pair) -> int:
    return int(pair.student_kwargs.get("num_classes", 1000))


def run_of(name: str, form: str, batch: int, values: dict[str, Any], device: torch.device) -> DistillationRun:
    """A run of that recipe without images, with a learning rate of 0. `literal` has `LiteralScaleKD` as a loss too."""
    pair = pair_of(name)
    config = recipe(name, form, batch, values)
    losses: dict[str, Any] = dict(config.losses)
    if form == "literal":
        losses["literal"] = partial(LiteralScaleKD, heads=pair.heads)
    with device:  # initial values of large models are drawn faster there
        return untrained_run(config, device, classes_of(pair), losses)
