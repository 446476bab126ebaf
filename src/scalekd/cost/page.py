"""The result of `scalekd cost` on the screen and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from scalekd.common.files import make_folder, write_text
from scalekd.common.tables import fitted

COLUMNS = ["part", "params M", "GMACs forward", "GMACs backward", "saved MB"]


def cost_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [[name, *_cells(part)] for name, part in found["step"]["parts"].items()]
    rows.append(["whole step", *_cells(found["step"]["total"])])
    if found["fd"]:
        rows.append(["the same pair with fd", *_cells(found["fd"]["total"])])
    return rows


def _cells(part: dict[str, float]) -> list[str]:
    return [f"{part['params'] / 1e6:.2f}", *(f"{part[key]:.2f}" for key in ("forward", "backward", "saved_mb"))]


def cost_lines(found: dict[str, Any]) -> list[str]:
    """The sentences below the table."""
    step, ratio = found["step"], found["ratio"]
    total, fixed = step["total"], step["fixed_mb"]
    lines = [f"A step takes {total['gmacs']:.2f} GMACs and saves {total['saved_mb']:.1f} MB per image."]
    if ratio:
        times = f"{ratio['gmacs']:.2f} times the GMACs, {ratio['saved_mb']:.2f} times the saved activations"
        lines.append(f"Compared with fd (stage 4, linear layer): {times}, {ratio['memory_mb']:.2f} times the memory.")
    else:
        lines.append(f"No comparison with fd: {found['no_fd']}.")
    held = ", ".join(f"{name} {'not counted' if mb is None else f'{mb:.0f}'}" for name, mb in fixed.items() if mb != 0)
    lines.append(f"Memory at {found['batch']} images per device: {step['memory_mb']:.0f} MB, including {held} MB.")
    for method, parts in found["projectors"].items():
        sizes = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in parts.items())
        lines.append(f"{method} trains, in addition to the student: {sizes}.")
    if measured := found.get("measured"):
        lines.append(
            f"Measured on {measured['machine']}, {measured['batch']} images per step, {measured['rounds']} rounds:"
        )
        for name, (middle, least, most) in measured["ratio"].items():
            lines.append(f"The recipe's step takes {middle:.2f} times as long as {name} ({least:.2f} to {most:.2f}).")
    return lines


def _title(found: dict[str, Any]) -> str:
    size = "x".join(map(str, found["image_size"]))
    pair = f"{found['teacher']} -> {found['student']}" if found["teacher"] else found["student"]
    return f"{found['name']}: {pair}, {size}, {found['precision']}, {', '.join(found['losses'])}"


def show(found: dict[str, Any], console: Console) -> None:
    console.print(_title(found), "", markup=False, highlight=False, soft_wrap=True)
    table = fitted(COLUMNS, cost_rows(found), console, [column for column in COLUMNS if column != "part"])
    console.print(table, "", *cost_lines(found), sep="\n", markup=False, highlight=False, soft_wrap=True)


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes NAME.json and NAME.md to `folder`. Raises `UserError` if they cannot be written."""
    lines = [f"# {_title(found)}", "", f"| {' | '.join(COLUMNS)} |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in cost_rows(found)]
    lines += ["", *(f"- {line}" for line in cost_lines(found)), "", "Made by `scalekd cost` (`scalekd docs cost`)."]
    make_folder(folder)
    write_text(folder / f"{found['name']}.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / f"{found['name']}.md", "\n".join(lines) + "\n")
