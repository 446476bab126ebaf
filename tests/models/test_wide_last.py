"""`vit_wide_last` and `vit_lift` compute what their paper's release does, from a DeiT and the layers they add."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer

from scalekd.models.build import build_model
from scalekd.models.names import ADDED
from scalekd.models.options import Model
from scalekd.models.stages import StageView
from scalekd.report.card import load_lines, nature

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
WIDE = SMALL | {"last_dim": 48}
KWARGS = {"vit_wide_last": WIDE | {"last_heads": 6}, "vit_lift": WIDE}


def built(name, size=(16, 24), weights=None, **more):
    spec = Model(model=name, kwargs=KWARGS[name] | more, weights=weights)
    model, _ = build_model(spec, channels=3, image_size=size, classes=5, where="student")
    return model.eval()


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def normed(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def narrow_tokens(model, images, blocks):
    """The tokens of a plain ViT with the same weights after its first `blocks` blocks."""
    plain = VisionTransformer(img_size=(16, 24), num_classes=0, **SMALL).eval()
    own = {k: v for k, v in model.state_dict().items() if plain.state_dict().get(k, v[:0]).shape == v.shape}
    plain.load_state_dict(own, strict=False)
    return plain.blocks[:blocks](plain._pos_embed(plain.patch_embed(images)))


@torch.no_grad()
def test_wide_last_by_hand():
    model, images = randomised(built("vit_wide_last")), torch.randn(2, 3, 16, 24)
    linear, norm, block = model.blocks[3]
    assert linear.bias is None and block.attn.num_heads == 6 and block.mlp.fc1.out_features == 4 * 48
    wide = block(normed(narrow_tokens(model, images, 3) @ linear.weight.T, norm))
    logits = normed(wide[:, 0], model.norm) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), logits)
    view = StageView(model, name="vit_wide_last", image_size=(16, 24))
    assert view.shapes.maps == ((24, 2, 3),) * 3 + ((48, 2, 3),) and view.shapes.final == (48, 2, 3)
    torch.testing.assert_close(view(images).maps[3].flatten(2), wide[:, 1:].mT)


@torch.no_grad()
def test_lift_by_hand():
    model, images = randomised(built("vit_lift")), torch.randn(2, 3, 16, 24)
    linear, norm = model.norm
    assert linear.bias is None
    lifted = normed(narrow_tokens(model, images, 4) @ linear.weight.T, norm)[:, 1:]
    logits = lifted.mean(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), logits)
    view = StageView(model, name="vit_lift", image_size=(16, 24))
    assert view.shapes.maps == ((24, 2, 3),) * 4 and view.shapes.final == (48, 2, 3)
    torch.testing.assert_close(view(images).final.flatten(2), lifted.mT)


@pytest.mark.parametrize("name", KWARGS)
def test_default_size(name):
    """A DeiT-Ti with one wide block, or with one more layer, and a wide head."""
    model, _ = build_model(Model(model=name), channels=3, image_size=(224, 224), classes=1000, where="student")
    narrow, wide = 192, 384
    extra = narrow * wide + 2 * wide
    stem = (16 * 16 * 3 + 1 + 197 + 1) * narrow
    blocks = [12 * d * d + 13 * d for d in (narrow, wide)]
    count = {"vit_wide_last": 11 * blocks[0] + blocks[1] + 2 * wide, "vit_lift": 12 * blocks[0]}[name]
    assert sum(p.numel() for p in model.parameters()) == stem + count + extra + (wide + 1) * 1000


@pytest.mark.parametrize("name", KWARGS)
def test_starts_as_a_vit_does(name):
    """Linear layers near 0 without bias, in the added ones too; drop path rises to the last block."""
    model = built(name, drop_path_rate=0.2)
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            assert key.startswith("patch_embed") or not p.any(), key
        elif p.ndim == 2:
            assert p.detach().std() == pytest.approx(0.02, rel=0.2), key
    last = model.blocks[-1][2] if name == "vit_wide_last" else model.blocks[-1]
    assert last.drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("name", KWARGS)
def test_weights_for_another_image_size(tmp_path, name):
    file = tmp_path / "student.safetensors"
    save_file(built(name, size=(16, 16)).state_dict(), file)
    model = built(name, size=(32, 32), weights=str(file))
    assert model.pos_embed.shape == (1, 17, 24) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_cards_import_what_adds_a_model_to_timm():
    entries = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {name: module for name, module in entries.items() if module.startswith("scalekd")} == ADDED
    for name in (*ADDED, "resnet18"):
        card = {"model": name, "mean": [0.5] * 3, "classes": []}
        needed = f"import {ADDED.get(name)}"
        assert (needed in load_lines(card, "local-dir:.").splitlines()) == (name in ADDED)
        assert (needed in nature(card)) == ("does not need scalekd" not in nature(card)) == (name in ADDED)
