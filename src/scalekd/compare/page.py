"""A comparison's summary as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scalekd.common.markdown import code, escaped
from scalekd.common.text import duration
from scalekd.report.page import NONE, facts_section, page, section
from scalekd.report.svg import escape, finite, keys, svg_figure

from .plot import (
    GAIN_KEYS,
    STYLE,
    Cell,
    Panel,
    by_seed,
    curve_panels,
    figures_in,
    gain_label,
    gain_panels,
    is_significant,
)

MARK = "◆"  # marks a significant gain, in tables as in the plot


@dataclass
class Table:
    """Cells as text. `note` explains columns whose names do not."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def markdown(summary: dict[str, Any]) -> str:
    """The page as Markdown. summary: from `compare.results.summary`."""
    main, *details = _tables(summary)
    blocks = [f"# {escaped(summary['title'])}", *map(escaped, _about(summary)), escaped(_what_was_run(summary))]
    blocks += [*_markdown_table(main), "\n".join(f"- {escaped(line)}" for line in _legend(summary))]
    for table in details:
        blocks += _markdown_table(table)
    if summary["failed"]:
        failed = (f"- {escaped(which)}: {code(error)}" for which, error in _failed(summary))
        blocks += ["## Failed runs", "\n".join(failed)]
    facts = (f"- {name}: {code(text) if name == 'command' else escaped(text)}" for name, text in _facts(summary))
    return "\n\n".join([*blocks, "## Facts", "\n".join(facts)]) + "\n"


def html(summary: dict[str, Any], more: Sequence[str] = ()) -> str:
    """The page as HTML. more: HTML sections to add before the facts."""
    main, *details = _tables(summary)
    intro = [*_about(summary), _what_was_run(summary)]
    legend = f'<ul class="note">{"".join(f"<li>{escape(line)}</li>" for line in _legend(summary))}</ul>'
    sections = [
        "".join(f"<p>{escape(text)}</p>" for text in intro),
        section("Gains", _figures(gain_panels(summary), gain_label(summary)) + _legend_of(GAIN_KEYS)),
        section(escape(main.title), _html_table(main) + legend),
    ]
    if curves := curve_panels(summary):
        note = "The baseline and the methods with the largest gains, averaged over the students. Means over seeds. "
        note += "Early points may lie below the axis."
        figures = _figures(curves, f"{summary['metric']} over samples seen")
        name = "mAP" if summary["metric"].startswith("mAP") else "Accuracy"
        sections.append(section(f"{name} over samples seen", figures, note))
    sections += [section(escape(table.title), _html_table(table), escape(table.note)) for table in details]
    if summary["failed"]:
        rows = [[which, error] for which, error in _failed(summary)]
        sections.append(section("Failed runs", _html_table(Table("", ["run", "error"], rows), "words")))
    sections += [*more, facts_section(dict(_facts(summary)))]
    return page(escape(summary["title"]), sections, STYLE + PAGE_STYLE)


# ---------------------------------------------------------------- text and tables of both formats


