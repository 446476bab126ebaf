"""`scalekd train`, `report`, `import` and `demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from scalekd import api
from scalekd.common import stop
from scalekd.common.errors import UserError
from scalekd.common.text import printable

from .options import (
    DEVICE,
    add_bad_images,
    add_models,
    add_recipe,
    add_sources,
    command,
    keeps_result,
    overrides,
    recipe_overrides,
)


def add_commands(commands: Any) -> None:
    _add_train(commands)

    _add_report(commands)
    _add_import(commands)

    sub = command(commands, "demo", _demo, "distil a ViT into a small CNN on embedded real images; offline, in minutes")
    keeps_result(sub)
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds per method (default: 1)")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="(default: runs/demo)")


def _add_train(commands: Any) -> None:
    sub = command(commands, "train", _train, "train a student from a recipe; the same command resumes a stopped run")
    keeps_result(sub)
    add_recipe(sub)
    add_sources(sub)
    sub.add_argument(
        "--unlabelled",
        metavar="SOURCE",
        help="more training images without labels; `rest`: those left out by data.limit",
    )
    add_bad_images(sub)
    add_models(sub)
    sub.add_argument("--teacher-random", action="store_true", help="use a teacher with random initial weights")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument(
        "--teacher-outputs",
        type=Path,
        metavar="DIR",
        help="a folder where runs with the same inputs share the teacher's outputs",
    )
    sub.add_argument("--dry-run", action="store_true", help="build everything and run the pre-flight; write nothing")
    sub.add_argument("--no-preflight", action="store_true", help="train without the checks before step 1")


def _add_report(commands: Any) -> None:
    sub = command(
        commands,
        "report",
        _report,
        "write an HTML page about a run or a comparison, finished or not (`scalekd docs report`)",
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run or of a comparison")
    sub.add_argument(
        "--baseline",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="another run to compare with; repeatable",
    )
    sub.add_argument("--data", metavar="SOURCE", help="images to use instead of the run's validation images")
    sub.add_argument("--images", type=int, metavar="N", help="use this many images (default: 2000)")
    sub.add_argument(
        "--analysis",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder written by `analyze ... --out`; repeatable",
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html in the folder)")
    sub.add_argument("--device", help=DEVICE)


def _add_import(commands: Any) -> None:
    sub = command(
        commands, "import", _import, "convert weights released by the papers' authors into an exported student"
    )
    sub.add_argument("file", type=Path, metavar="FILE", help="a local .pth, .pt or .safetensors file")
    sub.add_argument("--model", required=True, metavar="TIMM_NAME", help="the timm model that the weights belong to")
    sub.add_argument(
        "--kwargs", default="{}", metavar="YAML", help="as student.kwargs in a recipe, such as '{class_token: false}'"
    )
    sub.add_argument(
        "--classes", metavar="SOURCE", help="a source with the classes of the head (default: ImageNet-1K's)"
    )
    sub.add_argument("--no-ema", action="store_true", help="use the plain weights if the file also has averaged ones")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the student's folder (default: runs/NAME_OF_FILE)")


def _train(args: argparse.Namespace) -> None:
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
        stop=stop.current(),
        verbose=True,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        key = result.summary["best_by"]
        if result.summary[f"best_{key}"] > result.summary[key]:
            print(printable(f"`scalekd export {result.folder} --checkpoint best` exports the best weights instead"))
        name, value = result.summary["figure"], result.summary[result.summary["best_by"]]
        print(printable(f"{name} {value:.2f} %  student {result.student}  report {result.report}"))


def _check(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.parallel import processes
    from scalekd.config.recipe import load_recipe
    from scalekd.runs.assistants import check_chain
    from scalekd.runs.distillation import check_teacher_outputs

    config = load_recipe(args.recipe, recipe_overrides(args))
    with processes(args.device) as device:
        check_teacher_outputs(config, args.teacher_outputs)
        check_chain(config, device, Console(emoji=False))


def _report(args: argparse.Namespace) -> None:
    result = api.report(
        args.folder,
        baselines=args.baseline,
        data=args.data,
        images=args.images,
        analyses=args.analysis,
        out=args.out,
        device=args.device,
    )
    for line in [*result.left_out, f"report {result.path}"]:
        print(printable(line))


def _import(args: argparse.Namespace) -> None:
    from scalekd.common.yaml_file import parse_yaml
    from scalekd.runs.imported import import_student

    kwargs = parse_yaml(args.kwargs, "--kwargs")
    if not isinstance(kwargs, dict):
        raise UserError("--kwargs: write a mapping such as '{class_token: false}'")
    out = args.out or Path("runs") / args.file.stem
    for line in import_student(args.file, args.model, kwargs, out, args.classes, ema=not args.no_ema):
        print(printable(line))


def _demo(args: argparse.Namespace) -> None:
    from scalekd.demo.demo import demo

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be 1 or more")
    demo(args.out, range(args.seeds))
