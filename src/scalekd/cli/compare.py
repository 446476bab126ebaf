"""`scalekd compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scalekd import api
from scalekd.common import stop

from .options import add_bad_images, command, keeps_result, names, overrides, recipe_overrides


def add_commands(commands: Any) -> None:
    sub = command(
        commands, "compare", _compare, "compare methods x students x seeds on your data; the same command resumes"
    )
    sub.add_argument("ladder", help="a shipped ladder's name or a YAML file (`scalekd docs compare`)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes every run, such as train.epochs=20")
    sub.add_argument("--methods", type=names, default=[], metavar="A,B", help="only these methods and the baseline")
    sub.add_argument("--students", type=names, default=[], metavar="A,B", help="only these students")
    sub.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: the ladder's)")
    sub.add_argument("--data", metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    add_bad_images(sub)
    sub.add_argument("--teacher", metavar="MODEL", help="as for train")
    sub.add_argument("--student", metavar="MODEL", help="as for train; only for a ladder that sets no students")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the comparison's folder (default: runs/compare-NAME)")
    sub.add_argument(
        "--known",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder of another comparison; reuse its runs with the same recipe; repeatable",
    )
    sub.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, or per CPU core)")
    sub.add_argument(
        "--share-teacher",
        action="store_true",
        help="run the teacher once for all runs of a seed; keeps its outputs on disk until they are done",
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: all GPUs if there are any)")
    sub.add_argument("--dry-run", action="store_true", help="check and list all runs; write nothing")
    keeps_result(sub)


def _compare(args: argparse.Namespace) -> int:
    if args.dry_run:
        _list(args)
        return 0
    result = api.compare(
        args.ladder,
        data=args.data,
        val=args.val,
        teacher=args.teacher,
        student=args.student,
        methods=args.methods,
        students=args.students,
        seeds=args.seeds,
        out=args.out,
        known=args.known,
        jobs=args.jobs,
        share_teacher=args.share_teacher,
        device=args.device,
        overrides=overrides(args),
        stop=stop.current(),
        verbose=True,
    )
    return 1 if result.failed else 0


def _list(args: argparse.Namespace) -> None:
    from scalekd.compare.ladder import chosen, jobs, load_ladder

    ladder = chosen(load_ladder(args.ladder), args.students, args.methods, args.seeds, args.student)
    planned = jobs(ladder, recipe_overrides(args))
    print(f"{len(planned)} runs, {sum(job.config.train.epochs for job in planned)} epochs in total")
    for job in planned:
        print(f"{job}: {', '.join(job.config.losses)}")
