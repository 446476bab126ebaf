"""Writes the ladders of the second laboratory: the same students and methods for 300, 1,500 and 6,000 steps.

    python lab/colour/budgets.py

writes a file for each entry of LADDERS. To compare another method, add it to METHODS and to ALL. The longer ladders have
fewer methods: all of them together take about four hours of two idle cores (an estimate).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
STEPS_PER_EPOCH = 300  # 9,600 images in batches of 32
WARMUP = 0.05  # part of the steps in which the learning rate rises, as in the recipe own-data
OWN_RATE = 3e-3  # of the methods' own parameters, for every student, as in the first laboratory
# of the pre-trained student; the others have them too, or they would not share the teacher's outputs with it
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

STUDENTS: dict[str, dict[str, Any]] = {  # without optim.projector_lr, which follows from OWN_RATE
    "CNN": {
        "student": {
            "model": "resnet10t",
            "kwargs": {"channels": [24, 48, 96, 128], "stem_width": 16, "output_stride": 16},
        }
        | PIXELS,
        "optim": {"lr": 3e-3},
    },
    "ViT": {
        "student": {
            "model": "vit_tiny_patch16_224",
            "kwargs": {
                "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "class_token": False, "global_pool": "avg"
            },
        }
        | PIXELS,
        "optim": {"lr": 1e-3},
    },
    "pre-trained CNN": {
        "student": {
            "model": "efficientnet_lite0",
            "weights": "runs/colour/efficientnet_lite0.safetensors",
        }
        | PIXELS,
        "optim": {"lr": 1e-3},
    },
}  # fmt: skip

METHODS: dict[str, dict[str, Any]] = {  # with the weights of their papers, as in the shipped ladder own-methods
    "no teacher": {"teacher": None, "losses": {"ce": {"smoothing": 0.1}}},
    "KD": {"losses": {"ce": {"smoothing": 0.1, "weight": 0.5}, "kd": {"weight": 0.5}}},
    "DIST": {"losses": {"ce": {"smoothing": 0.1}, "dist": {"weight": 2}}},
    "FD": {"losses": {"ce": {"smoothing": 0.1}, "fd": {}}},
    "CAP": {"losses": {"ce": {"smoothing": 0.1}, "cap": {}}},
    "ScaleKD with KD": {"losses": {"ce": {"smoothing": 0.1, "weight": 0.5}, "kd": {"weight": 0.5}, "scalekd": {}}},
    "own-data": {  # the losses of the recipe own-data
        "losses": {"ce": {"smoothing": 0.1}, "dist": {"weight": 2}, "fd": {"weight": 0.5}},
        "balance": {},
    },
}
ALL = tuple(METHODS)
# methods since ScaleKD and for foundation models, with the weights of their papers
NEWER: dict[str, dict[str, Any]] = {
    "no teacher": METHODS["no teacher"],
    "own-data": METHODS["own-data"],
    "KD standardised": {
        "losses": {
            "ce": {"smoothing": 0.1, "weight": 0.5},
            "kd": {"weight": 0.5, "temperature": 2, "standardize": True},
        }
    },
    "WTTM": {"losses": {"ce": {"smoothing": 0.1}, "kd": {"temperature": 2, "variant": "wttm"}}},
    **{
        label: {"losses": {"ce": {"smoothing": 0.1}, name: {}}}
        for label, name in {"WKD-L": "wkd_l", "WKD-F": "wkd_f", "VkD": "vkd", "RSD": "rsd", "FM": "fm"}.items()
    },
    "own-data with FM": {
        "losses": {"ce": {"smoothing": 0.1}, "dist": {"weight": 2}, "fm": {"weight": 0.5}},
        "balance": {},
    },
}
PAPER = METHODS["ScaleKD with KD"] | {"balance": {"adjust": False, "every": 10}}  # also logs who pulls at the student
BALANCED = METHODS["ScaleKD with KD"] | {"balance": {"every": 10}}
TRIALS: dict[str, dict[str, Any]] = {  # one change each: what makes ScaleKD's short run worse than no teacher
    "no teacher": METHODS["no teacher"],
    "paper": PAPER,
    "no clipping": PAPER | {"train": {"clip_grad": None}},
    "clipping at 1": PAPER | {"train": {"clip_grad": 1.0}},
    "projector rate x0.3": PAPER | {"optim": {"projector_lr": 0.3}},
    "projector rate x3": PAPER | {"optim": {"projector_lr": 3.0}},
    "a tenth of the weight": PAPER | {"losses": PAPER["losses"] | {"scalekd": {"weight": 0.1}}},
    "balanced 0.5": BALANCED | {"losses": PAPER["losses"] | {"scalekd": {"weight": 0.5}}},
    "with skip": PAPER | {"losses": PAPER["losses"] | {"scalekd": {"skip": True}}},
}


class Budget(NamedTuple):
    steps: int
    students: tuple[str, ...]
    methods: tuple[str, ...]
    of: dict[str, dict[str, Any]] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)


LADDERS = {
    "steps-300": Budget(300, ("CNN", "ViT"), ALL),
    "newer-300": Budget(300, ("CNN", "ViT"), tuple(NEWER), NEWER),
    "pre-trained-300": Budget(300, ("pre-trained CNN",), ALL),
    "steps-1500": Budget(1500, ("CNN", "ViT"), ("no teacher", "KD", "DIST", "FD", "ScaleKD with KD", "own-data")),
    "pre-trained-1500": Budget(1500, ("pre-trained CNN",), ("no teacher", "KD", "DIST", "own-data")),
    "steps-6000": Budget(6000, ("CNN", "ViT"), ("no teacher", "DIST", "own-data")),
    "trials-300": Budget(300, ("CNN",), tuple(TRIALS), TRIALS, (0,)),
    "trials-1500": Budget(1500, ("CNN",), ("no teacher", "paper", "balanced 0.5"), TRIALS, (0,)),
}


def ladder(name: str) -> dict[str, Any]:
    budget = LADDERS[name]
    epochs = budget.steps // STEPS_PER_EPOCH
    return {
        "name": name,
        "title": f"{budget.steps:,} steps on colour images, a DINOv2 teacher, other artists in the test",
        "recipe": "base.yaml",
        # one validation, at the end: it chooses nothing
        "set": {"train": {"epochs": epochs, "eval_every": epochs}, "schedule": {"warmup_epochs": WARMUP * epochs}},
        "students": {label: with_own_rate(STUDENTS[label]) for label in budget.students},
        "methods": {label: budget.of[label] for label in budget.methods},
        "baseline": "no teacher",
        "seeds": [*budget.seeds],
    }


def with_own_rate(student: dict[str, Any]) -> dict[str, Any]:
    lr = student["optim"]["lr"]
    return student | {"optim": {"lr": lr, "projector_lr": round(OWN_RATE / lr, 2)}}


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(name: str) -> str:
    """The ladder file."""
    made = ladder(name)
    header = (
        f"# {made['title']}.\n"
        f"# command:  scalekd compare lab/colour/{name}.yaml --out docs/results/lab-colour/{name} --share-teacher\n"
        "# written by lab/colour/budgets.py\n"
    )
    return header + yaml.dump(made, Dumper=_Plain, sort_keys=False, width=120, default_flow_style=None)


if __name__ == "__main__":
    for name in LADDERS:
        (HERE / f"{name}.yaml").write_text(text(name))
