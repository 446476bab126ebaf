"""Exports the student to safetensors and ONNX, and measures the logit difference after loading it back."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import SCRATCH, cannot_write, reject_links, replacing, write_text
from scalekd.common.text import printable

from .embedding_head import add_embedding_head, has_embedding_head
from .features import embedded, with_features
from .options import Embedding
from .timm_folder import CONFIG, load_timm_folder, remove_timm_folder, write_timm_folder
from .weights.card import read_card
from .weights.match import sha256_of

# largest difference of logits after an export, for logits of size 1; larger logits may differ by that much more
TOLERANCE = 1e-3
ONNX_MISSING = "ONNX needs extra packages: pip install 'scalekd[onnx]'"
CARD = "scalekd"  # the key of the card in the metadata of a .safetensors or .onnx file
LOGITS, FEATURES = "logits", "features"  # the outputs of an ONNX graph


def export_student(student: nn.Module, path: Path, card: dict[str, Any]) -> float:
    """Writes `path` (.safetensors), the card as JSON next to it and timm's config.json, and loads them back with timm.

    card: model, kwargs, classes, mean, std, image_size, ... from `student_card`.
    Returns the largest difference between the logits, and embeddings, of the student and of the loaded file.
    Raises `UserError` if the files cannot be written.
    """
    with replacing(path) as file:
        file.write(as_safetensors(student, card))
    write_text(path.with_suffix(".json"), json.dumps(card | {"sha256": sha256_of(path)}, indent=2) + "\n")
    images = example_images(card)
    # from the file, because a student that was trained with `channels_last` may round otherwise
    loaded = load_student(path)[0]
    _write_timm_folder(student, path, card, images, _logits(loaded, images))
    return _difference(_answers(student, images), _answers(loaded, images))


def _write_timm_folder(student: nn.Module, path: Path, card: dict[str, Any], images: Tensor, logits: Tensor) -> None:
    """Adds timm's files to the exported one, and removes them again if timm does not give exactly these logits.

    This is said on stderr and not raised: the student is exported, and a run that ends here is finished.
    """
    try:
        write_timm_folder(student, path, card)
        if not same_logits(load_timm_folder(path.parent), images, logits):
            raise ValueError("its logits are others than those of the exported student")
    except UserError:
        raise
    except Exception as error:  # timm raises anything
        remove_timm_folder(path.parent)
        message = f"no {CONFIG}: timm cannot load {path.parent} as local-dir: {first_line(error)}"
        print(printable(message), file=sys.stderr)


def same_logits(model: nn.Module, images: Tensor, logits: Tensor) -> bool:
    """Whether a model gives these logits to the last bit."""
    return torch.allclose(_logits(model, images), logits, rtol=0, atol=0, equal_nan=True)


def as_safetensors(student: nn.Module, card: dict[str, Any]) -> bytes:
    """The student's weights as the content of a .safetensors file, with the card in its header."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in student.state_dict().items()}
    return save(state, metadata={"format": "pt", CARD: json.dumps(card)})  # transformers needs the format


