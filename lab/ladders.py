"""Writes the laboratory's ladder files: first those of the search, then, from its results, all others.

    python lab/ladders.py

writes lab/rates.yaml and lab/vit-rates.yaml; when docs/results/lab/rates and vit-rates exist, also lab/search.yaml; when
docs/results/lab/search exists, also lab/edges.yaml and all others.

The search tunes one number per method with four tries: a factor on its loss weight, or for KD a pair of weight and
temperature. A try is one run of the CNN with seed 100, validated on images that no student is trained on and that are
in no reported figure. The best of the four by top-1 is used for all students and seeds. If a method that ScaleKD is
compared with is best at an end of its four, it gets two more tries beyond that end (lab/edges.yaml).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rows import (
    BEYOND,
    EVERY_STUDENT,
    FACTORS,
    FORMS,
    KD,
    LADDER,
    LONG,
    NARROW,
    NO_TEACHER,
    OTHERS,
    OWN_DATA,
    OWN_RATE,
    PITFALL,
    RATES,
    STUDENTS,
    TEACHERS,
    VARIANTS,
    Losses,
)

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "lab"


def weighted(losses: Losses, factor: float) -> Losses:
    """A method's losses with weight `factor`, in addition to cross entropy."""
    return {"losses": {"ce": {}} | {name: {"weight": factor} | options for name, options in losses.items()}}


def kd(tried: tuple[float, float, float], **options: Any) -> Losses:
    task, weight, temperature = tried
    return {"losses": {"ce": {"weight": task}, "kd": {"weight": weight, "temperature": temperature} | options}}


def beyond(methods: dict[str, Losses], top1: dict[str, float]) -> dict[str, Losses]:
    """Two more tries for each method whose best factor is at an end of its four."""
    return {
        f"{label} x{factor:g}": weighted(losses, factor)
        for label, losses in methods.items()
        for factor in BEYOND.get(float(best(top1, f"{label} x")), ())
    }


def at_best(methods: dict[str, Losses], top1: dict[str, float]) -> dict[str, Losses]:
    """The methods with their best factors. top1: of every try, by its label."""
    return {label: weighted(losses, float(best(top1, f"{label} x"))) for label, losses in methods.items()}


def rates(name: str, title: str, by_label: dict[str, Any]) -> dict[str, Any]:
    """The ladder that tries every learning rate. by_label: student -> sections."""
    return {
        "name": name,
        "title": title,
        "recipe": "base.yaml",
        "set": {"data": {"val": "idx:runs/lab/data/search"}},
        "students": by_label,
        "methods": {f"lr {lr:g}": NO_TEACHER | {"optim": {"lr": lr}} for lr in RATES},
        "baseline": f"lr {RATES[1]:g}",
        "seeds": [100],
    }


def students(by_label: dict[str, Any], lrs: dict[str, float]) -> dict[str, Any]:
    """Students with their best learning rates."""
    return {label: sections | {"optim": optim(lrs[label])} for label, sections in by_label.items()}


def optim(lr: float) -> dict[str, float]:
    """Parameters of the methods have the same learning rate for every student."""
    return {"lr": lr, "projector_lr": round(OWN_RATE / lr, 2)}


def search(lrs: dict[str, float]) -> dict[str, Any]:
    methods = {"no teacher": NO_TEACHER} | {f"KD {setting}": kd(tried) for setting, tried in KD.items()}
    for label, losses in (LADDER | OTHERS).items():
        methods |= {f"{label} x{factor:g}": weighted(losses, factor) for factor in FACTORS}
    return {
        "name": "search",
        "title": "The search: four tries for every method",
        "recipe": "base.yaml",
        "set": {"data": {"val": "idx:runs/lab/data/search"}},
        "students": {"CNN": students(STUDENTS, lrs)["CNN"]},
        "methods": methods,
        "baseline": "no teacher",
        "seeds": [100],
    }


def edges(top1: dict[str, float], lrs: dict[str, float]) -> dict[str, Any]:
    """The search beyond its ends, for the methods that were best there."""
    return search(lrs) | {
        "name": "edges",
        "title": "The search beyond its ends",
        "methods": {"no teacher": NO_TEACHER} | beyond(OTHERS, top1),
    }


def best(top1: dict[str, float], prefix: str) -> str:
    """The label of the best try that starts with `prefix`, without `prefix`."""
    return max((label for label in top1 if label.startswith(prefix)), key=lambda label: top1[label])[len(prefix) :]


