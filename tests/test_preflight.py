"""What the pre-flight says of a teacher's accuracy on a sample, and how it counts."""

from __future__ import annotations

import pytest
import torch

from scalekd import preflight
from scalekd.build import build
from scalekd.config import check_config


@pytest.mark.parametrize(
    "top1, images, known, status, told",
    [
        (33.0, 512, None, "warn", "That is chance level (33.3 %): wrong weights, or classes in another order?"),
        (0.0, 512, None, "warn", "That is chance level (33.3 %)"),
        (33.0, 30, None, "warn", "That cannot be told from chance (33.3 %) on 30 images"),
        (55.0, 30, None, "warn", "That cannot be told from chance (33.3 %) on 30 images"),
        (55.0, 30, 90.0, "warn", "Far below its known figure"),
        (50.0, 512, 90.0, "warn", "Far below its known figure"),
        (80.0, 30, 90.0, "ok", ""),
        (50.0, 512, None, "ok", ""),
    ],
)
def test_how_strongly_chance_is_said(light_recipe, monkeypatch, top1, images, known, status, told):
    light_recipe["teacher"]["top1"] = known
    run = build(check_config(light_recipe, "test"), torch.device("cpu"))
    monkeypatch.setattr(preflight, "evaluate", lambda *args: {"top1": top1, "images": images})
    (check,) = preflight._teacher_accuracy(run)
    assert check.status == status and check.fix.startswith(told) and bool(check.fix) == bool(told)
    assert check.text.startswith(f"{top1:.1f} % on {images} validation images")


@pytest.mark.parametrize("epochs, told", [(1, "for 1 epoch of 3 steps,"), (2, "for 2 epochs of 3 steps,")])
def test_one_epoch_is_no_epochs(cli, recipe_file, epochs, told):
    shown = cli("train", recipe_file, "--dry-run", f"train.epochs={epochs}", "losses={ce: {}}", "teacher=null")
    assert told in " ".join(shown.out.split())
