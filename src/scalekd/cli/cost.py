"""`scalekd cost`, `plan` and `pairs`."""

from __future__ import annotations

import argparse

from scalekd.common.errors import UserError

from .options import _tell, shortcuts


def _pairs(args: argparse.Namespace) -> None:
    from scalekd.cost.pairs import markdown, pairs, show

    _tell(args, pairs(args.names), show, markdown)


def _cost(args: argparse.Namespace) -> None:
    from scalekd.common.parallel import pick_device
    from scalekd.config.recipe import load_recipe
    from scalekd.cost.count import cost
    from scalekd.cost.page import show, write
    from scalekd.cost.seconds import measure

    config = load_recipe(args.recipe, [*shortcuts(args), *args.overrides])
    device = pick_device(args.device)
    found = cost(config, classes=args.classes, batch=args.batch)
    if args.measure:
        found["measured"] = measure(config, device, classes=args.classes, batch=args.batch or 4)
    if args.out:
        write(found, args.out)
    _tell(args, found, show)


def _plan(args: argparse.Namespace) -> None:
    from scalekd.common.parallel import pick_device
    from scalekd.config.recipe import load_recipe
    from scalekd.cost.plan import plan
    from scalekd.cost.plan_page import markdown, show

    if args.measure and args.gpu:
        raise UserError("--gpu and --measure: one of them; --measure plans for the machine at hand")
    if not args.measure and (args.device or args.batch):
        raise UserError("--device and --batch go with --measure; without it nothing is run, and --gpu names the card")
    found = plan(
        load_recipe(args.recipe, [*shortcuts(args), *args.overrides]),
        images=args.images,
        gpu=args.gpu or "a100",
        gpus=args.gpus,
        classes=args.classes,
        measure_on=pick_device(args.device) if args.measure else None,
        batch=args.batch,
    )
    _tell(args, found, show, markdown)
