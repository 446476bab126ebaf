"""Collects the measured gains of docs/results into src/scalekd/compare/evidence.json, from which `scalekd advise` reads.

    python tools/evidence.py

Run it after a comparison of lab/ was finished or repeated. A test checks that the file follows from docs/results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from scalekd.config.losses import written_out

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "src/scalekd/compare/evidence.json"
PAIRS = {"teacher": "own classes", "start": "from scratch", "labels": 2000, "classes": 100}  # the first laboratory
COLOUR = {"teacher": "fitted classifier", "start": "from scratch", "labels": 9600, "classes": 120}
OF_A_SIZE = ("heads", "width")  # options that fit the laboratory's models only
STUDENTS = {"CNN": "CNN", "MLP": "Mixer", "ViT": "ViT"}
FEW = {"teacher": "fitted classifier", "start": "from scratch", "classes": 10}

# A folder of docs/results -> what its runs have in common, and what each of its students is
SITUATIONS: dict[str, dict[str, Any]] = {
    "lab/ladder": {"all": PAIRS, "students": {label: {"kind": kind} for label, kind in STUDENTS.items()}},
    "lab/methods": {"all": PAIRS, "students": {label: {"kind": kind} for label, kind in STUDENTS.items()}},
    "lab/newer": {"all": PAIRS, "students": {label: {"kind": kind} for label, kind in STUDENTS.items()}},
    # not lab/newer-vit: some of its rows are other students
    "lab/vit": {"all": PAIRS | {"labels": 8000}, "students": {"ViT": {"kind": "ViT"}}},
    "labels": {
        "all": FEW,
        "students": {f"{labels} labels": {"kind": "CNN", "labels": labels} for labels in (10, 100, 1000)},
    },
    **{
        f"lab-colour/{ladder}": {"all": COLOUR, "students": {kind: {"kind": kind} for kind in ("CNN", "ViT")}}
        for ladder in ("steps-300", "newer-300", "steps-1500", "steps-6000")
    },
    **{
        f"lab-colour/pre-trained-{steps}": {
            "all": COLOUR | {"start": "pre-trained"},
            "students": {"pre-trained CNN": {"kind": "CNN"}},
        }
        for steps in (300, 1500)
    },
}


def evidence() -> dict[str, Any]:
    """`gains`, one entry for each situation; `label_free`, of students that saw no label; and `costs`, of each method in
    each file of step times."""
    gains = _together(
        entry
        for folder, about in SITUATIONS.items()
        if (file := ROOT / "docs/results" / folder / "summary.json").is_file()
        for entry in _gains(file, about)
    )
    costs = [_cost(file) for file in sorted((ROOT / "docs/results/performance").glob("steps-*.json"))]
    return {"gains": gains, "label_free": _label_free(), "costs": costs}


def _gains(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    summary = json.loads(file.read_text())
    records = [json.loads(line) for line in file.with_name("results.jsonl").read_text().splitlines()]
    losses = {(r["student"], r["method"]): short(r["recipe"]["losses"]) for r in records}
    balanced = {(r["student"], r["method"]): _adjusts(r["recipe"].get("balance")) for r in records}
    found = []
    for label, student in about["students"].items():
        rows = summary["students"].get(label, {})
        baseline = rows.get(summary["baseline"])
        gains = {
            name: {
                "gain": round(row["gain"], 2),
                "ci95": round(row["gain_ci95"], 2),
                "seeds": row["pairs"],
                "losses": losses[label, name],
                "balanced": balanced[label, name],
                "file": str(file.relative_to(ROOT)),
            }
            for name, row in rows.items()
            if row.get("pairs", 0) > 1
        }
        if baseline and gains:
            found.append(
                {
                    **about["all"],
                    "label": label,
                    **student,
                    "steps": baseline["steps"],
                    "baseline": round(baseline["mean"], 2),
                    "rows": gains,
                }
            )
    return found


def _adjusts(balance: dict[str, Any] | None) -> bool:
    """Whether a recipe's `balance` scales the losses, and does not only measure them."""
    return balance is not None and bool(balance.get("adjust", True))


def _together(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for those of the same situation; of a row in several files the first. The baseline is that of the first."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        situation = json.dumps({key: value for key, value in entry.items() if key not in ("rows", "baseline")})
        first = found.setdefault(situation, entry)
        first["rows"] = entry["rows"] | first["rows"]
    return list(found.values())


def short(losses: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The losses of a recipe without default values, and without options that fit only models of some size."""
    defaults = {name: options | {"weight": 1.0} for name, options in written_out({name: {} for name in losses}).items()}
    return {
        name: {k: v for k, v in options.items() if k not in OF_A_SIZE and v != defaults[name].get(k)}
        for name, options in losses.items()
    }


def _label_free() -> dict[str, Any]:
    """Labels of each class -> top-1 of a linear classifier that was fitted on the features, a mean over the students."""
    file = ROOT / "docs/results/labels-none/results.json"
    measured = json.loads(file.read_text())
    top1 = {
        shots: round(mean(model["shots"][str(shots)]["linear"]["mean"] for model in measured["models"].values()), 2)
        for shots in measured["shots"]
    }
    steps = json.loads(file.with_name("none-0.json").read_text())["steps"]
    return {"file": str(file.relative_to(ROOT)), "top1": top1, "students": len(measured["models"]), "steps": steps}


def _cost(file: Path) -> dict[str, Any]:
    """Medians of the seconds of a step, relative to the step that has the teacher's pass but no loss that reads it."""
    measured = json.loads(file.read_text())
    floor = measured["seconds"]["floor"][1]
    return {
        "file": str(file.relative_to(ROOT)),
        "machine": measured["machine"],
        "over_floor": {name: round(seconds[1] / floor, 2) for name, seconds in measured["seconds"].items()},
    }


def text() -> str:
    return json.dumps(evidence(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
