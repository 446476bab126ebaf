"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def shortcuts(args: argparse.Namespace) -> list[str]:
    """The overrides that --data, --val, --on-bad-image, --teacher and --student stand for."""
    from scalekd.data.sources.open import pair_of

    overrides = []
    if args.data:
        train, val = pair_of(args.data) or (args.data, None)
        overrides += [f"data.train={json.dumps(train)}", f"data.val={json.dumps(val)}"]
    if args.val:
        overrides.append(f"data.val={json.dumps(args.val)}")
    if getattr(args, "unlabelled", None):
        overrides.append(f"data.unlabelled={json.dumps(args.unlabelled)}")
    if args.on_bad_image:
        overrides.append(f"data.on_bad_image={args.on_bad_image}")
    if args.teacher:
        overrides += [f"teacher.model={json.dumps(args.teacher)}", "teacher.weights=pretrained"]
    if getattr(args, "teacher_random", False):
        overrides.append("teacher.weights=random")
    if args.student:
        overrides.append(f"student.model={json.dumps(args.student)}")
    return overrides


def _labels(text: str) -> list[str]:
    return [label.strip() for label in text.split(",") if label.strip()]


def _tell(
    args: argparse.Namespace, found: Any, show: Callable[..., None], markdown: Callable[[Any], str] | None = None
) -> None:
    """In the form that was asked for: --json, --markdown where there is one, or on the screen."""
    if args.json:
        print(json.dumps(found, indent=2))
    elif markdown and args.markdown:
        print(markdown(found), end="")
    else:
        from rich.console import Console

        show(found, Console(emoji=False))
