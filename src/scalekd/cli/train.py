"""`scalekd train`, `evaluate`, `export`, `report`, `import` and `demo`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from scalekd.common.errors import UserError
from scalekd.common.stop import StopRequest
from scalekd.common.text import printable

from .options import shortcuts


def _train(args: argparse.Namespace) -> None:
    with StopRequest() as stop:  # before the slow imports, so that a scheduler's signal is answered in them too
        from rich.console import Console

        from scalekd.common.parallel import processes
        from scalekd.config.recipe import load_recipe
        from scalekd.runs.assistants import check_chain, train_chain
        from scalekd.train.log import top1_of

        config = load_recipe(args.recipe, [*shortcuts(args), *args.overrides])
        folder = args.out or Path("runs") / config.name
        with processes(args.device) as device:
            if args.dry_run:
                check_chain(config, device, Console(emoji=False))
                return
            summary = train_chain(
                config,
                folder,
                device,
                Console(emoji=False),
                check=not args.no_preflight,
                stop=stop,
                teacher_outputs=args.teacher_outputs,
            )
    if int(os.environ.get("RANK", "0")) == 0:
        told = f"{top1_of(summary)} {summary['top1']:.2f} %  student {folder / 'student.safetensors'}  report {folder / 'report.html'}"
        print(printable(told))


def _evaluate(args: argparse.Namespace) -> None:
    from scalekd.runs.students import evaluate_student

    result = evaluate_student(args.student, args.data, args.device)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  loss {result['loss']:.4f}  on {result['images']:.0f} images"
        )


def _export(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.runs.students import export_run

    export_run(args.run_folder, args.checkpoint, args.onnx, Console(emoji=False))


def _report(args: argparse.Namespace) -> None:
    from scalekd.compare.report import is_comparison, report_comparison
    from scalekd.report.run import report

    if is_comparison(args.folder):
        given = {"--baseline": args.baseline, "--data": args.data, "--images": args.images, "--device": args.device}
        if unused := " and ".join(flag for flag, value in given.items() if value not in (None, [])):
            raise UserError(f"{args.folder} is a comparison, whose page is made of its results: leave out {unused}")
        print(printable(f"report {report_comparison(args.folder, args.analysis, args.out)}"))
        return
    path, left_out = report(
        args.folder,
        args.device,
        baselines=args.baseline,
        data=args.data,
        images=args.images,
        analyses=args.analysis,
        out=args.out,
    )
    for line in [*left_out, f"report {path}"]:
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
