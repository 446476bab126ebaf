"""Released weights: models written anew in the releases' structure give the same outputs as the imported students."""

from __future__ import annotations

import json
import types
from argparse import Namespace
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.common.errors import UserError
from scalekd.models import released_keys, released_weights
from scalekd.models.options import Model
from scalekd.models.released_keys import RULES, SIGNS
from scalekd.models.released_weights import patches_merged, recognise
from scalekd.models.student_file import load_student
from scalekd.models.weights.file import read_file
from scalekd.runs.imported import import_student

CLASSES = 3


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and buffer away from its initial value, so that two that change places show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim < 2 or "pos_embed" in name or "table" in name or "gamma" in name:
                tensor.normal_(std=0.5)
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model.eval()


# ------------------------------------------------ the structures of mmclassification, written anew


class Classifier(nn.Module):
    """ImageClassifier: backbone, average over the map where there is one, head.fc."""

    def __init__(self, backbone: nn.Module, width: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return self.head.fc(x.mean((-2, -1)) if x.ndim == 4 else x)


class ConvModule(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.conv = nn.Conv2d(*args, **kwargs, bias=False)
        self.bn = nn.BatchNorm2d(args[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, average: bool, shortcut: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if shortcut:
            pooled = average and stride > 1
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if pooled else []
            conv = nn.Conv2d(inputs, 4 * width, 1, 1 if pooled else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x)).relu()


class ResNet(nn.Module):
    """Depths 2, 1, 1, 1 and 8 to 32 channels. deep: V1d."""

    def __init__(self, deep: bool):
        super().__init__()
        self.deep = deep
        if deep:
            self.stem = nn.Sequential(
                ConvModule(3, 32, 3, 2, 1), ConvModule(32, 32, 3, 1, 1), ConvModule(32, 64, 3, 1, 1)
            )
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate((2, 1, 1, 1)):
            width, blocks = 8 * (i + 1), []
            for j in range(depth):
                blocks.append(Bottleneck(inputs, width, 2 if i and not j else 1, deep, shortcut=not j))
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.deep else self.bn1(self.conv1(x)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class FFN(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.0))
        self.layers = nn.Sequential(first, nn.Linear(hidden, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int, norm: bool = False):
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x).flatten(2).transpose(1, 2)
        return self.norm(x) if self.norm else x


def attend(qkv: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    b, n, width = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, -1)


class ViTLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = FFN(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.proj(attend(self.attn.qkv(self.ln1(x)), self.heads))
        return x + self.ffn(self.ln2(x))


class ViT(nn.Module):
    """As in the fork: the class token is a parameter even where it is taken out before the first layer.

    after: the norm comes after the average over the tokens.
    """

    def __init__(self, token: bool, after: bool = False, both: bool = False):
        super().__init__()
        self.token, self.after = token, after
        self.patch_embed = PatchEmbed(24, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, 24))
        self.layers = nn.ModuleList([ViTLayer(24, 3) for _ in range(2)])
        if not after:
            self.ln1 = nn.LayerNorm(24, 1e-6)
        if after or both:
            self.ln2 = nn.LayerNorm(24, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = x if self.token else x[:, 1:]
        for layer in self.layers:
            x = layer(x)
        if self.after:
            return self.ln2(x[:, int(self.token) :].mean(1))
        x = self.ln1(x)
        return x[:, 0] if self.token else x.mean(1)


class WindowAttention(nn.Module):
    """Shifted by half a window where `shift`; other regions are told apart by their numbers, not by a mask's."""

    def __init__(self, width: int, heads: int, window: int, shift: bool):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shift else 0
        self.w_msa = nn.Module()
        self.w_msa.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.w_msa.qkv, self.w_msa.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        spots = [(i, j) for i in range(window) for j in range(window)]
        index = [[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in spots] for a, b in spots]
        self.w_msa.register_buffer("relative_position_index", torch.tensor(index))

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.transpose(2, 3).reshape(-1, self.window**2, c)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        shift = self.shift if h > self.window else 0
        table = self.w_msa.relative_position_bias_table[self.w_msa.relative_position_index.flatten()]
        bias = table.view(self.window**2, self.window**2, self.heads).permute(2, 0, 1)[None]
        if shift:
            edges = [0] * (h - self.window) + [1] * (self.window - shift) + [2] * shift
            region = torch.tensor([[3 * i + j for j in edges] for i in edges])[None, :, :, None]
            region = self.windows(region)[..., 0]
            apart = (region[:, :, None] != region[:, None]).float() * -100
            bias = bias + apart.repeat(b, 1, 1)[:, None]
        y = self.windows(x.roll((-shift, -shift), (1, 2)))
        y = self.w_msa.proj(attend(self.w_msa.qkv(y), self.heads, bias))
        y = y.view(b, h // self.window, w // self.window, self.window, self.window, c).transpose(2, 3)
        return y.reshape(b, h, w, c).roll((shift, shift), (1, 2))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shift)
        self.ffn = FFN(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Merging(nn.Module):
    """By nn.Unfold, which gives channel by channel the four neighbours row by row."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).transpose(1, 2)
        return self.reduction(self.norm(x)).view(b, h // 2, w // 2, 2 * c)


class Swin(nn.Module):
    """64x64 pixels: maps of 16, 8, 4, 2; window 2; depths 2, 2, 1, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(8, 4, norm=True)
        self.stages = nn.ModuleList()
        for i, depth in enumerate((2, 2, 1, 1)):
            stage, width = nn.Module(), 8 * 2**i
            stage.blocks = nn.Sequential(*(SwinBlock(width, 2**i, 2, j % 2 == 1) for j in range(depth)))
            stage.downsample = Merging(width) if i < 3 else None
            self.stages.append(stage)
        self.norm3 = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).unflatten(1, (16, 16))
        for stage in self.stages:
            x = stage.blocks(x)
            x = stage.downsample(x) if stage.downsample else x
        return self.norm3(x).permute(0, 3, 1, 2)


class MixerLayer(nn.Module):
    def __init__(self, tokens: int, width: int, eps: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.token_mix, self.channel_mix = FFN(tokens, width // 2), FFN(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.ln1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.ln2(x))


class Mixer(nn.Module):
    """eps: of its norms; mmclassification's is 1e-5, timm's 1e-6."""

    def __init__(self, eps: float):
        super().__init__()
        self.patch_embed = PatchEmbed(16, 14)
        self.layers = nn.ModuleList([MixerLayer(9, 16, eps) for _ in range(2)])
        self.ln1 = nn.LayerNorm(16, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.ln1(x).mean(1)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = LayerNorm2d(width, 1e-6)
        self.pointwise_conv1, self.pointwise_conv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise_conv(x)).movedim(1, -1)
        y = self.pointwise_conv2(F.gelu(self.pointwise_conv1(y))).movedim(-1, 1)
        return x + y * self.gamma.view(-1, 1, 1)


class ConvNeXt(nn.Module):
    """first: the last norm comes before the average, as in the fork; mmpretrain's own comes after."""

    def __init__(self, first: bool):
        super().__init__()
        widths = (8, 16, 24, 32)
        self.first = first
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8, 1e-6))])
        for a, b in pairwise(widths):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(a, 1e-6), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList([nn.Sequential(ConvNeXtBlock(w)) for w in widths])
        self.norm3 = LayerNorm2d(32, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
        return self.norm3(x if self.first else x.mean((-2, -1), keepdim=True))


MOBILENET = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]


class MobileNet(nn.Module):
    """split: in four parts of 4, 4, 4, 2 layers, else in `model` and `s4`."""

    def __init__(self, split: bool):
        super().__init__()
        layers, inputs = [self.layer(nn.Conv2d(3, 32, 3, 2, 1, bias=False))], 32
        for i, width in enumerate(MOBILENET):
            stride = 2 if i in (1, 3, 5, 11) else 1
            depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
            layers.append(self.layer(depthwise, nn.Conv2d(inputs, width, 1, bias=False)))
            inputs = width
        parts = {"s1": layers[:4], "s2": layers[4:8], "s3": layers[8:12]} if split else {"model": layers[:12]}
        for name, part in (parts | {"s4": layers[12:]}).items():
            self.add_module(name, nn.Sequential(*part))

    @staticmethod
    def layer(*convs: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(*(m for conv in convs for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"embed_dim": 8, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2, "img_size": 64}
RESNET = {"layers": [2, 1, 1, 1], "channels": [8, 16, 24, 32]}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}

# name -> (backbone, its width, timm's model, kwargs, pixels, what it is recognised as)
CASES: dict[str, tuple[Any, int, str, dict[str, Any], int, str]] = {
    "resnet": (lambda: ResNet(False), 128, "resnet50", RESNET, 64, "mmpretrain ResNet"),
    "resnet-d": (lambda: ResNet(True), 128, "resnet50d", RESNET, 70, "mmpretrain ResNet-D"),
    "vit": (lambda: ViT(False), 24, "vit_small_patch16_224", VIT, 48, "mmpretrain ViT"),
    "vit, norm after": (lambda: ViT(False, True), 24, "vit_small_patch16_224", VIT, 48, "mmpretrain ViT"),
    "vit, token": (lambda: ViT(True), 24, "vit_small_patch16_224", VIT, 48, "mmpretrain ViT"),
    "swin": (Swin, 64, "swin_tiny_patch4_window7_224", SWIN, 64, "mmpretrain Swin"),
    "mixer": (lambda: Mixer(1e-6), 16, "mlp_mixer", {}, 42, "mmpretrain MLP-Mixer"),
    "convnext": (lambda: ConvNeXt(True), 32, "convnext_tiny", CONVNEXT, 64, "mmpretrain ConvNeXt"),
    "convnext, norm after": (
        lambda: ConvNeXt(False),
        32,
        "convnext_tiny",
        CONVNEXT | {"head_norm_first": False},
        64,
        "mmpretrain ConvNeXt",
    ),
    "mobilenet": (lambda: MobileNet(True), 1024, "mobilenetv1_100", {}, 64, "ScaleKD MobileNet-V1"),
    "mobilenet, cls_KD": (lambda: MobileNet(False), 1024, "mobilenetv1_100", {}, 64, "cls_KD MobileNet-V1"),
}


@pytest.fixture
def classes(image_folder: Path) -> str:
    """A source of three classes."""
    return str(image_folder / "val")


def theirs(case: str) -> nn.Module:
    model = randomised(Classifier(CASES[case][0](), CASES[case][1]))
    backbone = model.backbone
    if isinstance(backbone, ViT) and not backbone.token:
        nn.init.zeros_(backbone.cls_token)  # no gradient has ever moved it
    return model


def imported(case: str, contents: Any, folder: Path, classes: str, **options: Any) -> tuple[nn.Module, list[str]]:
    _, _, name, kwargs, _, _ = CASES[case]
    file = folder / "released.pth"
    torch.save(contents, file)
    told = import_student(file, name, options.pop("kwargs", kwargs), folder / "out", classes, **options)
    return load_student(folder / "out")[0], told


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, pixels: int) -> float:
    images = torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    x, y = a(images), b(images)
    assert x.std() > 0.1, "outputs that hardly differ would prove nothing"
    return (x - y).abs().max().item() / max(1.0, x.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_are_those_of_the_released_model(case, tmp_path, classes):
    model = theirs(case)
    student, told = imported(case, {"state_dict": model.state_dict()}, tmp_path, classes)
    assert difference(model, student, CASES[case][4]) < 1e-5
    tensors = len(student.state_dict())
    assert f"recognised as {CASES[case][5]}, from state_dict; 0 tensors do not belong to the student" in told
    assert any(line.startswith(f"{tensors} of {tensors} tensors of {CASES[case][2]} loaded") for line in told)


def test_a_merging_in_the_wrong_order_would_show(tmp_path, classes, monkeypatch):
    model = theirs("swin")
    monkeypatch.setattr(released_weights, "patches_merged", lambda value: value)
    student, _ = imported("swin", model.state_dict(), tmp_path, classes)
    assert difference(model, student, 64) > 1e-2


def test_the_order_of_merged_patches_by_hand():
    theirs = [f"{channel}{row}{column}" for channel in "abc" for row in "01" for column in "01"]
    ours = " ".join(theirs[int(i)] for i in patches_merged(torch.arange(12.0)))
    assert ours == "a00 b00 c00 a10 b10 c10 a01 b01 c01 a11 b11 c11"


def test_a_mixer_keeps_timms_epsilon(tmp_path, classes):
    """mmclassification's norms have 1e-5 where timm's have 1e-6: no other difference, and a small one."""
    model = randomised(Classifier(Mixer(1e-5), 16))
    student, _ = imported("mixer", model.state_dict(), tmp_path, classes)
    assert 0 < difference(model, student, 42) < 1e-3


def test_the_card_says_what_the_tensors_say(tmp_path, classes):
    imported("vit", theirs("vit").state_dict(), tmp_path, classes)
    card = json.loads((tmp_path / "out" / "student.json").read_text())
    assert card["kwargs"] == VIT | {
        "class_token": False, "global_pool": "avg", "fc_norm": False, "patch_size": 16, "img_size": [48, 48],
        "in_chans": 3, "num_classes": 3,
    }  # fmt: skip
    assert (card["classes"], card["image_size"], card["crop_pct"]) == (["ant", "bee", "cat"], [48, 48], 0.875)
    assert (card["mean"], card["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert card["provenance"]["released"]["naming"] == "mmpretrain ViT"


def test_a_mixers_sizes_are_those_of_its_tensors(tmp_path, classes):
    imported("mixer", theirs("mixer").state_dict(), tmp_path, classes)
    card = json.loads((tmp_path / "out" / "student.json").read_text())
    sizes = {"patch_size": 14, "embed_dim": 16, "num_blocks": 2, "img_size": [42, 42]}
    assert sizes.items() <= card["kwargs"].items() and card["image_size"] == [42, 42]


def test_the_result_is_evaluated_and_starts_a_run(cli, tmp_path, recipe_file, classes):
    torch.save(theirs("vit").state_dict(), tmp_path / "r.pth")
    kwargs = json.dumps(VIT)
    options = ("--model", "vit_small_patch16_224", "--kwargs", kwargs, "--classes", classes, "--out", tmp_path / "out")
    shown = cli("import", tmp_path / "r.pth", *options)
    assert shown.code == 0, shown.err
    assert "largest difference of logits 0.0e+00" in shown.out and "sha256" in shown.out
    assert cli("evaluate", tmp_path / "out", "--data", classes).out.splitlines()[-1].startswith("top-1 ")
    card = json.loads((tmp_path / "out" / "student.json").read_text())
    used = {k: v for k, v in card["kwargs"].items() if k not in ("in_chans", "num_classes", "img_size")}
    student = {"model": card["model"], "kwargs": used, "weights": str(tmp_path / "out" / "student.safetensors")}
    run = cli("train", recipe_file, "--dry-run", f"student={json.dumps(student)}", "losses={ce: {}}", "teacher=null")
    assert "tensors from" in run.out and "missing" not in run.err, run.err
    again = cli("import", tmp_path / "r.pth", *options)
    assert again.code == 2 and "already holds a student" in again.err


# ------------------------------------------------ wrappers and prefixes


def test_a_distillers_checkpoint_has_the_student_and_more(tmp_path, classes):
    model = theirs("resnet")
    state = {f"student.{k}": v for k, v in model.state_dict().items()}
    state |= {f"teacher.{k}": v + 1 for k, v in theirs("swin").state_dict().items()}
    state |= {"distill_losses.loss_fmd_s3.projector_0.query.weight": torch.ones(4, 4), "linear.bias": torch.ones(3)}
    student, told = imported("resnet", {"state_dict": state, "meta": {"epoch": 300}}, tmp_path, classes)
    assert difference(model, student, 64) < 1e-5
    assert any("tensors do not belong to the student" in line and "; 0 " not in line for line in told)


def test_batch_norms_without_counters_are_imported(tmp_path, classes):
    model = theirs("resnet")
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    student, _ = imported("resnet", {"state_dict": state}, tmp_path, classes)
    assert len(state) < len(student.state_dict()) and difference(model, student, 64) < 1e-5


def average_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("kind", ["timm", "mmengine", "others", "lightning"])
def test_averaged_weights_are_preferred(kind, ema, tmp_path, classes):
    plain = theirs("convnext").state_dict()
    averaged = average_of(plain)
    contents: dict[str, Any] = {"state_dict": plain, "state_dict_ema": {f"module.{k}": v for k, v in averaged.items()}}
    if kind == "mmengine":  # it swaps them when it saves
        swapped = {"steps": torch.tensor(7)} | {f"module.student.{k}": v for k, v in plain.items()}
        contents = {"state_dict": {f"student.{k}": v for k, v in averaged.items()}, "ema_state_dict": swapped}
    if kind == "others":  # the same name as mmengine's, but what it says
        contents = {"state_dict": plain, "ema_state_dict": averaged}
    if kind == "lightning":
        contents = {
            "state_dict": averaged,
            "current_model_state": plain,
            "averaging_state": {"n_averaged": torch.ones(())},
        }
    student, told = imported("convnext", contents, tmp_path, classes, ema=ema)
    chosen = averaged if ema else plain
    assert torch.equal(student.head.fc.weight, chosen["head.fc.weight"])
    assert any(f"the {'averaged' if ema else 'plain'} weights;" in line for line in told)


class FacebookBlock(nn.Module):
    """ConvNeXt V2's, as in vanillaKD's file."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.grn = nn.Module()
        self.grn.gamma = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        self.grn.beta = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1))))
        energy = y.pow(2).sum((1, 2), keepdim=True).sqrt()
        y = self.grn.gamma * y * (energy / (energy.mean(-1, keepdim=True) + 1e-6)) + self.grn.beta + y
        return x + self.pwconv2(y).movedim(-1, 1)


class FacebookConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24, 32)
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8, 1e-6))])
        for a, b in pairwise(widths):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(a, 1e-6), nn.Conv2d(a, b, 2, 2)))
        self.stages = nn.ModuleList([nn.Sequential(FacebookBlock(w)) for w in widths])
        self.norm, self.head = nn.LayerNorm(32, 1e-6), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
        return self.head(self.norm(x.mean((-2, -1))))


def test_vanillakds_convnext_v2(tmp_path, classes):
    model = randomised(FacebookConvNeXt())
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(
        {"epoch": 299, "arch": "convnextv2_tiny", "state_dict": state, "args": Namespace(lr=1)}, tmp_path / "v.pth"
    )
    told = import_student(tmp_path / "v.pth", "convnextv2_tiny", CONVNEXT, tmp_path / "out", classes)
    assert "recognised as timm, from state_dict; 0 tensors do not belong to the student" in told
    assert difference(model, load_student(tmp_path / "out")[0], 64) < 1e-5


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_timms_own_names(kind, tmp_path, classes):
    kwargs = VIT | {"class_token": False, "global_pool": "avg", "img_size": 48}
    model = randomised(timm.create_model("vit_small_patch16_224", num_classes=CLASSES, **kwargs))
    file = tmp_path / f"v.{kind}"
    save_file(model.state_dict(), file) if kind == "safetensors" else torch.save({"model": model.state_dict()}, file)
    import_student(file, "vit_small_patch16_224", VIT, tmp_path / "out", classes)
    student, card = load_student(tmp_path / "out")
    assert difference(model, student, 48) == 0 and card["kwargs"]["fc_norm"] is True
    assert card["mean"] == [0.5, 0.5, 0.5]  # timm's for that model


def test_a_head_of_1000_rows_has_imagenets_classes(tmp_path):
    model = randomised(timm.create_model("convnext_tiny", **CONVNEXT))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "r.pth")
    import_student(tmp_path / "r.pth", "convnext_tiny", CONVNEXT, tmp_path / "out")
    classes = json.loads((tmp_path / "out" / "student.json").read_text())["classes"]
    assert len(classes) == 1000 and classes == sorted(classes) and classes[0] == "n01440764"


# ------------------------------------------------ every model of the pairs, at its real size


FULL = {
    "mobilenetv1_100": {"backbone.s1.0.0.weight": (32, 3, 3, 3), "backbone.s4.1.3.weight": (1024, 1024, 1, 1)},
    "resnet50": {"backbone.layer4.2.conv3.weight": (2048, 512, 1, 1), "backbone.layer1.0.downsample.1.bias": (256,)},
    "resnet50d": {"backbone.stem.2.bn.running_var": (64,), "backbone.layer2.0.downsample.2.weight": (512,)},
    "convnext_tiny": {"backbone.stages.2.8.gamma": (384,), "backbone.norm3.weight": (768,)},
    "mixer_s16_224": {"backbone.layers.7.token_mix.layers.0.0.weight": (256, 196)},
    "mixer_b16_224": {"backbone.layers.11.channel_mix.layers.1.weight": (768, 3072)},
    "vit_small_patch16_224": {"backbone.pos_embed": (1, 197, 384), "backbone.layers.11.ffn.layers.1.weight": (384, 1536)},
    "vit_base_patch16_224": {"backbone.layers.11.attn.qkv.weight": (2304, 768), "backbone.ln1.bias": (768,)},
    "swin_tiny_patch4_window7_224": {
        "backbone.stages.2.blocks.5.attn.w_msa.relative_position_bias_table": (169, 12),
        "backbone.stages.2.downsample.reduction.weight": (768, 1536),
    },
}  # fmt: skip
NAMINGS = {
    "mobilenetv1_100": "ScaleKD MobileNet-V1",
    "resnet50": "mmpretrain ResNet",
    "resnet50d": "mmpretrain ResNet-D",
    "convnext_tiny": "mmpretrain ConvNeXt",
    "mixer_s16_224": "mmpretrain MLP-Mixer",
    "mixer_b16_224": "mmpretrain MLP-Mixer",
    "vit_small_patch16_224": "mmpretrain ViT",
    "vit_base_patch16_224": "mmpretrain ViT",
    "swin_tiny_patch4_window7_224": "mmpretrain Swin",
}


@pytest.mark.parametrize("name", FULL)
def test_keys_of_the_real_sizes_lead_into_timms_model(name):
    """A few keys, with the shapes that mmclassification's own configurations give them."""
    naming = NAMINGS[name]
    assert recognise(dict.fromkeys([*FULL[name], SIGNS[naming]])) == naming
    with torch.device("meta"):
        wanted = timm.create_model(name, **({"fc_norm": False} if naming == "mmpretrain ViT" else {})).state_dict()
        found = released_weights.Found({k: torch.empty(shape) for k, shape in FULL[name].items()}, "", 0)
    spec = Model(model=name, kwargs={"class_token": True, "head_norm_first": False})
    state, left, _ = released_weights.renamed(found, naming, spec, Path())
    assert left == [] and len(state) == len(FULL[name])
    assert {k: v.shape for k, v in state.items()} == {k: wanted[k].shape for k in state}


def test_there_is_a_table_for_every_sign():
    assert SIGNS.keys() == RULES.keys() | released_keys.REFUSED.keys()


# ------------------------------------------------ refused, with the way out


def refusal(case: str, contents: Any, folder: Path, classes: str, model: str | None = None, **options: Any) -> str:
    file = folder / "released.pth"
    torch.save(contents, file)
    with pytest.raises(UserError) as error:
        import_student(file, model or CASES[case][2], CASES[case][3], folder / "out", classes, **options)
    assert not (folder / "out").exists()
    return str(error.value)


def test_all_that_does_not_fit_is_told_at_once(tmp_path, classes):
    state = theirs("convnext").state_dict()
    state["backbone.surprise.weight"] = torch.ones(2)
    del state["backbone.stages.1.0.gamma"]
    state["backbone.stages.2.0.norm.bias"] = torch.ones(25)
    told = refusal("convnext", state, tmp_path, classes)
    assert "1 missing: stages.1.blocks.0.gamma" in told
    assert "1 left over: backbone.surprise.weight" in told
    assert "1 of another shape: stages.2.blocks.0.norm.bias is (25,) in the file, (24,) in the model" in told
    assert "recognised as mmpretrain ConvNeXt" in told and "`kwargs`" in told


def test_another_model_is_told(tmp_path, classes):
    told = refusal("resnet", theirs("resnet-d").state_dict(), tmp_path, classes)
    assert "recognised as mmpretrain ResNet-D, does not fit resnet50" in told and "left over: conv1.0.weight" in told
    told = refusal("resnet", theirs("resnet").state_dict(), tmp_path, classes, model="swin_tiny_patch4_window7_224")
    assert "has no head.fc.weight, the classifier of swin_tiny_patch4_window7_224" in told
    told = refusal("resnet", theirs("resnet").state_dict(), tmp_path, classes, model="resnet5O")
    assert "timm has no model `resnet5O`. Did you mean" in told


def test_harmless_extras_are_left_out_and_told(tmp_path, classes):
    state = theirs("swin").state_dict() | {"backbone.norm1.weight": torch.ones(16)}
    _, told = imported("swin", state, tmp_path, classes)
    assert sum(line.startswith("ignored: ") for line in told) == 2
    assert any("relative_position_index and similar: computed from the window's size" in line for line in told)


def test_what_timm_cannot_compute_is_refused(tmp_path, classes):
    both = randomised(Classifier(ViT(False, both=True), 24))
    assert "norms both before and after the average over its tokens" in refusal(
        "vit", both.state_dict(), tmp_path, classes
    )
    eva = {
        "backbone.cls_token": torch.ones(1, 1, 384),
        "backbone.pos_embed": torch.ones(1, 577, 384),
        "backbone.rope.freqs_cos": torch.ones(576, 64),
        "backbone.layers.0.attn.qkv.bias": torch.ones(1152),
        "backbone.layers.0.mlp.w12.weight": torch.ones(2048, 384),
        "backbone.layers.0.mlp.norm.weight": torch.ones(1024),
        "backbone.ln2.weight": torch.ones(384),
        "head.fc.weight": torch.ones(1000, 384),
    }
    assert "recognised as mmpretrain EVA-02 and cannot be imported" in refusal(
        "vit", {"state_dict": eva}, tmp_path, classes, model="eva02_small_patch14_336"
    )


def test_classes_must_be_as_many_as_the_head_has(tmp_path):
    assert "the head has 3 rows, but ImageNet-1K has 1000 classes" in refusal(
        "convnext", theirs("convnext").state_dict(), tmp_path, None
    )


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint(cli, content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    shown = cli("import", tmp_path / "x.pth", "--model", "resnet50", "--out", tmp_path / "out")
    assert shown.code == 2 and "cannot be read as weights" in shown.err
    (tmp_path / "x.safetensors").write_bytes(content)
    assert cli("import", tmp_path / "x.safetensors", "--model", "resnet50", "--out", tmp_path / "out").code == 2
    assert cli("import", tmp_path / "y.pth", "--model", "resnet50").code == 2
    assert cli("import", tmp_path / "x.pth", "--model", "resnet50", "--kwargs", "[1]").code == 2
    shown = cli("import", tmp_path / "x.pth", "--model", "resnet50", "--kwargs", "{checkpoint_path: x}")
    assert shown.code == 2 and "checkpoint_path: not allowed here" in shown.err


@pytest.mark.parametrize("contents", [{"epoch": 3}, [1, 2], {"state_dict": {}}, {}, 7])
def test_a_checkpoint_without_tensors(contents, tmp_path, classes):
    assert "no named tensors" in refusal("resnet", contents, tmp_path, classes)


class Payload:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_malicious_pickle_is_refused(tmp_path, classes):
    contents = {"state_dict": theirs("convnext").state_dict(), "meta": Payload(tmp_path / "trace")}
    told = refusal("convnext", contents, tmp_path, classes)
    assert "besides tensors and is not opened: such objects can run code" in told
    assert not (tmp_path / "trace").exists()


class HistoryBuffer:
    """As mmengine's: with numpy's arrays, and its own functions by name."""

    def __init__(self) -> None:
        self._log_history = np.array([1.5, 2.5])
        self._statistics_methods = {"min": HistoryBuffer.minimum}
        self.last = np.float64(2.5)

    def minimum(self) -> float:
        raise AssertionError("not called")


def test_mmengines_log_is_read_past(tmp_path, classes, monkeypatch):
    """Its objects stand in the file under a module that need not be there."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(__import__("sys").modules, name, module)
    model = theirs("convnext")
    contents = {
        "meta": {"cfg": "model = dict()", "epoch": 300, "CLASSES": ("a", "b"), "time": "2024", "folder": Path("/x")},
        "state_dict": OrderedDict((f"student.{k}", v) for k, v in model.state_dict().items()),
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": OrderedDict(iter=7)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(contents, tmp_path / "m.pth")
    monkeypatch.undo()
    assert type(read_file(tmp_path / "m.pth")["message_hub"]["log_scalars"]["loss"]).__name__ == "HistoryBuffer"
    import_student(tmp_path / "m.pth", "convnext_tiny", CONVNEXT, tmp_path / "out", classes)
    assert difference(model, load_student(tmp_path / "out")[0], 64) < 1e-5
