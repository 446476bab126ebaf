"""The papers' models, measured: against torchvision's, formulas by hand, the papers' table, and what the docs show."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn

from scalekd.config.recipe import load_recipe
from scalekd.cost import pairs as module
from scalekd.cost.pairs import (
    BY_MODULE,
    BY_OPERATION,
    CLASS_TOKEN,
    MODELS,
    NOTES,
    PAIRS,
    PRINTED,
    PaperModel,
    builds,
    markdown,
    measure,
    pairs,
    show,
)
from scalekd.models.unfilled import unfilled

SHOWN = Path(__file__).parents[2] / "docs" / "results" / "pairs.md"

# student stages n-1 and n, as the papers' pairs have them
STUDENTS = {
    "MobileNet-V1": "512x14x14 1024x7x7",
    "ResNet-50": "1024x14x14 2048x7x7",
    "ConvNeXt-T": "384x14x14 768x7x7",
    "Mixer-S/16": "512x14x14 512x14x14",
    "Mixer-B/16": "768x14x14 768x14x14",
    "Mixer-B/14": "768x16x16 768x16x16",
    "ViT-S/16": "384x14x14 384x14x14",
    "Swin-T": "384x14x14 768x7x7",
    "ViT-B/16": "768x14x14 768x14x14",
    "ViT-B/14": "768x16x16 768x16x16",
    "EVA-02-S/14": "384x24x24 384x24x24",
}
BLOCKS = {"Mixer-S/16": (5, 7), "Mixer-B/16": (9, 11), "ViT-S/16": (8, 11), "ViT-B/16": (8, 11), "BEiT-L/14": (17, 23)}


@functools.cache
def measured(label: str) -> dict:
    """Each model once for this file, when a test first asks for it."""
    return measure(MODELS[label])


def measured_before(model: PaperModel) -> dict:
    return measured(next(label for label, known in MODELS.items() if known is model))


@pytest.fixture(scope="module")
def listed() -> Iterator[list[dict]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure", measured_before)
        yield pairs()


@pytest.fixture
def unmeasured(monkeypatch) -> list[PaperModel]:
    """Neither models nor recipes are looked at; gives the models that would have been measured."""
    asked = []
    nothing = {"params": 1, "gmacs": 1.0, "maps": [[1, 1, 1]] * 4, "blocks": None}
    monkeypatch.setattr(module, "measure", lambda model: asked.append(model) or nothing)
    monkeypatch.setattr(module, "recipe_names", lambda: [])
    return asked


# ---------------------------------------------------------------- what is measured


@pytest.mark.slow
def test_parameters_are_those_of_torchvision_s_models():
    same = {"resnet50": "ResNet-50", "convnext_tiny": "ConvNeXt-T", "swin_t": "Swin-T", "swin_s": "Swin-S"}
    for name, label in (same | {"swin_b": "Swin-B"}).items():
        with unfilled():
            other = torchvision.models.get_model(name)
        assert measured(label)["params"] == sum(p.numel() for p in other.parameters())
    assert measured("ResNet-50")["params"] == 25_557_032
    with unfilled():
        vit = torchvision.models.vit_b_16()
    class_token = 2 * 768  # it and its position
    assert measured("ViT-B/16")["params"] == sum(p.numel() for p in vit.parameters()) - class_token


@pytest.mark.parametrize(
    "label, width, depth, patch, class_token",
    [("ViT-Ti", 192, 12, 16, 1), ("ViT-S/16", 384, 12, 16, 0), ("ViT-B/14", 768, 12, 14, 0)],
)
def test_a_vit_by_formula(label, width, depth, patch, class_token):
    patches = (224 // patch) ** 2
    n = patches + class_token
    stem, head = 3 * patch**2 * width, 1000 * width
    # of a block: q, k, v, projection 4; feed-forward 4 + 4; two products over n tokens; biases 9 and two norms 4
    params = stem + width + (class_token + n) * width + depth * (12 * width**2 + 13 * width) + 2 * width + head + 1000
    macs = patches * stem + depth * (12 * n * width**2 + 2 * n**2 * width) + head
    found = measured(label)
    assert found["params"] == params and found["gmacs"] == pytest.approx(macs / 1e9, rel=1e-12)
    assert found["maps"] == [[width, 224 // patch, 224 // patch]] * 4 and found["blocks"] == [2, 5, 8, 11]


@pytest.mark.parametrize("label, width, depth, patch", [("Mixer-S/16", 512, 8, 16), ("Mixer-B/14", 768, 12, 14)])
def test_a_mixer_by_formula(label, width, depth, patch):
    n, stem, head = (224 // patch) ** 2, 3 * patch**2 * width, 1000 * width
    tokens, channels = width // 2, 4 * width  # hidden widths of the two MLPs
    weights = 2 * n * tokens + 2 * width * channels
    biases = tokens + n + channels + width
    params = stem + width + depth * (weights + biases + 4 * width) + 2 * width + head + 1000
    macs = n * stem + depth * (width * 2 * n * tokens + n * 2 * width * channels) + head
    found = measured(label)
    assert found["params"] == params and found["gmacs"] == pytest.approx(macs / 1e9, rel=1e-12)


def test_a_resnet_by_its_convolutions():
    with unfilled():
        other, images = torchvision.models.resnet50().eval(), torch.empty(1, 3, 224, 224)
    macs = []
    for conv in [m for m in other.modules() if isinstance(m, nn.Conv2d)]:
        conv.register_forward_hook(lambda m, _, out: macs.append(out.shape[2] * out.shape[3] * m.weight.numel()))
    other(images)
    assert len(macs) == 53
    assert measured("ResNet-50")["gmacs"] == pytest.approx((sum(macs) + 2048 * 1000) / 1e9, rel=1e-12)


@pytest.mark.slow
def test_stages_are_those_of_the_papers_pairs(listed):
    table = [pair for pair in listed if pair["source"] in ("ScaleKD Table 3", "ScaleKD Table 4")]
    assert len(table) == 12
    teachers = {"Swin-L": [[768, 14, 14], [1536, 7, 7]], "BEiT-L/14": [[1024, 16, 16], [1024, 16, 16]]}
    for pair in table:
        teacher, student = pair["teacher"], pair["student"]
        assert teacher["maps"][2:] == teachers[teacher["label"]]
        assert ["x".join(map(str, shape)) for shape in student["maps"][2:]] == STUDENTS[student["label"]].split()
        for m in (teacher, student):
            if m["label"] in BLOCKS:
                assert tuple(m["blocks"][2:]) == BLOCKS[m["label"]]
    assert {pair["student"]["label"] for pair in table} == set(STUDENTS)


def test_nothing_is_allocated_and_nothing_downloaded(monkeypatch):
    made = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made.append((create(*a, **k), k)) or made[-1][0])
    measure(MODELS["Mixer-S/16"])
    ((model, kwargs),) = made
    assert "pretrained" not in kwargs
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


# ---------------------------------------------------------------- what the notes say


def differing(label: str, m: dict) -> list[str]:
    """The printed figures that are not the measured ones."""
    printed = PRINTED.get(label, [])
    params = [f"{p:.2f}" for p, _, _ in printed if f"{p:.2f}" != f"{m['params'] / 1e6:.2f}"]
    return params + [f"{f:.2f}" for _, f, _ in printed if f"{f:.2f}" != f"{m['gmacs']:.2f}"]


@pytest.mark.slow
def test_every_difference_has_a_note_and_no_agreement_has():
    for label in MODELS:
        m = measured(label)
        text = " ".join(NOTES.get(label, []))
        by_rule = {f"{PRINTED[label][0][1]:.2f}"} if BY_MODULE in text or BY_OPERATION in text else set()
        assert all(figure in text or figure in by_rule for figure in differing(label, m)), label
        assert not by_rule or by_rule <= set(differing(label, m)), label
    assert {label for label in MODELS if differing(label, measured(label))} == set(NOTES) - {"ViT-S"}


def norms_and_relus(label: str, **changed) -> tuple[int, int]:
    """Elements that go through norms and through ReLUs (ReLU6 too, which may be part of a norm layer)."""
    model = MODELS[label]
    with unfilled():
        built = timm.create_model(model.name, **model.kwargs | changed).eval()
        images = torch.empty(1, 3, model.size, model.size)
    norms, relus = [], []
    for layer in built.modules():
        if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
            layer.register_forward_hook(lambda _, args, __: norms.append(args[0].numel()))
        elif isinstance(layer, (nn.ReLU, nn.ReLU6)):
            layer.register_forward_hook(lambda _, args, __: relus.append(args[0].numel()))
    with torch.no_grad():
        built(images)
    return sum(norms), sum(relus)


def window_attention(m: dict, depths: tuple[int, ...]) -> int:
    """Multiply-accumulates of Swin's two products in windows of 7 x 7."""
    return sum(2 * 49 * c * h * w * depth for (c, h, w), depth in zip(m["maps"], depths, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label, notes in NOTES.items() if BY_MODULE in notes])
