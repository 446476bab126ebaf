"""Writes the model card of a detector or segmenter: README.md, as `card.py` does for students."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.common.markdown import table_row
from scalekd.models.licences import licences_in

from .card import OURS, classes_line, facts_list, front, licence_lines, marked, model_index
from .folder import RunFolder
from .svg import finite
from .transfer_sections import figure_rows, given_by, has_masks, load_lines, predict_line, trained_line

HUB = {  # the Hub's name of the task, and its tag
    "detection": ("object-detection", "instance-segmentation"),
    "segmentation": ("image-segmentation", "semantic-segmentation"),
}


def transfer_card(folder: RunFolder, facts: Mapping[str, str]) -> str:
    task, here = str(folder.task), Path(".")
    card = folder.weights.with_suffix(".json").name
    head, rows = figure_rows(task, folder.last_validation)
    table = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    limits = "Measured only on the validation images above. The model knows only these classes."
    blocks = [
        front(front_matter(folder)),
        f"# {marked(folder.title)}",
        f"{marked(trained_line(folder, facts))}. Trained with scalekd.",
        "## Use",
        f"`pip install 'scalekd[{task}]'`, then, in this folder:",
        f"```sh\n{predict_line(task, here)}\n```",
        f"```python\n{load_lines(task, here, len(folder.card['mean']))}\n```",
        given_by(folder),
        "## Results",
        "\n".join(map(table_row, table)),
        "In %, on all validation images. `report.html` has the values by class.",
        "## Training",
        facts_list(facts),
        f"`recipe.yaml` has all settings; `{card}` describes how to build the model.",
        "## Classes",
        classes_line([str(label) for label in folder.card["classes"]], card),
        "## Licences",
        licence_lines(licences_in(folder.card)),
        "## Limits",
        limits,
        OURS,
    ]
    return "\n\n".join(blocks) + "\n"


def front_matter(folder: RunFolder) -> dict[str, Any]:
    tag, more = HUB[str(folder.task)]
    last = folder.last_validation
    kinds = [tag, more] if folder.task != "detection" or has_masks(last) else [tag]
    fields: dict[str, Any] = {"library_name": "scalekd", "pipeline_tag": tag, "tags": [*kinds, "timm", "scalekd"]}
    metrics = [
        {"type": key, "value": round(last[key], 2), "name": f"{name} (%)"}
        for key, name in folder.figures.items()
        if finite(last.get(key))
    ]
    if metrics:
        data = folder.recipe.get("data") or {}
        place = Path(str(data.get("val_annotations") or data.get("root"))).stem or "validation images"
        fields |= {"metrics": [m["type"] for m in metrics]}
        fields |= {"model-index": model_index(folder.title, tag, place, metrics)}
    return fields