def _about(summary: dict[str, Any]) -> list[str]:
    """The ladder's header as paragraphs, separated by empty lines."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(str(line).strip() for line in summary["about"]))
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def _what_was_run(summary: dict[str, Any]) -> str:
    seeds = summary["seeds"]
    counts = [_count(len(_methods(summary)), "method"), _count(len(summary["students"]), "student")]
    counts.append(f"{_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})")
    text = f"{', '.join(counts)}: {summary['finished']} of {_count(summary['planned'], 'planned run')} finished"
    text += f", {len(summary['failed'])} failed." if summary["failed"] else "."
    if finite(summary["teacher_top1"]):
        text += f" The teacher: {summary['teacher_top1']:.2f} {summary['metric']}."
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _methods(summary: dict[str, Any]) -> list[str]:
    """All students' methods, in the ladder's order."""
    return list(dict.fromkeys(name for methods in summary["students"].values() for name in methods))


def _tables(summary: dict[str, Any]) -> list[Table]:
    """One table with all students side by side, then one per student with every seed."""
    head, rows = ["method"], [[name] for name in _methods(summary)]
    for student, methods in summary["students"].items():
        head += [student, f"{student}, gain"]
        for row in rows:
            cell = methods.get(row[0], {})
            row += [_mean_text(cell, summary), _gain_text(cell, summary)]
    main = Table(f"Results: {summary['metric']} and gain over {summary['baseline']}", head, rows)
    return [main, *(_details(name, methods, summary) for name, methods in summary["students"].items())]


def _mean_text(cell: Cell, summary: dict[str, Any]) -> str:
    return _measured(cell, "mean", "ci95", "", len(figures_in(cell)), summary)


def _gain_text(cell: Cell, summary: dict[str, Any]) -> str:
    text = _measured(cell, "gain", "gain_ci95", "+", cell.get("pairs") or 0, summary)
    return f"{text} {MARK}" if is_significant(cell) else text


def _measured(cell: Cell, mean: str, half: str, sign: str, seeds: int, summary: dict[str, Any]) -> str:
    """'55.10 ± 0.60', with the number of seeds if some are missing."""
    if not finite(cell.get(mean)):
        return NONE
    text = f"{cell[mean]:{sign}.2f}"
    if finite(cell.get(half)):
        text += f" ± {cell[half]:.2f}"
    return text if seeds == len(summary["seeds"]) else f"{text} (n={seeds})"


def _details(student: str, methods: dict[str, Cell], summary: dict[str, Any]) -> Table:
    """The figure of every seed, the test, and the steps and seconds of a run."""
    extra = (seed for cell in methods.values() for seed in cell["seeds"])
    seeds = list(dict.fromkeys([*summary["seeds"], *extra]))
    tested = any(finite(cell.get("p")) for cell in methods.values())
    rows = []
    for name, cell in methods.items():
        figures = by_seed(cell)
        row = [name, *(f"{figures[seed]:.2f}" if seed in figures else NONE for seed in seeds)]
        row += [_p_text(cell.get("p")), _p_text(cell.get("p_holm"))] if tested else []
        row.append(f"{cell['reach']:.0%}" if finite(cell.get("reach")) else NONE)
        row.append(str(cell["steps"]) if finite(cell.get("steps")) else NONE)
        row.append(f"{cell['seconds']:.1f}" if finite(cell.get("seconds")) else NONE)
        rows.append(row)
    head = ["method", *(f"seed {seed}" for seed in seeds), *(["p", "p, Holm"] if tested else [])]
    head += ["reaches", "steps", "seconds"]
    note = f"{summary['metric']} of every seed. reaches: the share of the baseline's samples after which the mean over "
    note += (
        "seeds reaches the baseline's final value, linear between validations. steps: of a run. seconds: the median."
    )
    return Table(f"{student}, seed by seed", head, rows, note)


def _p_text(p: object) -> str:
    if not finite(p):
        return NONE
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def _legend(summary: dict[str, Any]) -> list[str]:
    """The meaning of the signs in the first table, of those that can occur."""
    cells = [cell for methods in summary["students"].values() for cell in methods.values()]
    wanted = len(summary["seeds"])
    gain = (
        f"A gain is the mean difference to {summary['baseline']} in points, paired by seed: each run is compared with "
        f"the baseline of the same student and seed."
    )
    if any(finite(cell.get("ci95")) for cell in cells):
        lines = ["± is half the width of the 95 % confidence interval of the mean (Student's t over seeds)."]
        lines.append(f"{gain} Its ± is for the mean of these differences.")
    else:
        lines = ["No method has two finished seeds, so there is no interval and no test.", gain]
    if any(finite(cell.get("p_holm")) for cell in cells):
        lines.append(
            f"{MARK} marks p < 0.05 in a paired t-test, after Holm's correction for the number of methods of that student."
        )
        lines.append(
            f"With few seeds (here {wanted}) the test is weak: a method without the mark may still differ from the baseline."
        )
    if any(len(figures_in(cell)) not in (0, wanted) or cell.get("pairs") not in (None, 0, wanted) for cell in cells):
        lines.append("n is the number of seeds (for a gain, pairs of runs) where some are missing.")
    if any(not figures_in(cell) for cell in cells):
        lines.append(f"{NONE} means no value, or none yet.")
    return lines


def _failed(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(run, its error on one line)."""
    return [
        (f"{f['student']}, {f['method']}, seed {f['seed']}", " ".join(str(f["error"]).split()) or "no message")
        for f in summary["failed"]
    ]


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("command", summary["command"]), ("machine", summary["machine"])]
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())))
    facts.append(("commits" if len(summary["commits"]) > 1 else "commit", ", ".join(summary["commits"])))
    for name, key in (("wall time", "wall_seconds"), ("time of all runs", "run_seconds")):
        facts.append((name, duration(summary[key]) if finite(summary[key]) else ""))
    return [(name, text or NONE) for name, text in facts]


# ---------------------------------------------------------------- Markdown


def _markdown_table(table: Table) -> list[str]:
    """Title, note and table, with padded columns so that the source is readable too.

    The header and the first column are names from outside and are escaped. All other cells are numbers.
    """
    lines = [list(map(escaped, table.head)), *([escaped(row[0]), *row[1:]] for row in table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    texts = [
        " | ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    ]
    rule = " | ".join("-" * (width - (i > 0)) + ":" * (i > 0) for i, width in enumerate(widths))
    drawn = "\n".join(f"| {text} |" for text in (texts[0], rule, *texts[1:]))
    return [f"## {escaped(table.title)}", *([escaped(table.note)] if table.note else []), drawn]


# ---------------------------------------------------------------- HTML


def _html_table(table: Table, kind: str = "numbers") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = (
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(panels: Iterable[Panel], label: str) -> str:
    figures = (
        f"<figure><h3>{escape(panel.title)}</h3>{svg_figure(panel.parts, panel.height, f'{panel.title}: {label}')}"
        f"{_legend_of(panel.keys) if panel.keys else ''}</figure>"
        for panel in panels
    )
    return f'<div class="panels">{"".join(figures)}</div>'


def _legend_of(pairs: Iterable[tuple[str, str]]) -> str:
    return keys((drawing, escape(text)) for drawing, text in pairs)


# the first column stays visible while a table is scrolled; three plots fit side by side
PAGE_STYLE = """
body { max-width: 1240px } p, ul.note { max-width: 44rem } ul.note { padding-left: 1.2rem }
.legend svg { overflow: visible }
.panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
table { width: auto } .numbers td { text-align: right; white-space: nowrap; min-width: 0 }
.numbers th:last-child { text-align: right } thead th { vertical-align: bottom; white-space: nowrap }
th:first-child { position: sticky; left: 0; background: var(--page); max-width: 12rem }
@media (max-width: 600px) { .numbers { font-size: .8125rem } .numbers th, .numbers td { padding: .35rem .3rem } }
"""
