"""Chooses the weights that a finished run exports: the last ones or, with `train.export: best`, the best ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError, first_line

from . import checkpoint
from .log import read_log
from .run import KEPT, Run


def use_exported(run: Run, folder: Path, summary: dict[str, Any]) -> str:
    """Loads the weights to export into `run.deployed`, and sets their figures in `summary`. Returns a line for the screen.

    `summary` gets `exported` (last or best), `exported_step` and `best_step`. Call it on rank 0, at the end of the run.
    Raises `UserError` if best.pt is needed and cannot be used.
    """
    key, name = run.chooser, run.figures[run.chooser]
    validations = {e["step"]: e for e in read_log(folder) if e["event"] == "validation" and key in e}
    best = max(validations, key=lambda step: (validations[step][key], -step), default=summary["steps"])
    summary |= {"exported": run.config.train.export, "exported_step": summary["steps"], "best_step": best}
    text = f"exported: the last weights, after step {summary['steps']}, {name} {summary[key]:.2f} %"
    if best == summary["steps"]:
        return f"{text}; they are the best too"
    if run.config.train.export == "last":
        return f"{text}; the best, after step {best}, have {summary[f'best_{key}']:.2f} % (`train.export`)"
    state = checkpoint.load(folder / "best.pt")
    try:
        run.deployed.load_state_dict(state["student"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'best.pt'} does not fit this run: {first_line(error)}") from None
    best = int(state["step"])
    summary |= {f"last_{figure}": summary[figure] for figure in run.figures}
    theirs = validations.get(best, {})
    summary |= {key: theirs[key] for key in (*run.figures, *KEPT) if key in theirs}
    summary |= {key: state[key], "exported_step": best, "best_step": best}
    return f"exported: the best weights, after step {best}, {name} {summary[key]:.2f} %; the last have {summary[f'last_{key}']:.2f} %"
