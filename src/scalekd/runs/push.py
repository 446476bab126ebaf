"""Uploads an exported student to the Hugging Face Hub in timm's format (`scalekd push`)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, write_text
from scalekd.common.results import Pushed
from scalekd.models.student_file import CARD, example_images, same_logits
from scalekd.models.timm_folder import CONFIG, load_timm_folder, timm_config, write_parts
from scalekd.report.hub_card import hub_card

from .students import opened

# of the card, for the header of the uploaded weights: its provenance has the paths and the machine of the run
PUBLIC = ("model", "kwargs", "classes", "image_size", "mean", "std", "interpolation", "crop_pct", "teacher", "top1",
          "multi_label", "map", "threshold", "embedding")  # fmt: skip


def push(run: Path, repo: str, *, private: bool, dry_run: bool) -> Pushed:
    """Makes the folder for the Hub, checks that timm loads it to equal logits, and uploads it unless `dry_run`.

    Raises `UserError`, before anything is made for a wrong name and, unless `dry_run`, without a token or offline.
    """
    check_repo(repo)
    if not dry_run:
        _check_reachable()
    if not run.is_dir():
        raise UserError(f"{run} is no folder; name the folder of a run")
    student, card = opened(run, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_hub_folder(folder, student, card, run, repo)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        url = None if dry_run else _upload(folder, repo, private)
    return Pushed(repo, files, url)


def make_hub_folder(folder: Path, student: nn.Module, card: dict[str, Any], run: Path, repo: str) -> None:
    """Writes config.json, model.safetensors and README.md into an empty folder. Raises `UserError` if timm's student
    differs from `student`.
    """
    public = {key: card[key] for key in PUBLIC if key in card}
    write_parts(student, folder, {CARD: json.dumps(public)})
    write_text(folder / CONFIG, json.dumps(timm_config(student, card), indent=2) + "\n")
    readme = run / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if is_file(readme) else None
    write_text(folder / "README.md", hub_card(card, repo, text))
    images = example_images(card)
    with torch.no_grad():
        logits = student(images).float()
    try:
        same = same_logits(load_timm_folder(folder), images, logits)
    except Exception as error:  # timm raises anything
        raise UserError(f"{run}: timm cannot load this student from its {CONFIG}: {first_line(error)}") from None
    if not same:
        raise UserError(f"{run}: timm loads the student from its {CONFIG}, but with other logits; nothing was sent")


def check_repo(repo: str) -> None:
    """Raises `UserError` if the Hub does not accept the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("no USER/NAME")
    except HFValidationError:
        raise UserError(
            f"{repo!r} is no name on the Hub. Write USER/NAME, such as ada/birds, with letters, digits, `-`, `_` and `.` "
            "only, and 96 characters at most"
        ) from None


def _check_reachable() -> None:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or use `dry_run`")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Sends the files; returns the page of the model. Raises `UserError` if the Hub refuses or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="scalekd")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(
                f"{repo} exists and is public; nothing was sent. Choose another name, or leave out `private`"
            )
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Student trained with scalekd")
    except HfHubHTTPError as error:
        raise UserError(
            f"the Hub refused {repo}: {first_line(error)}. Check the name, and that the token may write there"
        ) from None
    except UserError:
        raise
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise UserError(f"the Hub cannot be reached: {first_line(error)}. The files are only on this machine") from None
    return str(url)
