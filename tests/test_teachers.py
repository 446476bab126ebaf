"""`scalekd teachers`: what it says of each family is what happens when the methods are built and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from scalekd.cli import main
from scalekd.distiller import Distiller
from scalekd.errors import UserError
from scalekd.teachers import FAMILIES, METHODS, ON_LOGITS, examine, families, markdown

HEADLESS = {"DINOv2", "DINOv2, registers", "DINOv3", "SigLIP 2", "EVA-02"}


@pytest.mark.slow
def test_the_families():
    found = {entry["family"]: entry for entry in families()}
    assert list(found) == list(FAMILIES)
    for family, entry in found.items():
        refused = {method for method, reason in entry["methods"].items() if reason}
        expected = {"kd", "bkd", "dkd", "dist", "ofa", "srrl"} if family in HEADLESS else set()
        assert refused == expected | ({"tpp", "scalekd"} if family == "Hiera" else set()), family
        assert len(entry["maps"]) == 4
    assert found["DINOv3"]["prefix_tokens"] == 5 and found["Swin"]["maps"][-1] == [768, 7, 7]
    docs = Path(__file__).parent.parent / "docs" / "results" / "teachers.md"
    assert docs.read_text() == markdown(list(found.values())), "scalekd teachers --markdown > docs/results/teachers.md"


# small members of families, built so small that a step takes a moment
SMALL = {
    "vit_small_patch16_dinov3": {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", SMALL)
def test_what_it_says_is_what_happens(name):
    """Every method that the real model is said to serve takes a step with a small one of its class; others refuse."""
    size = SMALL[name]["img_size"]
    said = examine(name)["methods"]
    teacher = timm.create_model(name, **SMALL[name])
    classes = teacher.num_classes or 5
    for method, reason in said.items():
        student = timm.create_model("test_resnet", num_classes=classes)
        losses = {"ce": {}, method: {"negatives": 8} if method == "crd" else {}}
        if reason:
            if method in ("kd", "bkd", "dkd", "dist"):
                continue  # a mismatch of classes, which pre-flight tells
            with pytest.raises((UserError, ValueError)):
                Distiller(student, teacher, losses, image_size=(size, size))
            continue
        distiller = Distiller(student, teacher, losses, image_size=(size, size)).train()
        terms = distiller(torch.rand(4, 3, size, size), torch.arange(4) % classes)
        terms["total"].backward()
        assert torch.isfinite(terms["total"]) and len(terms) > 2


def test_a_model_of_one_s_own(capsys):
    assert main(["teachers", "test_vit", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert set(entry["methods"]) == {m for m in METHODS if m not in ("ce", "bce")} and "kd" in ON_LOGITS
    assert "cannot be resumed" not in str(entry)
    assert main(["teachers", "resnet51q"]) == 0 and main(["teachers", "resnet5O"]) == 2


def test_a_model_without_maps_serves_on_logits():
    told = examine("crossvit_9_240")["methods"]
    assert told["kd"] is None and "no stage maps" in told["fd"]
