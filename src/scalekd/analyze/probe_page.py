"""The output of `scalekd probe`: the table on the screen, summary.md, and the figure."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from scalekd.common.markdown import code, escaped, table_row
from scalekd.common.tables import fitted
from scalekd.common.text import printable, tick_text

from .figures import COLOURS, MARKERS, figure_class, short

Shots = int | str  # labelled images per class, or ALL
ALL = "all"
KINDS = ("linear", "knn")


def _rows(found: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(model, classifier, a cell per number of shots), then the differences from the first model."""
    k = found["neighbours"]["k"]
    names = {"linear": "linear", "knn": f"{k}-nn"}
    shots = [str(n) for n in found["shots"]]
    rows = [
        (text, names[kind], [_cell(model["shots"][n][kind]) for n in shots])
        for kind in KINDS
        for text, model in found["models"].items()
    ]
    two = len(found["models"]) == 2
    rows += [
        (
            "second minus first" if two else f"{text} minus the first",
            names[kind],
            [_cell(by_shots[n][kind], "+") for n in shots],
        )
        for kind in KINDS
        for text, by_shots in found["against_first"].items()
    ]
    return rows


def _cell(over_draws: dict[str, Any], sign: str = "") -> str:
    half = over_draws["half_width_95"]
    return f"{over_draws['mean']:{sign}.2f}" + (f" ± {half:.2f}" if half is not None else "")


def _notes(found: dict[str, Any]) -> list[str]:
    data, draws = found["data"], found["draws"]
    labels = f"{data['train_images']} labelled images of {data['classes']} classes, {data['train']}"
    metric = "Top-1 %" if found["metric"] == "top-1 %" else found["metric"]
    lines = [f"{metric} on {data['val_images']} images, {data['val']}; {labels}."]
    if draws > 1 and found["shots"] != [ALL]:
        lines.append(
            f"Columns: labelled images per class. Mean of {draws} draws ± half of its 95 % interval; the draws are the same "
            "for all models."
        )
    return lines


def _figure(found: dict[str, Any]) -> str:
    return "mAP" if found["metric"] == "mAP %" else "Accuracy"


def show(found: dict[str, Any], console: Console) -> None:
    shots = [str(n) for n in found["shots"]]
    rows = [[printable(text), kind, *cells] for text, kind, cells in _rows(found)]
    table = fitted(["model", "", *shots], rows, console, shots)
    console.print("", table, "", *_notes(found), sep="\n", markup=False, highlight=False, soft_wrap=True)


def markdown(found: dict[str, Any], figure: str | None) -> str:
    """The text of summary.md. figure: the file name of the figure, if there is one."""
    lines = ["# Probe", "", *_notes(found), ""]
    lines += [f"| model | | {' | '.join(map(str, found['shots']))} |", f"|---|---|{'---:|' * len(found['shots'])}"]
    lines += [table_row([text, kind, *cells]) for text, kind, cells in _rows(found)]
    lines += ["", *([f"![{_figure(found)} over labelled images per class]({figure})", ""] if figure else [])]
    for text, model in found["models"].items():
        card = model["card"]
        size = "x".join(map(str, card["image_size"]))
        source = f"{card['model']}, weights {card['weights']} (sha256 {card['sha256'][:12]})"
        lines.append(
            f"- {escaped(text)}: {escaped(source)}, {model['features']} features, {size}, {card['channels']} channel(s)"
        )
    made = found["provenance"]
    by = f"scalekd {made['scalekd']}, torch {made['torch']}, timm {made['timm']}, {made['machine']}"
    return "\n".join([*lines, "", code(made["command"]), "", f"{by}. Every draw: results.json.", ""])


def drawing(found: dict[str, Any]) -> Any:
    """A matplotlib figure: top-1 or mAP over labelled images per class, with the intervals of the linear classifiers."""
    classes, models = found["data"]["classes"], found["models"]
    figure = figure_class()[0](figsize=(7.0, 4.6), layout="constrained")
    axes = figure.subplots()
    ticks: dict[float, str] = {}
    for i, (text, model) in enumerate(models.items()):
        cells = model["shots"]
        counts = [cell["images"] / classes for cell in cells.values()]
        ticks |= {at: f"all ({tick_text(round(at))})" if n == ALL else n for n, at in zip(cells, counts)}
        shifted = [at * 1.025 ** (i - (len(models) - 1) / 2) for at in counts]  # so that intervals do not overlap
        style: dict[str, Any] = {"marker": MARKERS[i % 8], "markersize": 5, "color": COLOURS[i % 6]}
        linear, knn = ([cell[kind] for cell in cells.values()] for kind in KINDS)
        halves = [f["half_width_95"] or 0.0 for f in linear]
        axes.errorbar(shifted, [f["mean"] for f in linear], halves, label=short(text), capsize=3, **style)
        axes.plot(counts, [f["mean"] for f in knn], ls=":", alpha=0.7, **style)
    axes.set(
        xscale="log",
        xlabel="labelled images per class",
        ylabel=f"{found['metric']}, linear (dotted: nearest neighbours)",
    )
    axes.set_xticks(list(ticks), labels=list(ticks.values()))
    axes.minorticks_off()
    axes.grid(True, which="major", color="#dddddd")
    axes.legend(fontsize=8)
    return figure
