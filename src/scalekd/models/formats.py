"""Converts a student for other runtimes, always with the vendor's own converter, and opens the files for comparison."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import SCRATCH, cannot_write

from .open_student import OnnxStudent
from .student_file import example_images, onnx_runtime

Run = Callable[[Tensor], Tensor]  # normalised images -> logits


class Source(NamedTuple):
    """A student to convert."""

    student: nn.Module
    card: dict[str, Any]
    onnx: Path  # the same in float32


class Format(NamedTuple):
    file: str  # what the run's folder gets; OpenVINO writes a second file with the weights
    package: str  # to import; for TensorRT a program
    install: str
    convert: Callable[[Source, Path], None]
    open: Callable[[Path], Run] | None  # None: it cannot be run here
    told: str


def converted(name: str, source: Source, folder: Path) -> Path:
    """Writes the student as `FORMATS[name]` into a folder; returns the file, which may be a folder itself.

    Raises `UserError` if the converter is not installed or cannot convert this student.
    """
    made = FORMATS[name]
    check_installed(name)
    try:
        with tempfile.TemporaryDirectory(dir=folder, suffix=SCRATCH) as scratch:
            try:
                made.convert(source, Path(scratch) / made.file)
            except UserError:
                raise
            except Exception as error:  # converters raise anything
                raise UserError(f"{made.package} cannot convert {source.card['model']}: {first_line(error)}") from None
            for part in Path(scratch).iterdir():
                target = folder / part.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(part, target)
    except OSError as error:
        raise cannot_write(folder / made.file, error) from None
    return folder / made.file


def check_installed(name: str) -> None:
    """Raises `UserError` with the way to install a converter that is missing."""
    if not is_installed(name):
        raise UserError(f"the format {name} needs {FORMATS[name].package}: {FORMATS[name].install}")


def is_installed(name: str) -> bool:
    package = FORMATS[name].package
    return bool(shutil.which(package)) if name == "tensorrt" else find_spec(package) is not None


def size_of(file: Path) -> int:
    """Bytes of an exported file with its weights, which OpenVINO, and ONNX above 2 GB, keep in a file of their own."""
    if file.is_dir():
        return sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else file.with_name(f"{file.name}.data")
    return file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def _fp16(source: Source, file: Path) -> None:
    import onnx

    onnx_runtime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source.onnx)), keep_io_types=True), str(file))


def _run_onnx(file: Path) -> Run:
    return OnnxStudent(file, torch.device("cpu"))


def _openvino(source: Source, file: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(str(source.onnx)), str(file), compress_to_fp16=False)


def _run_openvino(file: Path) -> Run:
    import openvino

    # by default it calculates in bf16 on CPUs that can
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(model(images.numpy())[0].copy())


def _program(source: Source) -> Any:
    """torch's program of the student for one image."""
    return torch.export.export(source.student.eval(), (example_images(source.card)[:1],), strict=False)


def _coreml(source: Source, file: Path) -> None:
    import coremltools

    program = _program(source).run_decompositions({})
    coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16).save(str(file))


def _litert(source: Source, file: Path) -> None:
    import litert_torch

    litert_torch.convert(source.student.eval(), (example_images(source.card)[:1],)).export(str(file))


def _run_litert(file: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(image: Tensor) -> Tensor:
        interpreter.set_tensor(given, image.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(made))

    return _one_by_one(run)


def _executorch(source: Source, file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(_program(source), partitioner=[XnnpackPartitioner()])
    file.write_bytes(lowered.to_executorch().buffer)


def _run_executorch(file: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return _one_by_one(lambda image: method.execute([image])[0].clone())


def _one_by_one(run: Run) -> Run:
    """For files that take one image."""
    return lambda images: torch.cat([run(image[None].contiguous()) for image in images])


def _tensorrt(source: Source, file: Path) -> None:
    shape = f"{len(source.card['mean'])}x{source.card['image_size'][0]}x{source.card['image_size'][1]}"
    sizes = [f"--{kind}Shapes=images:{images}x{shape}" for kind, images in (("min", 1), ("opt", 16), ("max", 64))]
    done = subprocess.run(
        ["trtexec", f"--onnx={source.onnx}", f"--saveEngine={file}", *sizes, "--skipInference"],
        capture_output=True,
        text=True,
    )
    if done.returncode or not file.is_file():
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise UserError(f"trtexec failed: {lines[-1] if lines else f'exit code {done.returncode}'}")


FORMATS = {
    "fp16": Format(
        "student.fp16.onnx", "onnxruntime", "pip install 'scalekd[onnx]'", _fp16, _run_onnx, "ONNX, half precision"
    ),
    "openvino": Format(
        "student.xml", "openvino", "pip install openvino", _openvino, _run_openvino, "OpenVINO, with student.bin"
    ),
    "coreml": Format(
        "student.mlpackage", "coremltools", "pip install coremltools", _coreml, None, "Core ML; runs on Apple's systems"
    ),
    "litert": Format(
        "student.tflite", "litert_torch", "pip install litert-torch", _litert, _run_litert, "LiteRT (TensorFlow Lite)"
    ),
    "executorch": Format(
        "student.pte", "executorch", "pip install executorch", _executorch, _run_executorch, "ExecuTorch with XNNPACK"
    ),
    "tensorrt": Format(
        "student.engine",
        "trtexec",
        "install NVIDIA's TensorRT, which has the program trtexec, on the machine with the GPU",
        _tensorrt,
        None,
        "TensorRT, for the GPU that makes it",
    ),
}
