"""`scalekd train`, `evaluate`, `export`, `report`, `import` and `demo`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalekd import api
from scalekd.common.errors import UserError
from scalekd.common.stop import StopRequest
from scalekd.common.text import printable

from .options import DEVICE, add_bad_images, add_models, add_recipe, add_sources, command, overrides, recipe_overrides


def add_commands(commands: Any) -> None:
    _add_train(commands)

    sub = command(commands, "evaluate", _evaluate, "top-1 and top-5 of an exported student")
    sub.add_argument("student", type=Path, help="a run's folder or its student.safetensors")
    sub.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder with one sub-folder per class, or a named source"
    )
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument("--json", action="store_true")

    sub = command(commands, "export", _export, "the student of a run as safetensors for timm, and as ONNX")
    sub.add_argument("run_folder", type=Path)
    sub.add_argument("--checkpoint", choices=["best", "last"], default="last")
    sub.add_argument("--onnx", action="store_true", help="also write student.onnx and compare its outputs")

    _add_report(commands)
    _add_import(commands)

    sub = command(commands, "demo", _demo, "a ViT teaches a small CNN on embedded real images, offline, in minutes")
    sub.add_argument("--seeds", type=int, default=1, help="seeds per method")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")


def _add_train(commands: Any) -> None:
    sub = command(commands, "train", _train, "train a student from a recipe; the same command resumes a stopped run")
    add_recipe(sub)
    add_sources(sub)
    sub.add_argument("--unlabelled", metavar="SOURCE", help="more training images, without labels; or `rest`")
    add_bad_images(sub)
    add_models(sub)
    sub.add_argument("--teacher-random", action="store_true", help="a teacher with initial weights, on purpose")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument(
        "--teacher-outputs", type=Path, metavar="DIR", help="read the teacher's outputs of another run, or keep them"
    )
    sub.add_argument("--dry-run", action="store_true", help="build everything, run the pre-flight, write nothing")
    sub.add_argument("--no-preflight", action="store_true", help="start without checks")


def _add_report(commands: Any) -> None:
    sub = command(
        commands,
        "report",
        _report,
        "one HTML page about a run or a comparison, finished or not (docs/how-to/report.md)",
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run or of a comparison")
    sub.add_argument(
        "--baseline", type=Path, action="append", default=[], metavar="RUN", help="another run beside it; repeatable"
    )
    sub.add_argument("--data", metavar="SOURCE", help="other images than the run's validation images")
    sub.add_argument("--images", type=int, metavar="N", help="use this many images (default: 2000)")
    sub.add_argument(
        "--analysis",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="written by `analyze --out`; repeatable",
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html in the folder)")
    sub.add_argument("--device", help=DEVICE)


def _add_import(commands: Any) -> None:
    sub = command(commands, "import", _import, "weights that the papers' authors released, as an exported student")
    sub.add_argument("file", type=Path, metavar="FILE", help=".pth, .pt or .safetensors, on this disk")
    sub.add_argument("--model", required=True, metavar="TIMM_NAME")
    sub.add_argument(
        "--kwargs", default="{}", metavar="YAML", help="student.kwargs of a recipe: '{class_token: false}'"
    )
    sub.add_argument("--classes", metavar="SOURCE", help="source with the head's classes (default: ImageNet-1K's)")
    sub.add_argument("--no-ema", action="store_true", help="the plain weights where the file has averaged ones too")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the student's folder (default: runs/NAME_OF_FILE)")


def _train(args: argparse.Namespace) -> None:
    with StopRequest() as stop:  # before the slow imports, so that a scheduler's signal counts during them too
        if args.dry_run:
            _check(args)
            return
        result = api.train(
            args.recipe,
            data=args.data,
            val=args.val,
            unlabelled=args.unlabelled,
            teacher=args.teacher,
            student=args.student,
            out=args.out,
            device=args.device,
            preflight=not args.no_preflight,
            teacher_outputs=args.teacher_outputs,
            overrides=overrides(args),
            stop=stop,
            verbose=True,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        from scalekd.train.log import top1_of

        print(
            printable(
                f"{top1_of(result.summary)} {result.top1:.2f} %  student {result.student}  report {result.report}"
            )
        )


def _check(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.parallel import processes
    from scalekd.config.recipe import load_recipe
    from scalekd.runs.assistants import check_chain

    config = load_recipe(args.recipe, recipe_overrides(args))
    with processes(args.device) as device:
        check_chain(config, device, Console(emoji=False))


def _evaluate(args: argparse.Namespace) -> None:
    found = api.evaluate(args.student, data=args.data, device=args.device)
    if args.json:
        print(json.dumps(asdict(found)))
    else:
        print(f"top-1 {found.top1:.2f} %  top-5 {found.top5:.2f} %  loss {found.loss:.4f}  on {found.images} images")


def _export(args: argparse.Namespace) -> None:
    found = api.export(args.run_folder, checkpoint=args.checkpoint, onnx=args.onnx)
    for file, difference in found.differences.items():
        reader = "onnxruntime" if file == found.onnx else "timm loads it back"
        print(printable(f"{file}  {reader}: largest difference of logits {difference:.1e}"))


def _report(args: argparse.Namespace) -> None:
    found = api.report(
        args.folder,
        baselines=args.baseline,
        data=args.data,
        images=args.images,
        analyses=args.analysis,
        out=args.out,
        device=args.device,
    )
    for line in [*found.left_out, f"report {found.path}"]:
        print(printable(line))


def _import(args: argparse.Namespace) -> None:
    from scalekd.common.yaml_file import parse_yaml
    from scalekd.runs.imported import import_student

    kwargs = parse_yaml(args.kwargs, "--kwargs")
    if not isinstance(kwargs, dict):
        raise UserError("--kwargs: a mapping such as '{class_token: false}'")
    out = args.out or Path("runs") / args.file.stem
    for line in import_student(args.file, args.model, kwargs, out, args.classes, ema=not args.no_ema):
        print(printable(line))


def _demo(args: argparse.Namespace) -> None:
    from scalekd.demo.demo import demo

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: one or more")
    demo(args.out, range(args.seeds))
