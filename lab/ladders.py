"""Writes the laboratory's ladder files: first the search's, then, with what the search found, the others.

    python lab/ladders.py      writes lab/rates.yaml and lab/vit-rates.yaml; once docs/results/lab/rates and vit-rates are
                               there, lab/search.yaml; once docs/results/lab/search is, lab/edges.yaml and the others

Every method has one number that is searched, and four tries for it: the factor on its loss weight, or for KD its
weight and temperature. A try is one run of the CNN with seed 100, validated on images that no student is trained on
and that are in no reported figure. The best of the four by top-1 is taken for all students and seeds. Where a method that
ScaleKD is compared with is best at an end of its four, it has two more tries beyond that end (lab/edges.yaml).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "lab"
Losses = dict[str, Any]

HEADS = [3, 3]
RATES = (1e-3, 3e-3, 9e-3, 2.7e-2)
OWN_RATE = 3e-3
FACTORS = (0.3, 1, 3, 10)
BEYOND = {FACTORS[0]: (0.03, 0.1), FACTORS[-1]: (30, 100)}
KD = {"half": (0.5, 0.5, 1), "T 1": (0.1, 0.9, 1), "T 2": (0.1, 0.9, 2), "T 4": (0.1, 0.9, 4)}
NO_TEACHER: dict[str, Any] = {"teacher": None, "losses": {"ce": {}}}

PUBLISHED = {"shared": False, "expansion": 4}
LADDER: dict[str, Losses] = {  # ScaleKD paper, Tables 1 and 9: label -> the method's term at factor 1
    "FD (s4)": {"fd": {"stages": [4], "projector": "linear"}},
    "FD (s3+s4)": {"fd": {"stages": [3, 4], "projector": "linear"}},
    "Conv": {"fd": {"stages": [4], "projector": "conv"}},
    "CAP": {"cap": {"heads": 3}},
    "Dual-Path CAP": {"dfm": {"heads": 3, "views": "dual_path"}},
    "DFM": {"dfm": {"heads": 3}},
    "DFM (Dir + Alt)": {"dfm": {"heads": 3, "views": "dir_alt"}},
    "TPP own queries": {"tpp": {"heads": HEADS, "adaptive_queries": False}},
    "TPP": {"tpp": {"heads": HEADS}},
    "DFM + TPP": {"scalekd": {"heads": HEADS} | PUBLISHED},
}
OTHERS: dict[str, Losses] = {  # Tables 7 and 13, and vanillaKD's variants
    "BKD": {"bkd": {}},
    "DKD": {"dkd": {}},
    "DIST": {"dist": {}},
    "AT": {"at": {}},
    "OFD": {"ofd": {}},
    "RKD": {"rkd": {}},
    "CRD": {"crd": {"negatives": 2048}},
    "CC": {"cc": {}},
    "SRRL": {"srrl": {}},
    "ReviewKD": {"reviewkd": {"width": 96}},
    "MGD": {"mgd": {}},
    "DiffKD": {"diffkd": {}},
    "OFA": {"ofa": {}},
}

EVERY_STUDENT = ("KD", "FitNet", "DKD", "DIST", "AT", "RKD", "DiffKD", "OFA")  # Table 7's, and what is best known
VARIANTS = ("KD", "DKD", "DIST")  # what vanillaKD compares over the amount of data

FORMS: dict[str, Losses] = {  # cheaper projectors: docs/explanation/performance.md
    "shared": {"shared": True},
    "shared, narrow": {"shared": True, "expansion": 1},
    "separable, shared": {"tokens": "separable", "shared": True},
    "reduced, shared": {"tokens": "reduced", "shared": True},
    "reduced, shared, narrow": {"tokens": "reduced", "shared": True, "expansion": 1},
}
NARROW = "shared, narrow"  # level with the published form in `forms`: more seeds decide

STUDENTS: dict[str, Any] = {
    "CNN": {},
    "MLP": {
        "student": {
            "model": "mlp_mixer",
            "kwargs": {"patch_size": 8, "embed_dim": 64, "num_blocks": 4},
            "mean": [0.25],
            "std": [0.33],
        }
    },
    "ViT": {
        "student": {
            "model": "vit_tiny_patch16_224",
            "kwargs": {
                "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "class_token": False, "global_pool": "avg"
            },
            "mean": [0.25],
            "std": [0.33],
        }
    },
}  # fmt: skip
LONG = {"ViT": STUDENTS["ViT"] | {"data": {"limit": 8000}}}  # four times as many samples: with fewer it hardly learns


def weighted(losses: Losses, factor: float) -> Losses:
    """A method's term at a factor, beside cross entropy."""
    return {"losses": {"ce": {}} | {name: {"weight": factor} | options for name, options in losses.items()}}