def test_the_paper_s_flops_by_module(label):
    norms, relus = norms_and_relus(label)
    depths = {"Swin-T": (2, 2, 6, 2), "Swin-B": (2, 2, 18, 2), "Swin-L": (2, 2, 18, 2)}.get(label)
    left_out = window_attention(measured(label), depths) if depths else 0
    flops = measured(label)["gmacs"] + (2 * norms + relus - left_out) / 1e9
    assert f"{flops:.2f}" == f"{PRINTED[label][0][1]:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label, notes in NOTES.items() if BY_OPERATION in notes])
def test_the_paper_s_flops_by_operation(label):
    gmacs, changed = measured(label)["gmacs"], {}
    if CLASS_TOKEN in NOTES[label]:
        changed = {"class_token": True, "global_pool": "token"}
        kwargs = MODELS[label].kwargs | changed
        gmacs = measure(dataclasses.replace(MODELS[label], kwargs=kwargs))["gmacs"]
        assert f"{gmacs:.2f}" != f"{measured(label)['gmacs']:.2f}"
    norms, _ = norms_and_relus(label, **changed)
    assert f"{gmacs + 5 * norms / 1e9:.2f}" == f"{PRINTED[label][0][1]:.2f}"


@pytest.mark.slow
def test_what_the_other_notes_say():
    def at(label: str, size: int) -> dict:
        return measure(dataclasses.replace(MODELS[label], kwargs={"img_size": size}, size=size))

    assert f"{at('BEiT-L/14', 196)['params'] / 1e6:.2f}" == "304.14"
    eva = at("EVA-02-S/14", 384)
    assert (f"{eva['params'] / 1e6:.2f}", f"{eva['gmacs']:.2f}") == ("22.19", "20.58")
    for label, flops in {"BEiT-L/14": "81.08", "EVA-02-S/14": "15.48"}.items():
        assert f"{measured(label)['gmacs'] + 5 * norms_and_relus(label)[0] / 1e9:.2f}" == flops
        assert flops in NOTES[label][0]
    swin, resnet = measured("Swin-L")["params"], measured("ResNet-50")["params"]
    assert f"{swin / resnet:.2f}" == "7.69" and f"{196.53 / 25.6:.2f}" == "7.68"
    less, more = 3 * 768 * (16**2 - 14**2), 768 * (256 - 196)
    assert measured("ViT-B/16")["params"] - measured("ViT-B/14")["params"] == less - more
    assert (f"{less / 1e6:.2f}", f"{more / 1e6:.2f}") == ("0.14", "0.05")


