"""Small finished runs on disk, for tests of analyses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from small_images import write_images
from torch import nn
from whole_runs import CPU, TINY, changed

from scalekd.common.sections import to_yaml
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.run import DistillationRun
from scalekd.train import checkpoint
from scalekd.train.resume import Progress, snapshot

LOSSES: dict[str, Any] = {
    "plain": {"ce": {}},
    "kd": {"ce": {}, "kd": {}},
    "fd": {"ce": {}, "fd": {"stages": [3, 4]}},
    "cap": {"ce": {}, "cap": {}},
    "scalekd": {"ce": {}, "kd": {}, "scalekd": {"shared": False, "expansion": 4}},  # as in the paper
    "shared": {"ce": {}, "kd": {}, "scalekd": {}},
    "released": {"ce": {}, "scalekd": {"shared": False, "student_views": "first", "teacher_norm": False}},
}


def trained_runs(root: Path, *names: str, **sections: Any) -> dict[str, DistillationRun]:
    """Runs in `root`/NAME, by name as in `LOSSES`, on 24 images of three classes, validated on 12.

    Instead of training, noise is added to every trainable weight: with initial weights the projectors differ between
    positions by little more than rounding, and all students are alike. The last bias makes the predicted class differ
    from image to image.
    """
    if not (root / "images").exists():
        write_images(root / "images" / "train", per_class=8)
        write_images(root / "images" / "val", per_class=4, seed=1)
    runs = {}
    for i, name in enumerate(names):
        recipe = copy.deepcopy(TINY)
        recipe["data"] |= {"train": str(root / "images" / "train"), "val": str(root / "images" / "val")}
        recipe = changed(recipe, losses=LOSSES[name], **sections)
        if name == "plain":
            del recipe["teacher"]
        run = runs[name] = build(check_config(recipe, name), CPU)
        noise = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in run.distiller.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
        run.distiller.eval()
        _vary_predictions(run)
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(to_yaml(run.config))
        checkpoint.save(root / name / "last.pt", snapshot(run, Progress(step=run.total_steps)))
    return runs


@torch.no_grad()
def _vary_predictions(run: DistillationRun) -> None:
    d, head = run.distiller, run.distiller.student.get_classifier()
    if isinstance(head, nn.Linear):
        pixels = torch.stack([run.val_images[0, i].image for i in range(len(run.val_images))]) / 255
        head.bias -= d.student((pixels - d.student_mean) / d.student_std).mean(0)