def kd(setting: str) -> Losses:
    task, weight, temperature = KD[setting]
    return {"losses": {"ce": {"weight": task}, "kd": {"weight": weight, "temperature": temperature}}}


def rates(name: str, title: str, of: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "recipe": "base.yaml",
        "set": {"data": {"val": "idx:runs/lab/data/search"}},
        "students": of,
        "methods": {f"lr {lr:g}": NO_TEACHER | {"optim": {"lr": lr}} for lr in RATES},
        "baseline": f"lr {RATES[1]:g}",
        "seeds": [100],
    }


def students(of: dict[str, Any], lrs: dict[str, float]) -> dict[str, Any]:
    return {label: sections | {"optim": optim(lrs[label])} for label, sections in of.items()}


def optim(lr: float) -> dict[str, float]:
    """The methods' own parameters have one rate, whatever the student's."""
    return {"lr": lr, "projector_lr": round(OWN_RATE / lr, 2)}


def search(lrs: dict[str, float]) -> dict[str, Any]:
    methods = {"no teacher": NO_TEACHER} | {f"KD {setting}": kd(setting) for setting in KD}
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


def edges(found: dict[str, float], lrs: dict[str, float]) -> dict[str, Any]:
    """The search goes on beyond its ends, for the methods that were best there."""
    of_four = {label: float(best(found, f"{label} x")) for label in OTHERS}
    tries = {
        f"{label} x{factor:g}": weighted(OTHERS[label], factor)
        for label, end in of_four.items()
        for factor in BEYOND.get(end, ())
    }
    return search(lrs) | {
        "name": "edges",
        "title": "The search beyond its ends",
        "methods": {"no teacher": NO_TEACHER} | tries,
    }


def best(found: dict[str, float], prefix: str) -> str:
    """What follows `prefix` in the label of the best try."""
    return max((label for label in found if label.startswith(prefix)), key=lambda label: found[label])[len(prefix) :]


