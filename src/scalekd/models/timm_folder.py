"""An exported student in timm's format for the Hugging Face Hub: `config.json` and `model.safetensors`.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads such a folder, and `hf-hub:USER/NAME` the same files on the
Hub. docs/how-to/deploy.md shows it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf  # `save_for_hf` would write the weights a second time
from torch import nn

from scalekd.common.files import replacing, second_name, write_text

from .embedding_head import has_embedding_head, head_state, without_head
from .weights.folder import is_drop_rate

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING = "embedding.safetensors"  # of an embedding head, for which timm's models have no place
# what timm says of the weights that it has for the architecture, which are not the student's
OF_OTHER_WEIGHTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")


def timm_config(student: nn.Module, card: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json: how timm builds the student and which images it takes, from the card.

    `num_classes` is not among `model_args`: timm takes it from `pretrained_cfg`, and transformers passes it a second
    time. The licence is unknown, because scalekd does not know that of the images.
    """
    data = {"input_size": (len(card["mean"]), *card["image_size"]), "crop_mode": "center"}
    data |= {key: card[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    labels: dict[str, Any] = {}
    if card["classes"]:
        labels = {"label_names": list(card["classes"]), "label_descriptions": descriptions(card["classes"])}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / CONFIG
        save_config_for_hf(student, str(file), labels, data_config=data)
        config = json.loads(file.read_text(encoding="utf-8"))
    theirs = config["pretrained_cfg"]
    config["pretrained_cfg"] = {key: value for key, value in theirs.items() if key not in OF_OTHER_WEIGHTS}
    config["pretrained_cfg"]["license"] = "unknown"
    # exactly the arguments that the student was built with; timm's own list adds some that not every model takes
    config["model_args"] = {k: v for k, v in card["kwargs"].items() if k != "num_classes" and not is_drop_rate(k)}
    if card.get("multi_label"):
        config["problem_type"] = "multi_label_classification"  # transformers then applies a sigmoid
        config["threshold"] = card.get("threshold")
    if card.get("embedding"):
        config["embedding"] = card["embedding"] | {"file": EMBEDDING}  # timm does not read it
    return config


def descriptions(classes: list[str]) -> dict[str, str]:
    """Readable names of the classes that are WordNet numbers of ImageNet, such as n02123045; of no other class."""
    if not classes or not all(name[:1] == "n" and name[1:].isdigit() for name in classes):
        return {}
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return {name: info.label_name_to_description(name) for name in classes if name in known}


def write_timm_folder(student: nn.Module, file: Path, card: dict[str, Any]) -> None:
    """Writes config.json next to the exported weights `file`, and gives these their name in timm's format.

    model.safetensors is a hard link: a second name of the same file, which takes no space. On a file system without
    hard links there is none; timm then takes the one .safetensors file of the folder. A student with an embedding head
    has its weights in files of their own, see `write_parts`. Raises `UserError` if the disk is full or the folder is not
    writable.
    """
    write_text(file.with_name(CONFIG), json.dumps(timm_config(student, card), indent=2) + "\n")
    if has_embedding_head(student):
        write_parts(student, file.parent)
    else:
        second_name(file, file.with_name(WEIGHTS))


def write_parts(student: nn.Module, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes timm's model and, if it has one, the embedding head of a student into files of their own.

    timm loads all tensors of model.safetensors into its model, so those of the head are in embedding.safetensors. metadata:
    of model.safetensors. Raises `UserError` as `write_timm_folder`.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in student.state_dict().items()}
    with replacing(folder / WEIGHTS) as opened:
        opened.write(
            save(without_head(state), metadata={"format": "pt"} | (metadata or {}))
        )  # transformers needs the format
    if head := head_state(state):
        with replacing(folder / EMBEDDING) as opened:
            opened.write(save(head, metadata={"format": "pt"}))


def remove_timm_folder(folder: Path) -> None:
    """Removes what `write_timm_folder` wrote. The weights keep their own name."""
    for name in (CONFIG, WEIGHTS, EMBEDDING):
        (folder / name).unlink(missing_ok=True)


def load_timm_folder(folder: Path) -> nn.Module:
    """The student in eval mode, as anyone with timm loads it. Raises what timm raises."""
    logger = logging.getLogger("timm")
    before, logger.level = logger.level, logging.ERROR
    try:
        return timm.create_model(f"local-dir:{os.path.abspath(folder)}", pretrained=True).eval()
    finally:
        logger.level = before