@dataclass
class Tuned:
    """The losses of every method at its best try."""

    kd: Losses
    ladder: dict[str, Losses]
    compared: dict[str, Losses]  # KD, FitNet and the methods of OTHERS

    @property
    def scalekd(self) -> Losses:
        return self.ladder["ScaleKD"]

    @property
    def options(self) -> dict[str, Any]:
        """ScaleKD's own term."""
        return self.scalekd["losses"]["scalekd"]

    @property
    def with_kd(self) -> Losses:
        """ScaleKD in addition to KD, both at their best tries."""
        return {"losses": self.kd["losses"] | {"scalekd": self.options}}

    def form(self, options: dict[str, Any]) -> dict[str, Any]:
        """ScaleKD with other options."""
        return {"losses": self.scalekd["losses"] | {"scalekd": self.options | options}}


def tuned(top1: dict[str, float]) -> Tuned:
    """top1: of every try of the search, by its label."""
    ladder, best_kd = at_best(LADDER, top1), kd(KD[best(top1, "KD ")])
    return Tuned(best_kd, ladder, {"KD": best_kd, "FitNet": ladder["FD (s4)"]} | at_best(OTHERS, top1))


def others(top1: dict[str, float], lrs: dict[str, float], long: dict[str, float]) -> list[dict[str, Any]]:
    """Every ladder after the search. lrs, long: student -> its best learning rate."""
    by_label = students(STUDENTS, lrs)
    shared = {"recipe": "base.yaml", "students": by_label, "baseline": "no teacher", "seeds": [0, 1, 2, 3, 4]}
    cnn = {"CNN": by_label["CNN"]}
    cnn_and_mlp = cnn | {"MLP": by_label["MLP"]}
    pitfall = {label: sections | {"optim": optim(lrs["CNN"])} for label, sections in PITFALL.items()}
    methods = tuned(top1)
    return [
        *form_ladders(shared, methods, cnn_and_mlp),
        *method_ladders(shared, methods, cnn, students(LONG, long)),
        *setting_ladders(shared, methods, cnn, pitfall),
    ]


def form_ladders(shared: dict[str, Any], methods: Tuned, few: dict[str, Any]) -> list[dict[str, Any]]:
    """Forms of ScaleKD's projectors. few: the students of the ladders with 15 seeds."""
    published, narrow = methods.form({}), methods.form(FORMS[NARROW])
    return [
        shared
        | {
            "name": "forms",
            "title": "Cheaper forms of ScaleKD's projectors beside the published one",
            "methods": {"published": published} | {label: methods.form(options) for label, options in FORMS.items()},
            "baseline": "published",
        },
        shared
        | {
            "name": "grouped",
            "title": "A 3x3 convolution in groups of channels, beside the published form",
            "methods": {
                "published": published,
                f"grouped, {NARROW}": methods.form(FORMS[NARROW] | {"tokens": "grouped"}),
            },
            "baseline": "published",
        },
        shared
        | {
            "name": "narrow",
            "title": "The cheaper form that was level with the published one, beside it, on 15 seeds",
            "students": few,
            "methods": {"published": published, NARROW: narrow},
            "baseline": "published",
            "seeds": list(range(15)),
        },
        shared
        | {
            "name": "precision",
            "title": "bf16 autocast beside float32, on 15 seeds",
            "students": few,
            "methods": {"float32": narrow, "bf16": narrow | {"train": {"precision": "bf16"}}},
            "baseline": "float32",
            "seeds": list(range(15)),
        },
    ]


def method_ladders(
    shared: dict[str, Any], methods: Tuned, cnn: dict[str, Any], vit: dict[str, Any]
) -> list[dict[str, Any]]:
    """ScaleKD's parts and the methods that it is compared with."""
    both = {"ScaleKD": methods.scalekd, "ScaleKD with KD": methods.with_kd}
    without_fitnet = [label for label in EVERY_STUDENT if label != "FitNet"]  # FitNet is FD (s4)
    return [
        shared
        | {
            "name": "ladder",
            "title": "The paper's ladder (Tables 1 and 9)",
            "methods": {"no teacher": NO_TEACHER}
            | methods.ladder
            | {"KD": methods.kd, "ScaleKD with KD": methods.with_kd, "own-data": OWN_DATA},
        },
        shared
        | {
            "name": "methods",
            "title": "ScaleKD and the methods it is compared with, three students (Table 7)",
            "methods": {"no teacher": NO_TEACHER}
            | {label: methods.compared[label] for label in EVERY_STUDENT}
            | both
            | {"own-data": OWN_DATA},
        },
        shared
        | {
            "name": "cnn-methods",
            "title": "ScaleKD and the methods made for CNNs (Table 13)",
            "students": cnn,
            "methods": {"no teacher": NO_TEACHER} | methods.compared | both,
        },
        shared
        | {
            "name": "vit",
            "title": "The ViT on 8,000 canvases: the ladder and the methods (Tables 1, 7 and 9)",
            "students": vit,
            "methods": {"no teacher": NO_TEACHER}
            | methods.ladder
            | {label: methods.compared[label] for label in without_fitnet}
            | {"ScaleKD with KD": methods.with_kd, "own-data": OWN_DATA},
        },
    ]


