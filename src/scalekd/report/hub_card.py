"""The model card on the Hugging Face Hub: that of the run's folder, for a student that is loaded from there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from scalekd.models.licences import UNKNOWN, licences_in

from .card import FILES, OURS, classes_line, front, licence_lines, load_lines, marked, nature

FRONT = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
CODE = re.compile(
    r"(?:In this folder:\n\n)?```python\n(?:(?!```).)*?(?:local-dir:|student\.safetensors)(?:(?!```).)*```", re.DOTALL
)


def hub_card(card: Mapping[str, Any], repo: str, text: str | None) -> str:
    """README.md for `repo`.

    text: the run's README.md, which a person may have written; None writes a short one from the student's card. Its own
    front matter counts; what the Hub needs and it lacks is added. Code that loads the student from the folder loads it
    from the Hub, and the line on files that are not sent is left out.
    """
    text = (
        short_card(card, repo)
        if text is None
        else text.replace(f"{OURS}\n", "").replace(f"{FILES}\n\n", "").rstrip() + "\n"
    )
    found = FRONT.match(text)
    try:
        given = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        given = {}
    body = text[found.end() :] if found else f"\n{text}"
    use = f"```python\n{load_lines(card, f'hf-hub:{repo}')}\n```"
    body = CODE.sub(lambda _: use, body)
    return front(hub_fields(card) | (given if isinstance(given, dict) else {})) + "\n" + body


def hub_fields(card: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter that the Hub needs to show and load a timm model. Data sets are unknown, so there are none."""
    task = "image-classification" if card["classes"] else "image-feature-extraction"
    tags = [task, "timm", "knowledge-distillation", "scalekd"]
    return {"library_name": "timm", "pipeline_tag": task, "tags": tags, "license": UNKNOWN}


def short_card(card: Mapping[str, Any], repo: str) -> str:
    """A card without results, for a student whose folder has none."""
    taught = f", taught by {card['teacher']}" if card.get("teacher") else ""
    blocks = [
        f"# {marked(repo.split('/')[-1])}",
        f"{marked(card['model'] + taught)}. Exported with scalekd. {nature(card)}",
        "## Use",
        f"```python\n{load_lines(card, f'hf-hub:{repo}')}\n```",
    ]
    if card["classes"]:
        blocks += ["## Classes", classes_line([str(label) for label in card["classes"]], "config.json")]
    return "\n\n".join([*blocks, "## Licences", licence_lines(licences_in(card))]) + "\n"