# ---------------------------------------------------------------- how it is shown


@pytest.mark.slow
def test_json_has_every_pair(cli, listed, monkeypatch):
    monkeypatch.setattr(module, "measure", measured_before)
    found = json.loads(cli("pairs", "--json").out)
    assert [(p["source"], p["teacher"]["label"], p["student"]["label"]) for p in found] == PAIRS
    assert len(found) == 19 and found == json.loads(json.dumps(listed))
    first = found[1]
    assert first["student"]["name"] == "resnet50" and first["student"]["params"] == 25_557_032
    assert first["params_ratio"] == pytest.approx(7.69, abs=0.001)
    assert first["student"]["paper"][1] == {"params_m": 22.56, "flops_g": 4.12, "tables": "8"}


def test_each_model_is_measured_once(unmeasured):
    pairs()
    assert len(unmeasured) == len(MODELS) and all(model in unmeasured for model in MODELS.values())


def test_names_choose_pairs(cli, unmeasured):
    def chosen(*names: str) -> list[tuple[str, str]]:
        found = json.loads(cli("pairs", *names, "--json").out)
        return [(pair["teacher"]["label"], pair["student"]["label"]) for pair in found]

    assert chosen("mobilenetv1_100") == chosen("MobileNet") == [("Swin-L", "MobileNet-V1")]
    assert chosen("swin-s") == [("Swin-S", "Mixer-S/16"), ("Swin-S", "ResNet-50")]
    assert chosen("resnet50", "eva_large") == chosen("beit-l", "resnet") == [("BEiT-L/14", "ResNet-50")]


