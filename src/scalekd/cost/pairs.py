"""Measures the papers' teachers and students and compares them with the figures in the papers: `scalekd pairs`.

No weights are read and nothing is computed: the models are built on PyTorch's meta device, where a tensor has a
shape and no values. The upper-case tables are the data; docs/reference/pairs.md explains the differences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from rich.console import Console

from scalekd.common.errors import UserError, nearest
from scalekd.common.sections import height_and_width
from scalekd.common.tables import fitted
from scalekd.common.text import shortened
from scalekd.config.recipe import Config, load_recipe
from scalekd.config.recipe_files import recipe_names
from scalekd.models import added  # noqa: F401 - adds models to timm
from scalekd.models.stages import StageView
from scalekd.models.unfilled import unfilled

from .flops import flop_counter


@dataclass(frozen=True)
class PaperModel:
    name: str  # timm's
    kwargs: dict[str, Any] = field(default_factory=dict)  # for `timm.create_model`
    size: int = 224  # pixels, height and width
    cuts: tuple[int, int, int, int] | None = None  # as in a recipe


POOLED = {"class_token": False, "global_pool": "avg"}  # ScaleKD's ViT students
MODELS = {
    "Swin-S": PaperModel("swin_small_patch4_window7_224.ms_in1k"),
    "Swin-B": PaperModel("swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
    "Swin-L": PaperModel("swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
    "BEiT-L/14": PaperModel("eva_large_patch14_196.in22k_ft_in22k_in1k", {"img_size": 224}),
    "BEiTv2-B": PaperModel("beitv2_base_patch16_224.in1k_ft_in22k_in1k"),
    "MobileNet-V1": PaperModel("mobilenetv1_100"),
    "ResNet-50": PaperModel("resnet50"),
    "ConvNeXt-T": PaperModel("convnext_tiny"),
    "Mixer-S/16": PaperModel("mixer_s16_224"),
    "Mixer-B/16": PaperModel("mixer_b16_224", cuts=(2, 5, 9, 11)),
    "Mixer-B/14": PaperModel("mlp_mixer", {"patch_size": 14, "num_blocks": 12, "embed_dim": 768}),
    "ViT-S/16": PaperModel("vit_small_patch16_224", POOLED),
    "Swin-T": PaperModel("swin_tiny_patch4_window7_224"),
    "ViT-B/16": PaperModel("vit_base_patch16_224", POOLED),
    "ViT-B/14": PaperModel("vit_base_patch16_224", {"patch_size": 14, **POOLED}),
    "EVA-02-S/14": PaperModel("eva02_small_patch14_336", size=336),
    "ViT-Ti": PaperModel("vit_tiny_patch16_224"),
    "ViT-S": PaperModel("vit_small_patch16_224"),
    "ConvNeXtV2-T": PaperModel("convnextv2_tiny"),
}

# What the ScaleKD paper prints: parameters in millions, FLOPs in 10^9, in which tables. vanillaKD's abstract has none.
PRINTED = {
    "Swin-B": [(87.77, 15.14, "8, 14")],
    "Swin-L": [(196.53, 34.04, "3")],
    "BEiT-L/14": [(304.14, 81.06, "3")],
    "MobileNet-V1": [(4.23, 0.58, "3")],
    "ResNet-50": [(25.56, 4.12, "3"), (22.56, 4.12, "8")],
    "ConvNeXt-T": [(28.59, 4.46, "3, 8, 14")],
    "Mixer-S/16": [(18.53, 3.78, "3")],
    "Mixer-B/16": [(59.88, 12.61, "3, 8, 14")],
    "Mixer-B/14": [(59.88, 16.45, "3, 14")],
    "ViT-S/16": [(22.05, 4.61, "3, 8, 14")],
    "Swin-T": [(28.29, 4.36, "3, 14"), (73.00, 15.80, "8")],
    "ViT-B/16": [(86.57, 17.58, "3, 14")],
    "ViT-B/14": [(86.57, 23.09, "3")],
    "EVA-02-S/14": [(22.13, 15.51, "14")],
}

# Why a printed figure is another than ours; tests/cost/test_pairs.py checks what these say.
BY_MODULE = (
    "The paper's FLOPs count norms, at 2 per element, and ReLUs, at 1, and leave out attention's two products with the "
    "tokens: mmcv's rules, which go by module."
)
BY_OPERATION = "The paper's FLOPs count norms, at 5 per element: fvcore's and MMEngine's rules, which go by operation."
CLASS_TOKEN = "The paper's FLOPs are those of the ViT with its class token; the released student has none."
NOTES = {
    "Swin-B": [BY_MODULE],
    "Swin-L": [
        BY_MODULE,
        "Table 2 gives it 7.68 times ResNet-50's parameters; it is 7.69. 196.53 / 25.6 is 7.68.",
    ],
    "BEiT-L/14": [
        "304.14 M is this model at 196 pixels, its own size, with 60 position embeddings fewer. The FLOPs are those at "
        "224; 81.06 for 81.01 is not explained (norms at 5 per element give 81.08)."
    ],
    "MobileNet-V1": [BY_MODULE],
    "ResNet-50": [BY_MODULE, "22.56 M in Table 8 is a misprint of Table 3's 25.56 M."],
    "Mixer-B/16": [BY_MODULE],
    "Mixer-B/14": [BY_OPERATION, "59.88 M is Mixer-B/16; its token MLPs mix 196 positions, those of Mixer-B/14 256."],
    "ViT-S/16": [BY_OPERATION, CLASS_TOKEN],
    "Swin-T": [BY_MODULE, "73.00 M and 15.80 G in Table 8 are those of gMLP-B in the same table."],
    "ViT-B/16": [BY_OPERATION, CLASS_TOKEN],
    "ViT-B/14": [
        BY_OPERATION,
        "86.57 M is ViT-B/16. Smaller patches take 0.14 M weights off, 60 positions add 0.05 M.",
    ],
    "EVA-02-S/14": [
        "Table 4 says 384 pixels. Table 14 says 336, and its figures are those at 336: 384 would take 22.19 M and "
        "20.58 G. 15.51 for 15.45 is not explained (norms at 5 per element give 15.48)."
    ],
    "ViT-S": ["timm's own, with a class token, unlike ScaleKD's ViT-S/16."],
}

# (table of the paper, teacher, student)
PAIRS = [
    *(("ScaleKD Table 3", "Swin-L", student) for student in ("MobileNet-V1", "ResNet-50", "ConvNeXt-T", "Mixer-S/16")),
    *(("ScaleKD Table 3", "Swin-L", student) for student in ("Mixer-B/16", "ViT-S/16", "Swin-T", "ViT-B/16")),
    *(("ScaleKD Table 3", "BEiT-L/14", student) for student in ("ResNet-50", "Mixer-B/14", "ViT-B/14")),
    ("ScaleKD Table 4", "BEiT-L/14", "EVA-02-S/14"),
    ("ScaleKD Table 1", "Swin-S", "Mixer-S/16"),
    ("ScaleKD Table 2", "Swin-S", "ResNet-50"),
    ("ScaleKD Table 2", "Swin-B", "ResNet-50"),
    *(("vanillaKD", "BEiTv2-B", student) for student in ("ResNet-50", "ViT-Ti", "ViT-S", "ConvNeXtV2-T")),
]


def measure(model: PaperModel) -> dict[str, Any]:
    """Parameters, multiply-accumulates of one image in units of 10^9, and stage maps of the model that timm builds.

    The multiply-accumulates are half of what torch's FLOP counter reports: matrix products, convolutions and attention,
    but not norms and activations.
    """
    with unfilled():
        built = timm.create_model(model.name, **model.kwargs).eval()
        images = torch.empty(1, 3, model.size, model.size)
    view = StageView(built, name=model.name, image_size=(model.size, model.size), cuts=model.cuts)
    with torch.no_grad(), flop_counter() as counter:
        built(images)
    plain = len({f["reduction"] for f in built.feature_info}) == 1
    return {
        "params": sum(p.numel() for p in built.parameters()),
        "gmacs": counter.get_total_flops() / 2e9,
        "maps": [list(shape) for shape in view.shapes.maps],  # channels, height, width; the last two are n-1 and n
        "blocks": list(view.indices) if plain else None,  # for a model without stages: the last block of each, from 0
    }


def pairs(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The pairs whose models' names contain all of `names`, measured; all pairs by default.

    Stage n-1 is a model's third map and stage n its fourth. Raises `UserError` for a name that no pair contains.
    """
    chosen = _chosen(names)
    configs = {name: load_recipe(name) for name in recipe_names()}
    models = {
        label: {
            "label": label,
            **asdict(MODELS[label]),
            **measure(MODELS[label]),
            "paper": [{"params_m": p, "flops_g": f, "tables": t} for p, f, t in PRINTED.get(label, [])],
            "notes": NOTES.get(label, []),
        }
        for label in dict.fromkeys(label for _, *both in chosen for label in both)
    }
    return [
        {
            "source": source,
            "teacher": models[teacher],
            "student": models[student],
            "params_ratio": models[teacher]["params"] / models[student]["params"],
            "recipes": [name for name, config in configs.items() if builds(config, teacher, student)],
        }
        for source, teacher, student in chosen
    ]