def setting_ladders(
    shared: dict[str, Any], methods: Tuned, cnn: dict[str, Any], pitfall: dict[str, Any]
) -> list[dict[str, Any]]:
    """ScaleKD's weight beta, the size of the teacher, and the amount of data."""
    betas = {
        f"beta {beta:g}": {"losses": methods.kd["losses"] | {"scalekd": methods.options | {"beta": beta}}}
        for beta in (0, 0.2, 0.4, 0.6, 0.8, 1)
    }
    sizes = {
        f"{method} {size}": {"teacher": teacher(size)} | losses
        for method, losses in (("KD", methods.kd), ("ScaleKD", methods.scalekd), ("ScaleKD with KD", methods.with_kd))
        for size in ("small", "middle", "large")
    }
    return [
        shared
        | {
            "name": "beta",
            "title": "The share of the original view, beta (Figure 4)",
            "students": cnn,
            "methods": {"no teacher": NO_TEACHER} | betas,
        },
        shared
        | {
            "name": "sizes",
            "title": "Teachers of 0.13, 0.29 and 0.71 M parameters (Table 2)",
            "students": cnn,
            "methods": {"no teacher": NO_TEACHER} | sizes,
        },
        shared
        | {
            "name": "pitfall",
            "title": "KD and its variants over the number of images and augmentation (vanillaKD's small-data pitfall)",
            "students": pitfall,
            "methods": {"no teacher": NO_TEACHER} | {label: methods.compared[label] for label in VARIANTS},
        },
    ]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(ladder: dict[str, Any], by: str = "ladders") -> None:
    name = ladder["name"]
    header = (
        f"# {ladder['title']}, in the laboratory.\n"
        f"# command:  scalekd compare lab/{name}.yaml --out docs/results/lab/{name} --share-teacher\n"
        f"# written by lab/{by}.py\n"
    )
    text = yaml.dump(json.loads(json.dumps(ladder)), Dumper=_Plain, sort_keys=False, width=120, default_flow_style=None)
    (HERE / f"{name}.yaml").write_text(header + text)


def teacher(size: str) -> dict[str, Any]:
    """Changes to the teacher of base.yaml. The pre-flight measures its top-1."""
    if size == "large":
        return {}
    return TEACHERS[size] | {"weights": f"runs/lab/teacher-{size}/student.safetensors", "top1": None}


def records(name: str) -> list[dict[str, Any]]:
    file = RESULTS / name / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def best_rates(name: str, by_label: dict[str, Any]) -> dict[str, float]:
    """Student -> its best learning rate; empty until all are tried."""
    tried = records(name)
    if len(tried) < len(by_label) * len(RATES):
        return {}
    by_student = {student: {r["method"]: r["top1"] for r in tried if r["student"] == student} for student in by_label}
    return {student: float(best(top1, "lr ")) for student, top1 in by_student.items()}


def main() -> None:
    write(rates("rates", "The students' learning rates, without a teacher", STUDENTS))
    write(rates("vit-rates", "The ViT's learning rates on 8,000 canvases, without a teacher", LONG))
    lrs, long = best_rates("rates", STUDENTS), best_rates("vit-rates", LONG)
    if not lrs or not long:
        return
    write(search(lrs))
    searched = {r["method"]: r["top1"] for r in records("search")}
    if not set(searched) >= set(search(lrs)["methods"]):
        return
    write(edges(searched, lrs))
    edge = {r["method"]: r["top1"] for r in records("edges")}
    for ladder in others(searched | edge, lrs, long):
        write(ladder)


if __name__ == "__main__":
    main()
