"""`scalekd head` and `scalekd probe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError


def _head(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.parallel import pick_device
    from scalekd.common.shortages import shortages_told
    from scalekd.common.yaml_file import parse_yaml
    from scalekd.data.options import Augment, Data
    from scalekd.data.sources.open import pair_of
    from scalekd.heads.fit import check_folder, fit_head
    from scalekd.heads.page import tell_use
    from scalekd.models.options import Model
    from scalekd.models.weights.folder import beside, written_out

    from .keys import as_options, parsed

    for name in ("draws", "val_limit"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count}: one or more")
    values = {
        key: None if text is None else parse_yaml(text, f"--{key.replace('_', '-')}")
        for key, text in vars(args).items()
        if key in ("kwargs", "image_size", "mean", "std")
    }
    named = {"model": args.model, "weights": args.weights, "prefix": args.prefix} | values
    spec = parsed(Model, as_options(written_out)(named, "teacher", args.channels or 3))
    train, val = pair_of(args.data) or (args.data, None)
    split = {"limit": args.limit, "seed": args.seed, "channels": args.channels}
    data = parsed(Data, {"train": train, "val": args.val or val} | split)
    crop_pct = None if args.crop_pct is None else parsed(Augment, {"crop_pct": args.crop_pct}).crop_pct
    if crop_pct is None and spec.model != args.model and (folder := beside(Path(str(spec.weights)))):
        crop_pct = folder.crop_pct
    more = {"crop_pct": crop_pct, "draws": args.draws, "val_limit": args.val_limit}
    if args.cache:
        more["cache"] = args.cache
    check_folder(args.out)
    device, console = pick_device(args.device), Console(emoji=False)
    with shortages_told(device, "Try --device cpu, or a smaller --image-size."):
        card = as_options(fit_head)(spec, data, args.out, device, console, **more)
    tell_use(console, spec, card, args.out)


def _probe(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.analyze.probe import parse_shots, probe
    from scalekd.common.parallel import pick_device
    from scalekd.common.sections import height_and_width
    from scalekd.common.shortages import shortages_told
    from scalekd.common.yaml_file import parse_yaml
    from scalekd.data.options import Data
    from scalekd.data.sources.open import pair_of

    from .keys import parsed

    for name in ("draws", "val_limit"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count}: one or more")
    shots = parse_shots(args.shots)
    size = None if args.image_size is None else parse_yaml(args.image_size, "--image-size")
    train, val = pair_of(args.data) or (args.data, None)
    data = parsed(Data, {"train": train, "val": args.val or val, "seed": args.seed, "image_size": size})
    more: dict[str, Any] = {"shots": shots, "draws": args.draws, "val_limit": args.val_limit, "dry_run": args.dry_run}
    if size is not None:
        more["image_size"] = height_and_width(data.image_size)
    if args.cache:
        more["cache"] = args.cache
    device = pick_device(args.device)
    with shortages_told(device, "Try --device cpu, a smaller --image-size, or fewer --shots."):
        probe(args.models, data, args.out, device, Console(emoji=False), **more)
