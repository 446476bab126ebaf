"""Opens an exported student of any format for inference: a model that takes normalised images, and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, reject_links
from scalekd.common.text import in_shell

from .features import embedded
from .student_file import CARD, FEATURES, LOGITS, load_student, onnx_runtime
from .weights.card import checked_card, read_card

TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


class OnnxStudent(nn.Module):
    """A student in an ONNX file, float or quantised, under onnxruntime; used like the timm model that it was.

    The graph has one input, normalised images (B, C, H, W), and the outputs `logits`, `features` or both.

    Raises:
        UserError: the file is no such graph, or onnxruntime is missing.
    """

    def __init__(self, file: Path, device: torch.device):
        super().__init__()
        runtime = onnx_runtime()
        cuda = device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers()
        providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
        try:
            self.session = runtime.InferenceSession(str(file), providers=providers)
        except Exception as error:  # onnxruntime has an exception of its own for every kind of fault
            raise UserError(f"{file} cannot be opened by onnxruntime: {first_line(error)}") from None
        inputs = self.session.get_inputs()
        self.outputs = [output.name for output in self.session.get_outputs()]
        if len(inputs) != 1 or inputs[0].type not in TYPES or not {LOGITS, FEATURES} & set(self.outputs):
            raise UserError(
                f"{file} is not a student's graph: it must have one input, images, and an output `{LOGITS}` or "
                f"`{FEATURES}`; it has {', '.join(i.name for i in inputs)} and {', '.join(self.outputs)}"
            )
        self.file, self.input, self.kind = file, inputs[0].name, TYPES[inputs[0].type]
        self.shape: list[Any] = list(inputs[0].shape[1:])

    def forward(self, images: Tensor) -> Tensor:
        """The logits of normalised images, or the features of a student without a classifier; float32."""
        return self._run(LOGITS if LOGITS in self.outputs else FEATURES, images)

    def features(self, images: Tensor) -> Tensor:
        """The embeddings of normalised images, float32, which are pooled features without an embedding head. Raises `UserError` if the graph does not give them."""
        if FEATURES not in self.outputs:
            raise UserError(
                f"{self.file} gives logits only; use student.safetensors, or export ONNX again with `scalekd export RUN "
                "--onnx`, which adds the features"
            )
        return self._run(FEATURES, images)

    def _run(self, output: str, images: Tensor) -> Tensor:
        (values,) = self.session.run([output], {self.input: images.detach().cpu().to(self.kind).numpy()})
        return torch.from_numpy(values).float().to(images.device)


def open_student(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A student on `device` in eval mode, and its card. Calling it on normalised images gives logits, or features
    without a classifier.

    path: a run's folder, a .safetensors file with its card, or an .onnx file. Raises `UserError`.
    """
    if path.suffix != ".onnx":
        student, card = load_student(path)
        return student.to(device), card
    if not is_file(path):
        raise UserError(
            f"no file {path}; `scalekd export {in_shell(path.parent)} --onnx` writes one from a run's folder"
        )
    reject_links(path.parent)
    student = OnnxStudent(path, device)
    card = _card_of(student)
    wanted = [len(card["mean"]), *card["image_size"]]
    if any(isinstance(ours, int) and ours != theirs for ours, theirs in zip(student.shape, wanted)):
        raise UserError(f"{path} takes images of {student.shape}, but its card says {wanted}; export both again")
    return student.eval(), card


def features_of(student: nn.Module, images: Tensor) -> Tensor:
    """Embeddings (B, E), float32, of normalised images by a student of `open_student`: of its embedding head, or else its
    pooled features. Raises `UserError`."""
    return student.features(images) if isinstance(student, OnnxStudent) else embedded(student, images).float()


def _card_of(student: OnnxStudent) -> dict[str, Any]:
    """The card in the file itself, or else in the .json of its name or in student.json next to it."""
    inside = student.session.get_modelmeta().custom_metadata_map.get(CARD)
    if inside is not None:
        return checked_card(inside, str(student.file))
    beside = [student.file.with_suffix(".json"), student.file.with_name("student.json")]
    found = next((file for file in beside if is_file(file)), None)
    if found is None:
        raise UserError(f"{student.file} has no card: neither in the file nor as {beside[0].name} or {beside[1].name}")
    return read_card(found)
