"""Writes the model card of an exported student: README.md, with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalekd.common.files import is_file, write_text
from scalekd.common.intervals import share_interval
from scalekd.common.text import counted, shortened
from scalekd.heads.retrieval import RETRIEVAL_FIGURES
from scalekd.models.licences import UNKNOWN, explained, licences_in
from scalekd.models.names import ADDED
from scalekd.models.timm_folder import EMBEDDING

from .curves import losses_text
from .evaluate import STUDENT, Seen
from .folder import RunFolder
from .label_sets import SeenSets, class_cells
from .page import NONE
from .predictions import accuracies, worst_and_best
from .svg import finite

MARK = "<!-- Written by scalekd"
SHARES_OF_QUERIES = RETRIEVAL_FIGURES.keys() - {"map_at_r"}
FILES = "`recipe.yaml` has all settings; `report.html` has the curves and the errors by class."
OURS = f"{MARK}. The next report overwrites this file; remove this line to keep your changes. -->"


def write_card(folder: Path, text: str) -> None:
    """Writes README.md to a run's folder, unless someone edited it and removed the mark. Raises `UserError`."""
    path = folder / "README.md"
    if not is_file(path) or MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)


def model_card(folder: RunFolder, facts: Mapping[str, str], seen: Seen | SeenSets | None, speed: str = "") -> str:
    """README.md of a student. speed: a block on its size and latency, if they were measured."""
    card = folder.card
    taught = f", taught by {card['teacher']}" if card.get("teacher") else ""
    classes = [str(label) for label in card["classes"]]
    blocks = [
        front(front_matter(folder)),
        f"# {marked(folder.title)}",
        f"{marked(card['model'] + taught)}. Trained with scalekd. {nature(card)}",
        "## Use",
        "In this folder:",
        f"```python\n{load_lines(card, timm_name(folder))}\n```",
        "## Results",
        _results(folder, seen),
        *(["## Size and speed", speed] if speed else []),
        "## Training",
        facts_list({"losses": losses_text(card.get("losses") or {})} | dict(facts)),
        FILES,
    ]
    if classes:
        blocks += ["## Classes", classes_line(classes, "student.json")]
    answer = "may predict no class or several" if card.get("multi_label") else "predicts one of these classes"
    limits = "Measured only on the validation images above. "
    if classes:
        limits += f"The model {answer} for any image. "
    limits += "It may have learned the teacher's errors."
    licences = licence_lines(licences_in(card))
    return "\n\n".join([*blocks, "## Licences", licences, "## Limits", limits, OURS]) + "\n"


def licence_lines(licences: Mapping[str, str]) -> str:
    """What a card says of licences. licences: of the weights that a run started with, by role."""
    lines = [f"- weights of {role.removeprefix('teachers.')}: {marked(explained(of))}" for role, of in licences.items()]
    told = (
        "This card states no licence of the model: scalekd does not know that of the images. Theirs and those of the "
        "pre-trained weights may apply."
    )
    return "\n".join([*lines, "- images: unknown"]) + f"\n\n{told}"


