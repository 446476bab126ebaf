"""`scalekd teachers`: which methods work with a teacher, found by building both without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import timm
from rich.console import Console

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.tables import fitted
from scalekd.common.text import printable
from scalekd.config.losses import reads_logits, reads_teacher
from scalekd.methods.names import METHODS
from scalekd.models.embeddings import is_embedding
from scalekd.models.inputs import usual_size
from scalekd.models.names import models_like
from scalekd.models.stages import Shapes, StageView
from scalekd.models.unfilled import unfilled

STUDENT = "resnet50"  # methods are built for this student unless another is given

# family -> timm name of a small member; the other members are of the same class
FAMILIES = {
    "DINOv2": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DINOv3": "vit_small_patch16_dinov3.lvd1689m",
    "SigLIP 2": "vit_base_patch16_siglip_224.v2_webli",
    "CLIP": "vit_base_patch16_clip_224.openai",
    "CLIP, fine-tuned": "vit_base_patch16_clip_224.openai_ft_in12k_in1k",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384.fb",
    "EVA-02": "eva02_tiny_patch14_224.mim_in22k",
    "BEiTv2": "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    "MAE": "vit_base_patch16_224.mae",
    "ViT": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "DeiT-III": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "Hiera, MAE": "hiera_tiny_224.mae",
    "Hiera": "hiera_tiny_224.mae_in1k_ft_in1k",
    "MaxViT": "maxvit_tiny_rw_224.sw_in1k",
    "Swin": "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "SwinV2": "swinv2_tiny_window8_256.ms_in1k",
    "ConvNeXt": "convnext_tiny.fb_in22k_ft_in1k",
    "EfficientNet": "efficientnet_b0.ra_in1k",
}
RUN_ON = ["tpp", "scalekd"]
ON_LOGITS = [name for name, method in METHODS.items() if not getattr(method, "needs_maps", True)]


def examine(name: str, student: Shapes | None = None) -> dict[str, Any]:
    """Facts about a timm model as a teacher, and for each method None or the reason why it does not work.

    student: the student's shapes; by default those of a ResNet-50 at 224 pixels. Raises `UserError` for an unknown name.
    """
    view = _view(name)
    shapes, student_shapes = view.shapes, student or _view(STUDENT).shapes
    model, embedding = view.model, is_embedding(name, shapes.classes)
    return {
        "model": name,
        "class": type(model).__name__,
        "pixels": usual_size(name),
        "maps": [list(shape) for shape in shapes.maps],
        "prefix_tokens": getattr(model, "num_prefix_tokens", 0) if shapes.maps else None,
        "classes": 0 if embedding else shapes.classes,
        "embedding": shapes.classes if embedding else 0,
        "resumable": shapes.can_resume,
        "methods": {m: _obstacle(m, student_shapes, view, embedding) for m in METHODS if reads_teacher(m)},
    }


def _view(name: str) -> StageView:
    if not timm.is_model(name):
        raise UserError(f"timm has no model `{printable(name)}`.{models_like(name)}")
    try:
        with unfilled():
            model = timm.create_model(name).eval()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise UserError(f"{first_line(error)}{nearest(name, tags)}") from None
    return StageView(model, name=name, image_size=usual_size(name))


def _obstacle(method: str, student: Shapes, view: StageView, embedding: bool) -> str | None:
    """Why the method does not work with this teacher, or None."""
    if embedding and reads_logits(method):
        return f"its {view.shapes.classes} outputs are an embedding; `scalekd head` fits a classifier for your classes"
    if not view.shapes.classes and reads_logits(method):
        return "it has no classifier; `scalekd head` fits one for your classes"
    if view.refusal and method not in ON_LOGITS:
        return view.refusal.splitlines()[0]
    teacher = view.shapes
    student = replace(student, two_heads=True)  # whether it has them says nothing of the teacher
    if reads_logits(method):  # its classes depend on its weights: assume the student's
        student = replace(student, classes=teacher.classes)
    try:
        with unfilled():
            METHODS[method](student, teacher)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


COLUMNS = ("family", "teacher", "pixels", "last map", "tokens", "on logits", "on features", "tpp, scalekd")


def rows(teachers: list[dict[str, Any]]) -> list[list[str]]:
    """A table row per teacher: its input, and which of three groups of methods work with it."""
    return [
        [
            entry.get("family", ""),
            entry["model"],
            "x".join(map(str, entry["pixels"])),
            "x".join(map(str, entry["maps"][-1])) if entry["maps"] else "-",
            "-" if entry["prefix_tokens"] is None else f"+{entry['prefix_tokens']}",
            _cell(entry, ON_LOGITS),
            _cell(entry, [m for m in METHODS if m not in (*ON_LOGITS, *RUN_ON)]),
            _cell(entry, RUN_ON),
        ]
        for entry in teachers
    ]


def _cell(entry: dict[str, Any], group: list[str]) -> str:
    members = [m for m in group if m in entry["methods"]]
    refused = [m for m in members if entry["methods"][m]]
    return "yes" if not refused else "no" if len(refused) == len(members) else f"not {', '.join(refused)}"


def notes(teachers: list[dict[str, Any]]) -> list[str]:
    """Why methods do not work, one line per reason."""
    affected: dict[str, tuple[list[str], list[str]]] = {}
    for entry in teachers:
        for method, reason in entry["methods"].items():
            if reason:
                short = reason.replace(entry["model"], "it").removeprefix(f"{method} ").removeprefix("needs ")
                methods, models = affected.setdefault(short, ([], []))
                methods += [] if method in methods else [method]
                models += [] if entry["model"] in models else [entry["model"]]
    return [
        f"{', '.join(methods)}, with {', '.join(models)}: {reason}" for reason, (methods, models) in affected.items()
    ]


def show(teachers: list[dict[str, Any]], console: Console) -> None:
    console.print(fitted(COLUMNS, rows(teachers), console), "", markup=False, highlight=False)
    for note in notes(teachers):
        console.print(note, markup=False, highlight=False)


def markdown(teachers: list[dict[str, Any]]) -> str:
    """The contents of docs/results/teachers.md."""
    lines = [
        "# Teachers and the methods they serve",
        "",
        "```sh",
        "scalekd teachers --markdown > docs/results/teachers.md",
    ]
    lines += ["```", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(teachers)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(teachers))]) + "\n"


def families() -> list[dict[str, Any]]:
    """`examine` for a member of each of `FAMILIES`."""
    student = _view(STUDENT).shapes
    return [{"family": family} | examine(name, student) for family, name in FAMILIES.items()]