def load_student(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The student in eval mode and its card, from an exported .safetensors file or a run's folder. Raises `UserError`."""
    if path.is_dir():
        reject_links(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist; name a run's folder, or a .safetensors or .onnx file of a student")
    elif path.suffix != ".safetensors":
        raise UserError(f"{path} is no exported student; name its run's folder, or a .safetensors or .onnx file")
    file = path / "student.safetensors" if path.is_dir() else path
    card_file = file.with_suffix(".json")
    # only safetensors: other weights files may contain code
    if not file.is_file() or not card_file.is_file():
        raise UserError(
            f"{path} has no student.safetensors with its .json; create them with `scalekd export RUN_FOLDER`"
        )
    card = read_card(card_file)
    if card.get("sha256", sha256_of(file)) != sha256_of(file):
        raise UserError(
            f"{file} does not fit its card {card_file}: the sha256 differs, so it was changed or is from another export; "
            "export both again with `scalekd export RUN_FOLDER`"
        )
    return create_student(card, card_file, file).eval(), card


def create_student(card: dict[str, Any], card_file: Path, weights: Path | None = None) -> nn.Module:
    """The timm model of a card, with the weights of a file if given. Raises `UserError`."""
    try:
        student = timm.create_model(card["model"], **card["kwargs"])
        if card.get("embedding"):
            add_embedding_head(student, Embedding.model_validate(card["embedding"]))
        if weights is not None:
            timm.models.load_checkpoint(student, str(weights))
        return student
    except Exception as error:  # timm raises anything on wrong arguments or files
        raise UserError(f"{weights or card['model']} does not fit its card {card_file}: {first_line(error)}") from None


def export_onnx(student: nn.Module, path: Path, card: dict[str, Any]) -> float:
    """Writes ONNX with a dynamic batch size. Returns the largest logit difference under onnxruntime.

    The graph takes normalised images (B, C, H, W). Its outputs are `logits` and the pooled `features`, or only one of
    them if the student has no classifier or no pooled features. For a student with an embedding head, `features` is its
    output. The file holds the card, in its metadata. Raises `UserError` if the packages of `scalekd[onnx]` are missing,
    and if the outputs that are compared, logits and embeddings, differ by more than `TOLERANCE`: then the file is removed.
    """
    onnxruntime = onnx_runtime(exporting=True)
    images = example_images(card)
    student = copy.deepcopy(student).cpu().eval()
    exported = copy.deepcopy(student)
    outputs = _outputs(exported, images, card)
    program = torch.onnx.export(
        exported,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    save_onnx(program, path, card)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # not the exporter's batch size, to detect a graph with a fixed one
    again = torch.cat([images, images.flip(0)])
    expected = _answers(student, again)
    given = [torch.from_numpy(values) for values in session.run(None, {"images": again.numpy()})]
    if not has_embedding_head(student):
        del given[1:]
    difference = _difference(expected, torch.cat(given, dim=1))
    if not is_close(difference, expected):
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path}: its outputs under onnxruntime differ from the student's by {difference:.1e}, more than "
            f"{TOLERANCE:g} x (1 + the largest one); the file was removed. Use student.safetensors, or other versions of "
            "onnxruntime and onnxscript"
        )
    return difference


def save_onnx(program: Any, path: Path, card: dict[str, Any]) -> None:
    """Writes torch's ONNX program with the card in its metadata. Raises `UserError` if the file cannot be written."""
    program.model.metadata_props[CARD] = json.dumps(card)
    try:
        # a new folder, so that nothing is written through a link; above 2 GB a second file holds the weights
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=SCRATCH) as scratch:
            program.save(str(Path(scratch) / path.name))
            for file in Path(scratch).iterdir():
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise cannot_write(path, error) from None


@torch.no_grad()
def _outputs(student: Any, images: Tensor, card: dict[str, Any]) -> list[str]:
    """The names of a graph's outputs. Makes `student` give (logits, features), if that does not change its logits.

    Raises `UserError` if a student with an embedding head cannot give both.
    """
    # a function in place of `forward` and not a module around it, whose parameters would have other names
    if not card["classes"]:
        if has_embedding_head(student):
            student.forward = partial(embedded, student)
        return [FEATURES]
    both, logits = with_features(student), student(images)
    try:
        if torch.equal(both(images)[0], logits):
            student.forward = both
            return [LOGITS, FEATURES]
    except Exception:  # models whose head does not take `pre_logits`, or does not pool
        pass
    if has_embedding_head(student):
        raise UserError(
            f"{card['model']}: its logits change when its embedding is read too, so ONNX cannot have both; use "
            "student.safetensors"
        )
    return [LOGITS]


def is_close(difference: float, logits: Tensor) -> bool:
    """Whether a difference of logits is within `TOLERANCE`; False for NaN."""
    return difference <= TOLERANCE * (1 + logits.abs().max().item())


def onnx_runtime(exporting: bool = False) -> Any:
    """The module onnxruntime, imported here and nowhere else, without its telemetry. Raises `UserError` without the extra."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read on import, also if torch's exporter imports it first
    try:
        import onnxruntime

        if exporting:
            import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise UserError(ONNX_MISSING) from None
    return onnxruntime


def example_images(card: dict[str, Any]) -> Tensor:
    """Four random inputs (4, C, H, W) of the card's size, always the same."""
    height, width = card["image_size"]
    return torch.randn(4, len(card["mean"]), height, width, generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return _in_eval_mode(model, model, images)


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """What an exported file is compared by: the logits if there are any and, side by side, embeddings of an embedding head."""
    if not has_embedding_head(model):
        return _logits(model, images)
    embeddings = _in_eval_mode(partial(embedded, model), model, images)
    if not getattr(model, "num_classes", 0):
        return embeddings
    return torch.cat([_logits(model, images), embeddings], dim=1)


@torch.no_grad()
def _in_eval_mode(call: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    values = call(images.to(next(model.parameters()).device)).float().cpu()
    model.train(was_training)
    return values


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
