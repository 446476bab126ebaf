"""Makes the page of a GPU, and the figures that `scalekd plan` uses, from the rows of `gpu.py`.

    python benchmarks/gpu_table.py runs/gpu.jsonl

writes docs/results/gpu/DEVICE.md with the rows beside it as DEVICE.jsonl, and for a card that `scalekd plan` knows its
measured steps into src/scalekd/cost/gpus.json. `--out DIR` and `--figures FILE` choose other places.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpu import read
from gpu_models import LEVERS, classes_of, pair_of, recipe
from harness import table

from scalekd.cost.count import count_step
from scalekd.cost.gpu_figures import card_of
from scalekd.cost.plan import GPUS
from scalekd.distill.build import untrained
from scalekd.models.unfilled import unfilled

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any]]
PLANNED = ("kd", "fd", "published", "default")  # forms whose steps the plan learns from
OF_NO_RECIPE = ("streams", "checkpointing", "contiguous", "graphs", "tf32")  # levers that a plan does not know


def results(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["part"] == part and "result" in row]


def speed_of(rows: Rows, pair: str, form: str, batch: int, levers: str) -> dict[str, Any] | None:
    """The result of a row of the speed part, or None."""
    wanted = {"pair": pair, "form": form, "batch": batch, "levers": levers}
    found = [row for row in results(rows, "speed") if wanted.items() <= row["options"].items()]
    return found[0]["result"] if found else None


def lines_of(rows: Rows) -> list[str]:
    """The page."""
    about = next((row["result"] for row in results(rows, "checks") if row["name"] == "environment"), {})
    device = about.get("machine", "an unknown device")
    used = ", ".join(
        f"{key} {about[key]}" for key in ("scalekd", "git", "torch", "cuda", "timm", "python") if about.get(key)
    )
    lines = [f"# {device}", "", f"Made by `{rows[0]['command']}` on {rows[0]['when'][:10]}. {used}.", ""]
    lines += ["## Correctness", "", *_checks(rows), ""]
    groups = list(dict.fromkeys((row["options"]["pair"], row["options"]["batch"]) for row in results(rows, "speed")))
    for pair, batch in groups:
        lines += [f"## {pair}, {batch} images", "", *_speed(rows, pair, batch), ""]
    for part, title, made in (("input", "Image loading", _input), ("timm", "timm's own tasks", _timm)):
        if results(rows, part):
            lines += [f"## {title}", "", *made(rows), ""]
    errors = [(row["name"], row["error"].splitlines()[0]) for row in rows if "error" in row]
    if errors:
        lines += ["## Rows without a result", "", *(f"- {name}: {error}" for name, error in errors), ""]
    return lines[:-1]


def _checks(rows: Rows) -> list[str]:
    made = []
    for row in rows:
        if row["part"] == "checks":
            found = row.get("result", {})
            verdict = "no result" if not found else "passed" if found["passed"] else "**failed**"
            made.append([row["name"], verdict, _details(found)])
    return table(["check", "verdict", "found"], made)


def _details(found: dict[str, Any]) -> str:
    """The numbers of a check: of several parts the largest of each."""
    parts = [value for value in found.values() if isinstance(value, dict)] or [found]
    numbers: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, float):
                numbers[key] = max(value, numbers.get(key, value))
    return ", ".join(f"{key} {value:.2g}" for key, value in numbers.items())


def _speed(rows: Rows, pair: str, batch: int) -> list[str]:
    made = []
    fd = speed_of(rows, pair, "fd", batch, "plain")
    for row in results(rows, "speed"):
        options, found = row["options"], row["result"]
        if (options["pair"], options["batch"]) != (pair, batch):
            continue
        ratios = [_ratio(rows, options, form, found) for form in ("floor", "literal")]
        peak, of_fd = found.get("peak_mb"), (fd or {}).get("peak_mb")
        memory = [f"{peak / 1000:.2f}" if peak else "", f"{peak / of_fd:.2f}" if peak and of_fd else ""]
        busy = f"{100 * found['busy']:.0f}" if found.get("busy") else ""
        speed = [f"{found['images_per_s']:,.0f}", f"{found['ms'][0]:.1f}"]
        made.append([f"{options['form']}, {options['levers']}", *speed, *ratios, *memory, busy])
    columns = ["step", "images/s", "ms", "time of floor's", "time of literal's", "GB", "of FD's GB", "busy %"]
    return table(columns, made)


def _ratio(rows: Rows, options: dict[str, Any], form: str, found: dict[str, Any]) -> str:
    """The step's time over that of another form, compiled if this one is and it was measured so."""
    compiled = LEVERS[options["levers"]].get("compile", False)
    for levers in (["compile"] if compiled else []) + ["plain"]:
        other = speed_of(rows, options["pair"], form, options["batch"], levers)
        if other:
            return f"{found['ms'][0] / other['ms'][0]:.2f}"
    return ""