def _chosen(names: Sequence[str]) -> list[tuple[str, str, str]]:
    def has(pair: tuple[str, str, str], name: str) -> bool:
        called = [known for label in pair[1:] for known in (label, MODELS[label].name)]
        return any(_plain(name) in _plain(known) for known in called)

    for name in names:
        if not _plain(name) or not any(has(pair, name) for pair in PAIRS):
            known = [label.lower() for label in MODELS]
            raise UserError(f"no teacher or student is named `{shortened(name)}`.{nearest(name.lower(), known)}")
    chosen = [pair for pair in PAIRS if all(has(pair, name) for name in names)]
    if not chosen:
        raise UserError(f"no pair has all of these names: {', '.join(shortened(name) for name in names)}")
    return chosen


def _plain(name: str) -> str:
    """resnet50 for ResNet-50, swinl for swin_l, so that spelling does not matter."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def builds(config: Config, teacher: str, student: str) -> bool:
    """Whether the recipe builds these two models of MODELS, at their sizes."""
    if config.teacher is None:
        return False
    for spec, paper in ((config.teacher, MODELS[teacher]), (config.student, MODELS[student])):
        size = height_and_width(spec.image_size or config.data.image_size)
        same = (spec.model, size) == (paper.name, (paper.size, paper.size))
        if not same or _architecture(spec.kwargs) != _architecture(paper.kwargs):
            return False
    return True


def _architecture(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without options that act only in training, and without the size, which a recipe sets elsewhere."""
    return {key: value for key, value in kwargs.items() if "drop" not in key and key != "img_size"}