PITFALL = {  # label -> what is seen, 24,000 samples in all of them
    f"{images} {strength}": {
        "data": {"limit": images},
        "train": {"epochs": 24000 // images},
        "augment": augment,
    }
    for images in (500, 2000, 8000)
    for strength, augment in (
        ("weak", {}),
        ("strong", {"crop": "random_resized", "scale": [0.6, 1.0], "pad": 4, "erase": 0.25, "mixup": 0.2}),
    )
}
TEACHERS = {  # beside base.yaml's, the large one; each is cut so that its last stage is its last block
    "small": {"kwargs": {"patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 3}, "cuts": [0, 1, 2, 3]},
    "middle": {"kwargs": {"patch_size": 2, "embed_dim": 66, "depth": 5, "num_heads": 3}, "cuts": [0, 2, 3, 4]},
}


def others(found: dict[str, float], lrs: dict[str, float], long: dict[str, float]) -> list[dict[str, Any]]:
    best_kd = kd(best(found, "KD "))
    factors = {label: float(best(found, f"{label} x")) for label in LADDER | OTHERS}
    ladder = {label: weighted(losses, factors[label]) for label, losses in LADDER.items()}
    scalekd = ladder["DFM + TPP"]["losses"]["scalekd"]
    with_kd = {"losses": best_kd["losses"] | {"scalekd": scalekd}}
    by_label = students(STUDENTS, lrs)
    cnn = {"CNN": by_label["CNN"]}
    shared = {"recipe": "base.yaml", "students": by_label, "baseline": "no teacher", "seeds": [0, 1, 2, 3, 4]}
    compared = {label: weighted(losses, factors[label]) for label, losses in OTHERS.items()}
    compared = {"KD": best_kd, "FitNet": ladder["FD (s4)"]} | compared
    both = {"ScaleKD": ladder["DFM + TPP"], "ScaleKD with KD": with_kd}

    def form(options: dict[str, Any]) -> dict[str, Any]:
        return {"losses": ladder["DFM + TPP"]["losses"] | {"scalekd": scalekd | options}}

    betas = {
        f"beta {beta:g}": {"losses": best_kd["losses"] | {"scalekd": scalekd | {"beta": beta}}}
        for beta in (0, 0.2, 0.4, 0.6, 0.8, 1)
    }
    return [
        shared
        | {
            "name": "ladder",
            "title": "The paper's ladder (Tables 1 and 9)",
            "methods": {"no teacher": NO_TEACHER} | ladder | {"KD": best_kd, "ScaleKD with KD": with_kd},
        },
        shared
        | {
            "name": "forms",
            "title": "Cheaper forms of ScaleKD's projectors beside the published one",
            "methods": {"published": form({})} | {label: form(options) for label, options in FORMS.items()},
            "baseline": "published",
        },
        shared
        | {
            "name": "grouped",
            "title": "A 3x3 convolution in groups of channels, beside the published form",
            "methods": {"published": form({}), f"grouped, {NARROW}": form(FORMS[NARROW] | {"tokens": "grouped"})},
            "baseline": "published",
        },
        shared
        | {
            "name": "narrow",
            "title": "The cheaper form that was level with the published one, beside it, on 15 seeds",
            "students": cnn | {"MLP": by_label["MLP"]},
            "methods": {"published": form({}), NARROW: form(FORMS[NARROW])},
            "baseline": "published",
            "seeds": list(range(15)),
        },
        shared
        | {
            "name": "precision",
            "title": "bf16 autocast beside float32, on 15 seeds",
            "students": cnn | {"MLP": by_label["MLP"]},
            "methods": {
                "float32": form(FORMS[NARROW]),
                "bf16": form(FORMS[NARROW]) | {"train": {"precision": "bf16"}},
            },
            "baseline": "float32",
            "seeds": list(range(15)),
        },
        shared
        | {
            "name": "methods",
            "title": "ScaleKD and the methods it is compared with, three students (Table 7)",
            "methods": {"no teacher": NO_TEACHER} | {label: compared[label] for label in EVERY_STUDENT} | both,
        },
        shared
        | {
            "name": "cnn-methods",
            "title": "ScaleKD and the methods made for CNNs (Table 13)",
            "students": cnn,
            "methods": {"no teacher": NO_TEACHER} | compared | both,
        },
        shared
        | {
            "name": "vit",
            "title": "The ViT on 8,000 canvases: the ladder and the methods (Tables 1, 7 and 9)",
            "students": students(LONG, long),
            "methods": {"no teacher": NO_TEACHER}
            | ladder
            | {label: compared[label] for label in EVERY_STUDENT if label != "FitNet"}  # FD (s4)
            | {"ScaleKD with KD": with_kd},
        },
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
            "methods": {"no teacher": NO_TEACHER}
            | {
                f"{method} {size}": {"teacher": teacher(size)} | losses
                for method, losses in (("KD", best_kd), ("ScaleKD", ladder["DFM + TPP"]), ("ScaleKD with KD", with_kd))
                for size in ("small", "middle", "large")
            },
        },
        shared
        | {
            "name": "pitfall",
            "title": "KD and its variants over the number of images and augmentation (vanillaKD's small-data pitfall)",
            "students": {label: sections | {"optim": optim(lrs["CNN"])} for label, sections in PITFALL.items()},
            "methods": {"no teacher": NO_TEACHER} | {label: compared[label] for label in VARIANTS},
        },
    ]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(ladder: dict[str, Any]) -> None:
    name = ladder["name"]
    header = (
        f"# {ladder['title']}, in the laboratory.\n"
        f"# command:  scalekd compare lab/{name}.yaml --out docs/results/lab/{name} --share-teacher\n"
        "# written by lab/ladders.py\n"
    )
    text = yaml.dump(json.loads(json.dumps(ladder)), Dumper=_Plain, sort_keys=False, width=120, default_flow_style=None)
    (HERE / f"{name}.yaml").write_text(header + text)


def teacher(size: str) -> dict[str, Any]:
    """What differs from the teacher of base.yaml; its accuracy is left to the pre-flight."""
    if size == "large":
        return {}
    return TEACHERS[size] | {"weights": f"runs/lab/teacher-{size}/student.safetensors", "top1": None}


def records(name: str) -> list[dict[str, Any]]:
    file = RESULTS / name / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def best_rates(name: str, of: dict[str, Any]) -> dict[str, float]:
    """Student -> its best rate; empty until all are tried."""
    tried = records(name)
    if len(tried) < len(of) * len(RATES):
        return {}
    by_student = {student: {r["method"]: r["top1"] for r in tried if r["student"] == student} for student in of}
    return {student: float(best(top1, "lr ")) for student, top1 in by_student.items()}


def main() -> None:
    write(rates("rates", "The students' learning rates, without a teacher", STUDENTS))
    write(rates("vit-rates", "The ViT's learning rates on 8,000 canvases, without a teacher", LONG))
    lrs, long = best_rates("rates", STUDENTS), best_rates("vit-rates", LONG)
    if not lrs or not long:
        return
    write(search(lrs))
    found = {r["method"]: r["top1"] for r in records("search")}
    if not set(found) >= set(search(lrs)["methods"]):
        return
    write(edges(found, lrs))
    beyond = {r["method"]: r["top1"] for r in records("edges")}
    for ladder in others(found | beyond, lrs, long):
        write(ladder)


if __name__ == "__main__":
    main()