def _input(rows: Rows) -> list[str]:
    made = []
    for row in results(rows, "input"):
        waits = row["result"].get("waits")
        made.append(
            [row["name"], f"{row['result']['images_per_s']:,.0f}", "" if waits is None else f"{100 * waits:.1f}"]
        )
    return table(["what", "images/s", "% of the time waiting for images"], made)


def _timm(rows: Rows) -> list[str]:
    made = [
        [f"{row['name']} {name}", *(f"{value:.2f}" for value in values)]
        for row in results(rows, "timm")
        for name, values in row["result"]["timm / scalekd"].items()
    ]
    return table(["step", "timm's time over ours: lower quartile", "median", "upper quartile"], made)


# ---------------------------------------------------------------- for scalekd plan


@lru_cache
def _counted(pair: str, form: str, batch: int, levers: str) -> tuple[float, float]:
    """FLOPs per image, and counted memory in MB, of a row's step."""
    config = recipe(pair, form, batch, LEVERS[levers])
    with unfilled():
        distiller = untrained(config, classes_of(pair_of(pair)), config.losses)
    step = count_step(distiller, config, classes_of(pair_of(pair)), 2)
    fixed = sum(value or 0 for value in step["fixed_mb"].values())
    return 2e9 * step["total"]["gmacs"], fixed + batch * step["total"]["saved_mb"]


def steps_for_plan(rows: Rows) -> list[dict[str, Any]]:
    """The steps that a recipe can have, as `scalekd.cost.gpu_figures` reads them."""
    steps = []
    for row in results(rows, "speed"):
        options, found = row["options"], row["result"]
        odd = any(name in options["levers"] for name in OF_NO_RECIPE)
        if options["form"] not in PLANNED or odd or not found.get("peak_mb"):
            continue
        names = [options[key] for key in ("pair", "form", "batch", "levers")]
        flops, counted = _counted(*names)
        steps.append(
            {
                "step": " ".join(map(str, names)),
                "half": "float32" not in options["levers"],
                "compiled": "compile" in options["levers"],
                "images_per_s": found["images_per_s"],
                "flops_per_image": flops,
                "peak_mb": found["peak_mb"],
                "counted_mb": counted,
            }
        )
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="the file that gpu.py wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu", metavar="DIR")
    parser.add_argument("--figures", type=Path, default=ROOT / "src" / "scalekd" / "cost" / "gpus.json", metavar="FILE")
    args = parser.parse_args()
    rows = read(args.rows)
    about = next((row["result"] for row in results(rows, "checks") if row["name"] == "environment"), None)
    if about is None:
        parser.error(
            f"{args.rows} has no row `environment`, so the device is unknown; run gpu.py with --only checks too"
        )
    name = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n".join(lines_of(rows)) + "\n")
    (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {args.out / name}.md and {name}.jsonl")
    card = card_of(about["machine"], about.get("memory_gb", 0.0), {key: values[4] for key, values in GPUS.items()})
    steps = steps_for_plan(rows) if card else []
    if steps:
        known = json.loads(args.figures.read_text()) if args.figures.is_file() else {}
        known[card] = {"device": about["machine"], "table": f"docs/results/gpu/{name}.md", "steps": steps}
        args.figures.write_text(json.dumps(known, indent=1) + "\n")
        print(f"wrote {len(steps)} steps of {card} into {args.figures}")


if __name__ == "__main__":
    main()
