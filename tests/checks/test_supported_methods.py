"""`scalekd teachers`: what it says of each family is what happens when the methods are built and run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from scalekd.checks.supported_methods import FAMILIES, ON_LOGITS, examine, families, markdown
from scalekd.cli.app import main
from scalekd.common.errors import UserError
from scalekd.config.losses import reads_logits, reads_teacher
from scalekd.distill.distiller import Distiller
from scalekd.methods.names import METHODS
from scalekd.models.embeddings import is_embedding

READ_LOGITS = {name for name in METHODS if reads_teacher(name) and reads_logits(name)}
HEADLESS = {"DINOv2", "DINOv2, registers", "DINOv3", "SigLIP 2", "EVA-02", "MAE", "Hiera, MAE"}
EMBEDDINGS = {"CLIP": 512, "Perception Encoder": 512}


@pytest.mark.slow
def test_the_families():
    found = {entry["family"]: entry for entry in families()}
    assert list(found) == list(FAMILIES)
    for family, entry in found.items():
        refused = {method for method, reason in entry["methods"].items() if reason}
        expected = set(READ_LOGITS) if family in {*HEADLESS, *EMBEDDINGS} else set()
        expected |= {"srrl", "wkd_l"} if family in HEADLESS else set()
        assert refused == expected | ({"tpp", "scalekd"} if family.startswith("Hiera") else set()), family
        assert len(entry["maps"]) == 4
        assert entry["embedding"] == EMBEDDINGS.get(family, 0)
        assert entry["classes"] == (0 if family in {*HEADLESS, *EMBEDDINGS} else 1000)
    assert found["DINOv3"]["prefix_tokens"] == 5 and found["Swin"]["maps"][-1] == [768, 7, 7]
    docs = Path(__file__).parents[2] / "docs" / "results" / "teachers.md"
    assert docs.read_text() == markdown(list(found.values())), "scalekd teachers --markdown > docs/results/teachers.md"


def test_which_methods_read_the_logits():
    assert {"kd", "dist", "ofa"} <= READ_LOGITS and not READ_LOGITS & {"ce", "fd", "srrl", "scalekd"}


def test_every_family_is_named_with_the_weights_it_stands_for():
    assert set(FAMILIES.values()) <= set(timm.list_pretrained())
    for family, name in FAMILIES.items():
        outputs = timm.get_pretrained_cfg(name).num_classes
        assert (outputs == 0) == (family in HEADLESS) and is_embedding(name, outputs) == (family in EMBEDDINGS)


def test_embeddings_are_told_from_classes():
    """Over all of timm's weights: those that were trained with texts, by their names, and have a projection."""
    found = {
        name
        for name in timm.list_pretrained()
        if (cfg := timm.get_pretrained_cfg(name)) is not None and is_embedding(name, cfg.num_classes)
    }
    with_texts = {
        name
        for name in timm.list_pretrained()
        if re.search("clip|_pe_core", name) and "_ft_in" not in name and timm.get_pretrained_cfg(name).num_classes
    }
    assert found == with_texts and len(found) > 100
    assert is_embedding("vit_base_patch16_clip_224", 512) and not is_embedding("vit_base_patch16_clip_224", 10)
    assert not is_embedding("resnet50", 512)


def test_a_teacher_with_an_embedding_serves_by_its_features():
    told = examine("vit_pe_core_tiny_patch16_384.fb")
    refused = {method for method, reason in told["methods"].items() if reason}
    assert (told["classes"], told["embedding"]) == (0, 512) and refused == READ_LOGITS
    remedy = "its 512 outputs are an embedding; `scalekd head` fits a classifier for your classes"
    assert told["methods"]["kd"] == told["methods"]["ofa"] == remedy


def test_a_family_names_the_models_that_start_with_it():
    with pytest.raises(
        UserError, match=r"timm has no model `swin_tiny`. timm names that .*: swin_tiny_patch4_window7_224"
    ):
        examine("swin_tiny")


def test_a_tag_that_timm_does_not_have():
    with pytest.raises(UserError, match=r"Invalid pretrained tag .*Did you mean `vit_base_patch16_224.mae`"):
        examine("vit_base_patch16_224.maee")


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
            if method in ON_LOGITS:
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
    assert "not supported" not in str(entry)
    assert main(["teachers", "resnet51q"]) == 0 and main(["teachers", "resnet5O"]) == 2


def test_a_model_without_maps_serves_on_logits():
    told = examine("crossvit_9_240")["methods"]
    assert told["kd"] is None and "no stage maps" in told["fd"]
