"""Writes the ladders of the methods since ScaleKD, of those for foundation models, and of those that change the ViT.

    python lab/newer.py

writes lab/newer-search.yaml and lab/vit-search.yaml, with four tries for each method as in ladders.py, and
lab/label-free.yaml, whose losses on features need no search: they stand alone. When docs/results/lab/newer-search exists,
also lab/newer-edges.yaml; with its results lab/newer.yaml for the three students; and with those of vit-search
lab/newer-vit.yaml for the ViT on 8,000 canvases. The rows beside which the methods stand have the losses of the first
search.
"""

from __future__ import annotations

from typing import Any

from ladders import at_best, best, best_rates, beyond, kd, records, search, students, tuned, weighted, write
from rows import (
    FACTORS,
    KD_FORMS,
    LABEL_FREE,
    LONG,
    NEWER,
    NO_TEACHER,
    OWN_DATA,
    SOFT_DIST,
    STUDENTS,
    VIT_FORMS,
    VIT_TRIES,
    Losses,
)

BESIDE = ("KD", "DIST", "FitNet")


def newer_search(lrs: dict[str, float]) -> dict[str, Any]:
    methods = {"no teacher": NO_TEACHER}
    for label, (options, tries) in KD_FORMS.items():
        methods |= {f"{label} {setting}": kd(tried, **options) for setting, tried in tries.items()}
    for label, losses in NEWER.items():
        methods |= {f"{label} x{factor:g}": weighted(losses, factor) for factor in FACTORS}
    title = "The search for the methods since ScaleKD: four tries for every method"
    return search(lrs) | {"name": "newer-search", "title": title, "methods": methods}


def vit_search(lrs: dict[str, float], long: dict[str, float]) -> dict[str, Any]:
    tries = {
        f"{label} {setting}": VIT_FORMS[label] | {"losses": losses}
        for label, settings in VIT_TRIES.items()
        for setting, losses in settings.items()
    }
    return search(lrs) | {
        "name": "vit-search",
        "title": "The search for methods that change the ViT: four tries each",
        "students": students(LONG, long),
        "methods": {"no teacher": NO_TEACHER} | tries,
    }


def newer_edges(top1: dict[str, float], lrs: dict[str, float]) -> dict[str, Any]:
    """The search beyond its ends, for the methods that were best there."""
    title = "The search for the methods since ScaleKD beyond its ends"
    return search(lrs) | {
        "name": "newer-edges",
        "title": title,
        "methods": {"no teacher": NO_TEACHER} | beyond(NEWER, top1),
    }


def newer_rows(top1: dict[str, float]) -> dict[str, Losses]:
    """The methods since ScaleKD at their best tries, and DIST at the temperature that was best in trials (docs/log.md)."""
    forms = {label: kd(tries[best(top1, f"{label} ")], **options) for label, (options, tries) in KD_FORMS.items()}
    return SOFT_DIST | forms | at_best(NEWER, top1)


def of_other_vits(top1: dict[str, float]) -> dict[str, Losses]:
    """The methods that change the ViT at their best tries, and the wider ViTs without a teacher."""
    found = {label: VIT_FORMS[label] | {"losses": tries[best(top1, f"{label} ")]} for label, tries in VIT_TRIES.items()}
    return {f"{label}, no teacher": VIT_FORMS[label] | NO_TEACHER for label in ("WideLast", "Lift")} | found


def label_free(lrs: dict[str, float]) -> dict[str, Any]:
    """Two students on images whose labels are not read; their top-1 is by nearest neighbours."""
    return {
        "name": "label-free",
        "title": "Features without labels",
        "recipe": "base.yaml",
        "set": {
            "data": {"train": None, "unlabelled": "idx:runs/lab/data/train", "unlabelled_limit": 2000, "limit": None}
        },
        "students": {label: student for label, student in students(STUDENTS, lrs).items() if label != "ViT"},
        "methods": {label: {"losses": losses} for label, losses in LABEL_FREE.items()},
        "baseline": "FitNet",
        "seeds": [0, 1, 2],
    }


def main() -> None:
    lrs, long = best_rates("rates", STUDENTS), best_rates("vit-rates", LONG)
    put(newer_search(lrs))
    put(vit_search(lrs, long))
    put(label_free(lrs))
    searched = top1("newer-search")
    if not searched:
        return
    put(newer_edges(searched, lrs))
    edge = top1("newer-edges")
    if not edge:
        return
    known = tuned(top1("search") | top1("edges"))
    beside = {"no teacher": NO_TEACHER} | {label: known.compared[label] for label in BESIDE}
    beside |= {"ScaleKD": known.scalekd, "ScaleKD with KD": known.with_kd, "own-data": OWN_DATA}
    shared = {"recipe": "base.yaml", "baseline": "no teacher", "seeds": [0, 1, 2]}
    rows = beside | newer_rows(searched | edge)
    title = "The methods since ScaleKD and those for foundation models"
    put(shared | {"name": "newer", "title": title, "students": students(STUDENTS, lrs), "methods": rows})
    of_vits = top1("vit-search")
    if not of_vits:
        return
    rows |= of_other_vits(of_vits)
    put(shared | {"name": "newer-vit", "title": title, "students": students(LONG, long), "methods": rows})


def put(ladder: dict[str, Any]) -> None:
    write(ladder, by="newer")


def top1(name: str) -> dict[str, float]:
    """Of every recorded try, by its label."""
    return {record["method"]: record["top1"] for record in records(name)}


if __name__ == "__main__":
    main()