# ---------------------------------------------------------------- as text

MODEL_COLUMNS = ["model", "pixels", "params M", "paper", "GMACs", "paper", "maps: stages 1, 2, n-1, n"]
PAIR_COLUMNS = ["source", "teacher", "student", "teacher n-1 -> n", "student n-1 -> n", "shipped recipes"]


def _rows(listed: list[dict[str, Any]]) -> tuple[list[list[list[str]]], list[list[list[str]]], list[str]]:
    """Rows of both tables, with a list of lines per cell, and the notes in the order of their numbers."""
    models = {m["label"]: m for pair in listed for m in (pair["teacher"], pair["student"])}
    notes = list(dict.fromkeys(note for m in models.values() for note in m["notes"]))
    model_rows, pair_rows = [], []
    for label, m in models.items():
        marks = "".join(f" ({notes.index(note) + 1})" for note in m["notes"])
        kwargs = " ".join(f"{k}={v}" for k, v in m["kwargs"].items())
        maps = [_shape(shape) for shape in m["maps"]]
        lines = [" ".join(maps[:2]), " ".join(maps[2:])]
        if m["blocks"]:
            lines = [f"4 of {maps[0]}, after", f"blocks {', '.join(map(str, m['blocks']))}"]
        model_rows.append(
            [
                [f"{label}{marks}", m["name"], *([kwargs] if kwargs else [])],
                [str(m["size"])],
                [f"{m['params'] / 1e6:.2f}"],
                list(dict.fromkeys(f"{p['params_m']:.2f}" for p in m["paper"])),
                [f"{m['gmacs']:.2f}"],
                list(dict.fromkeys(f"{p['flops_g']:.2f}" for p in m["paper"])),
                lines,
            ]
        )
    for pair in listed:
        ends = [
            [f"{_shape(before)} ->", _shape(last)]
            for *_, before, last in (pair[w]["maps"] for w in ("teacher", "student"))
        ]
        labels = [[pair["teacher"]["label"]], [pair["student"]["label"]]]
        pair_rows.append([[pair["source"]], *labels, *ends, pair["recipes"]])
    return model_rows, pair_rows, notes


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def show(listed: list[dict[str, Any]], console: Console) -> None:
    """Prints two tables and the notes. The tables need a terminal of 120 columns; a narrower one gets paragraphs."""
    model_rows, pair_rows, notes = _rows(listed)
    for columns, rows in ((MODEL_COLUMNS, model_rows), (PAIR_COLUMNS, pair_rows)):
        cells = [["\n".join(cell) for cell in row] for row in rows]
        table = fitted(columns, cells, console, MODEL_COLUMNS[1:6])
        console.print(table, "", markup=False, highlight=False)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", markup=False, highlight=False)


def markdown(listed: list[dict[str, Any]]) -> str:
    """The text of docs/results/pairs.md."""
    model_rows, pair_rows, notes = _rows(listed)
    lines = ["# The papers' models, measured", "", "```sh", "scalekd pairs --markdown > docs/results/pairs.md", "```"]
    for columns, rows in ((MODEL_COLUMNS, model_rows), (PAIR_COLUMNS, pair_rows)):
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join('<br>'.join(cell) for cell in row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"({number}) {note}\n" for number, note in enumerate(notes, 1))])