def front(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---"


def facts_list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {marked(without_folders(text))}" for name, text in facts.items() if name != "command")


def without_folders(text: str) -> str:
    """`text` with absolute paths cut to their last name, because a card is made to be published."""
    return re.sub(r"(?<![\w./-])/(?:[^\s,;:/]+/)+(?=[^\s,;:/])", "", text)


def classes_line(classes: list[str], file: str) -> str:
    named = ", ".join(marked(shortened(label, 40)) for label in classes[:30])
    more = f" and {len(classes) - 30} others, in `{file}`" if len(classes) > 30 else ""
    return f"{len(classes)}: {named}{more}."


def model_index(name: str, tag: str, place: str, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Hub's `model-index`. place: the name of the validation images."""
    kind = re.sub(r"[^\w.-]+", "-", place).strip("-") or "images"
    data = {"name": place, "type": kind, "split": "validation"}
    return [{"name": name, "results": [{"task": {"type": tag}, "dataset": data, "metrics": metrics}]}]


def front_matter(folder: RunFolder) -> dict[str, Any]:
    card, score = folder.card, folder.score
    task = "image-classification" if card["classes"] else "image-feature-extraction"
    fields: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": [task, "timm", "knowledge-distillation", "scalekd"],
        "license": UNKNOWN,
    }
    main = next(iter(folder.figures))
    if finite(score) and (card["classes"] or main in RETRIEVAL_FIGURES):
        data = folder.recipe.get("data") or {}
        place = Path(str(data.get("val") or data.get("train"))).name or "validation images"
        metric = {"top1": "accuracy", "map": "mAP"}.get(main, main)
        measured = {
            "type": metric,
            "value": round(score, 2),
            "name": f"{next(iter(folder.figures.values()))} (%)",
        }
        fields |= {
            "metrics": [metric],
            "model-index": model_index(folder.title, task, place, [measured]),
        }
    return fields


def timm_name(folder: RunFolder) -> str | None:
    """The name for `timm.create_model` in a run's folder; None for a student exported by an earlier version."""
    return None if is_file(folder.weights) and not is_file(folder.path / "config.json") else "local-dir:."


def nature(card: Mapping[str, Any]) -> str:
    """A sentence on what is needed to load the student."""
    if module := ADDED.get(card["model"]):
        return f"It is a timm model of a kind that `import {module}` adds to timm."
    if card.get("embedding"):
        return (
            f"It is a plain timm model with an embedding head beside it, in `{EMBEDDING}`: timm's models have no place for "
            "one. Neither needs scalekd."
        )
    return "It is a plain timm model and does not need scalekd."


def load_lines(card: Mapping[str, Any], name: str | None) -> str:
    """Python code that loads the student with timm and runs it on an image.

    name: `local-dir:FOLDER` or `hf-hub:USER/NAME`; None loads student.safetensors without timm's config.json.
    """
    mode = "L" if len(card["mean"]) == 1 else "RGB"
    if card.get("embedding") and name is None:
        return 'import scalekd\n\nstudent, card = scalekd.load_student(".")'
    loading = [
        f'student = timm.create_model("{name}", pretrained=True).eval()',
        "pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(student))",
    ]
    if name is None:
        given = "".join(f", {key}={value!r}" for key, value in card["kwargs"].items())
        size = (len(card["mean"]), *card["image_size"])
        loading = [
            f'student = timm.create_model({card["model"]!r}, checkpoint_path="student.safetensors"{given}).eval()',
            f"pixels = timm.data.create_transform({size!r}, interpolation={card['interpolation']!r}, "
            f"crop_pct={card['crop_pct']!r}, mean={tuple(card['mean'])!r}, std={tuple(card['std'])!r})",
        ]
    image = f'pixels(Image.open("image.png").convert("{mode}"))[None]'
    if card.get("embedding"):
        return "\n".join(_embedding_lines(card, str(name), loading, image))
    lines = [
        "import timm",
        "from PIL import Image",
        *([f"import {ADDED[card['model']]}"] if card["model"] in ADDED else []),
        "",
        *loading,
        f"{'logits' if card['classes'] else 'features'} = student({image})",
    ]
    if card.get("threshold") is not None and name is not None:
        lines += [
            'classes = student.pretrained_cfg["label_names"]',
            f"labels = [name for name, p in zip(classes, logits[0].sigmoid()) if p >= {card['threshold']}]",
        ]
    elif card["classes"] and name is not None:
        lines.append('label = student.pretrained_cfg["label_names"][int(logits[0].argmax())]')
    return "\n".join(lines)


def _embedding_lines(card: Mapping[str, Any], name: str, loading: list[str], image: str) -> list[str]:
    """Code for a student with an embedding head. loading: lines that make `student` and `pixels`."""
    dim, width, file = card["embedding"]["dim"], "student.head_hidden_size", f'"{EMBEDDING}"'
    head = f"torch.nn.Linear({width}, {dim})"
    if card["embedding"]["kind"] == "mlp":
        head = f"torch.nn.Sequential(torch.nn.Linear({width}, {width}), torch.nn.GELU(), {head})"
    on_hub = name.startswith("hf-hub:")
    if on_hub:
        file = f'hf_hub_download("{name.removeprefix("hf-hub:")}", {file})'
    return [
        "import timm",
        "import torch",
        *(["from huggingface_hub import hf_hub_download"] if on_hub else []),
        "from PIL import Image",
        "from safetensors.torch import load_file",
        *([f"import {ADDED[card['model']]}"] if card["model"] in ADDED else []),
        "",
        *loading,
        f"head = {head}.eval()",
        f"head.load_state_dict(load_file({file}))",
        f"images = {image}",
        "features = student.forward_head(student.forward_features(images), pre_logits=True)",
        "embedding = torch.nn.functional.normalize(head(features))",
        *(["logits = student(images)"] if card["classes"] else []),
    ]


def _results(folder: RunFolder, seen: Seen | SeenSets | None) -> str:
    lines = ["| on all validation images | % |", "|---|--:|"]
    last = folder.last_validation
    for key, name in folder.figures.items():
        value, images = last.get(key), last.get("images")
        text = f"{value:.2f}" if finite(value) else NONE
        if key == "top1" and finite(value) and images:
            text += " [{:.2f}, {:.2f}], {:,.0f} images".format(*share_interval(value, images), images)
        elif key in SHARES_OF_QUERIES and finite(value) and last.get("queries"):
            text += " [{:.2f}, {:.2f}]".format(*share_interval(value, last["queries"]))
        lines.append(f"| {name} | {text} |")
    if "queries" in last:
        lines += ["", f"{queries_line(last)}."]
    if folder.card.get("threshold") is not None:
        lines += ["", threshold_line(folder.card)]
    if isinstance(seen, SeenSets):
        lines += _class_rows(seen)
    elif seen is not None:
        lines += ["", f"| on {seen.images:,} of them, top-1 | % | ECE % |", "|---|--:|--:|"]
        for row in accuracies(seen):
            name = "this model" if row["model"] == STUDENT else marked(row["model"])
            low, high = row["interval"]
            lines.append(f"| {name} | {row['top1']:.2f} [{low:.2f}, {high:.2f}] | {row['ece']:.2f} |")
    if any("[" in line for line in lines):
        lines += ["", "Brackets: 95 % intervals, which depend on the number of images."]
    return "\n".join(lines)


def queries_line(validation: Mapping[str, Any]) -> str:
    """How many images query each other for the figures of retrieval."""
    text = f"Retrieval: {validation['queries']:,.0f} validation images query each other, by cosine similarity of their embeddings"
    if alone := validation.get("left_out"):
        text += f"; {counted(alone, 'image')} of classes with one image left out"
    return text


def threshold_line(card: Mapping[str, Any]) -> str:
    """Which classes a model of sets of labels predicts."""
    return (
        f"An image has the classes whose probability, the sigmoid of the logit, is at least {card['threshold']:g}. This "
        "threshold has the largest macro F1 on the validation images, so F1 is likely to be lower on new images."
    )


def _class_rows(seen: SeenSets) -> list[str]:
    shown, note = worst_and_best(seen.classes, "Sorted by average precision (AP), the worst first.")
    lines = ["", "| class | images | AP % | precision % | recall % | F1 % |", "|---|--:|--:|--:|--:|--:|"]
    for row in shown:
        lines.append(f"| {marked(shortened(row['class'], 40))} | {row['images']} | {' | '.join(class_cells(row))} |")
    return [*lines, "", f"On {seen.images:,} validation images. {note}"]


def marked(text: object) -> str:
    """`text` on one line, escaped for Markdown."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"[\\`*\[\]|<>~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)
