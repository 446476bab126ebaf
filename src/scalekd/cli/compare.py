"""`scalekd compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from scalekd.common.errors import UserError
from scalekd.common.stop import StopRequest

from .options import shortcuts


def _compare(args: argparse.Namespace) -> int:
    with StopRequest() as stop:
        from rich.console import Console

        from scalekd.compare.compare import compare
        from scalekd.compare.ladder import chosen, jobs, load_ladder
        from scalekd.compare.runner import places

        ladder = chosen(load_ladder(args.ladder), args.students, args.methods, args.seeds)
        if args.student and ladder.students:
            raise UserError(f"--student: this ladder has its own: {', '.join(ladder.students)}")
        overrides = [*shortcuts(args), *args.overrides]
        if args.dry_run:
            for job in jobs(ladder, overrides):
                print(f"{job}: {', '.join(job.config.losses)}")
            return 0
        out = args.out or Path("runs") / f"compare-{ladder.name}"
        at = places(args.jobs, args.device)
        return compare(
            ladder,
            args.ladder,
            overrides,
            out,
            at,
            share=args.share_teacher,
            known=args.known,
            stop=stop,
            console=Console(emoji=False),
        )