@pytest.mark.parametrize("names", [("swinn",), ("swin-l", "swinn"), ("swin-l", "/")])
def test_a_name_that_no_pair_has(cli, unmeasured, names):
    result = cli("pairs", *names)
    assert result.code == 2 and result.err.startswith(f"scalekd: no teacher or student is named `{names[-1]}`.")
    assert "swin-l" in result.err and "Traceback" not in result.err


def test_names_that_no_pair_has_together(cli, unmeasured):
    assert cli("pairs", "swin-s", "vit-b").err == "scalekd: no pair has all of these names: swin-s, vit-b\n"


def test_recipes_are_found_by_what_they_build(unmeasured, monkeypatch):
    shipped = [f"imagenet-swin-{t}-resnet50-{which}" for t in "sl" for which in ("advanced", "traditional")]
    monkeypatch.setattr(module, "recipe_names", lambda: [*shipped, "demo", "demo-teacher"])
    (pair,) = [p for p in pairs(["swin-s"]) if p["student"]["label"] == "ResNet-50"]
    assert pair["recipes"] == shipped[:2]

    recipe = "imagenet-swin-l-vit-small-advanced"  # with drop path, which is no other model
    assert builds(load_recipe(recipe), "Swin-L", "ViT-S/16")
    assert not builds(load_recipe(recipe), "Swin-B", "ViT-S/16")
    assert not builds(load_recipe(recipe), "Swin-L", "ViT-S")  # which has its class token
    assert not builds(load_recipe(recipe, ["data.image_size=192"]), "Swin-L", "ViT-S/16")
    assert not builds(load_recipe(recipe, ["student.kwargs={}"]), "Swin-L", "ViT-S/16")
    assert not builds(load_recipe("demo-teacher"), "Swin-L", "ViT-S/16")


@pytest.mark.slow
def test_the_table_fits(listed):
    def printed(width: int) -> str:
        out = io.StringIO()
        show(listed, Console(file=out, width=width))
        assert max(map(len, out.getvalue().splitlines())) <= width
        return out.getvalue()

    wide = printed(150)
    for name in {model.name for model in MODELS.values()}:
        assert re.search(rf"^{re.escape(name)}\b", wide, re.MULTILINE)
    for name in {name for pair in listed for name in pair["recipes"]}:
        assert re.search(rf" {name} *$", wide, re.MULTILINE)
    assert "196.53  34.48  34.04" in wide
    narrow = printed(80)
    assert "…" not in narrow and "(1)" in narrow
    assert len(re.findall(r"\b(?:196\.53|304\.20|34\.48|81\.01)\b", narrow)) >= 5  # figures are not folded


@pytest.mark.slow
def test_the_docs_show_what_the_command_makes_now(listed):
    assert SHOWN.read_text() == markdown(listed), "scalekd pairs --markdown > docs/results/pairs.md"
