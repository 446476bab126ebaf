"""Counts what cheaper forms of ScaleKD save, as `scalekd cost` does. Computes nothing, so the machine does not matter.

    python benchmarks/forms.py --out docs/results/performance

The floor is the teacher's forward pass, the student's forward and backward pass with the task loss, and the optimiser's
state. The extra of a form is what its step has in addition. Each pair is built and stepped once: one distiller holds
all forms, each with its own account, and the step of a form is the sum of its accounts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import about, table, write
from parts import OPTIONS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalekd import Distiller
from scalekd.config.recipe import Config, load_recipe
from scalekd.cost.attribution import Ledger, charge_step
from scalekd.cost.count import stand_ins
from scalekd.distill.build import make_optimizer, untrained
from scalekd.methods.scalekd_forms import scalekd

CLASSES = 1000
RECIPES = (
    "imagenet-swin-s-resnet50-traditional",
    "imagenet-swin-l-mobilenetv1-traditional",
    "imagenet-swin-s-mixer-s-advanced",
    "imagenet-swin-l-vit-small-traditional",
)
Step = dict[str, float]


class Apart(Ledger):
    """Charges each method as if it were the only one: tensors that two methods keep for the backward pass count for both."""

    def __init__(self, known: Sequence[Tensor], methods: Sequence[str]) -> None:
        super().__init__(known)
        self._left, self._of_models, self._others = set(methods), dict(self._held), list[dict]()

    def on(self, part: str, backward: bool = False) -> None:
        super().on(part, backward)
        if part in self._left:
            if not self._others:
                self._of_models = dict(self._held)
            self._others.append(self._held)  # alive: the address of a storage that is gone may be another's
            self._held = dict(self._of_models)
            self._left.remove(part)


def count(
    config: Config, forms: Mapping[str, Mapping[str, Any]], batches: Sequence[int] = (32,)
) -> dict[int, dict[str, Step]]:
    """Batch -> `floor`, `kd`, `fd` and the forms of ScaleKD -> `gmacs` per image and `memory_mb` per device.

    forms: name -> options in addition to those of the recipe's `scalekd`. Their steps include `kd`, as the recipes do.
    batches: the first is counted. For the others, the memory that autograd saves is scaled, as in `scalekd cost`; the
      learned queries, projected once per batch, make that wrong by less than a thousandth.
    Raises `UserError` as `scalekd cost` does.
    """
    task = {name: options for name, options in config.losses.items() if name in ("ce", "bce")}
    with torch.device("meta"):
        distiller = untrained(config, CLASSES, task | {"kd": {}, "fd": {}})
        shapes = [distiller.student_view.shapes, distiller.teacher_view.shapes]
        of_recipe = {name: value for name, value in config.losses["scalekd"].items() if name != "weight"}
        for form, options in forms.items():
            distiller.methods[form] = scalekd(*shapes, **(of_recipe | options))
            distiller.weights[form] = 1.0
    with FakeTensorMode(allow_non_fake_inputs=True):
        distiller._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        ledger = charged(distiller, config, batches[0])
        fixed = fixed_bytes(distiller, config)
    parts_of = {"floor": [], "kd": ["kd"], "fd": ["fd"]} | {form: ["kd", form] for form in forms}
    models = ["teacher", "student", *task]
    return {
        batch: {
            step: summed(ledger, fixed, batches[0], batch, {*models, *methods}) for step, methods in parts_of.items()
        }
        for batch in batches
    }


def charged(distiller: Distiller, config: Config, batch: int) -> Ledger:
    """The ledger of one step. Leaves gradients on the parameters, for the optimiser to create its state."""
    pixels, targets = stand_ins(distiller, config, CLASSES, batch)
    ledger = Apart(distiller.held(), list(distiller.methods))
    charge_step(distiller.train(), pixels, targets, ledger, half=False)
    return ledger


def fixed_bytes(distiller: Distiller, config: Config) -> dict[str, int]:
    """Part -> bytes of weights, gradients, optimiser state and averaged weights: what does not grow with the batch."""
    optimizer = make_optimizer(config, distiller)
    optimizer.step()

    def of(module: nn.Module) -> int:
        trained = [p for p in module.parameters() if p.requires_grad]
        state = [v for p in trained for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *trained, *state))

    average = sum(t.nbytes for t in distiller.student.state_dict().values()) if config.train.ema else 0
    fixed = {"teacher": of(distiller.teacher_view.model), "student": of(distiller.student) + average}
    return fixed | {name: of(method) for name, method in distiller.methods.items()}


def summed(ledger: Ledger, fixed: Mapping[str, int], counted: int, batch: int, parts: set[str]) -> Step:
    """The step with these parts and with what they run through the teacher. The ledger is of `counted` images."""
    macs = [sum(both) for name, both in ledger.macs.items() if name.partition(":")[0] in parts]
    saved = [count for name, count in ledger.saved.items() if name.partition(":")[0] in parts]
    memory = sum(saved) * batch / counted + sum(fixed[part] for part in parts)
    return {"gmacs": sum(macs) / counted / 1e9, "memory_mb": memory / 1e6}


def lines_of(recipe: str, steps: dict[str, Step]) -> list[str]:
    floor, fd = steps["floor"], steps["fd"]
    extra = steps["published form"]["gmacs"] - floor["gmacs"]
    rows = [
        [
            name,
            f"{step['gmacs']:.1f}",
            f"{step['gmacs'] / floor['gmacs']:.2f}",
            f"{(step['gmacs'] - floor['gmacs']) / extra:.0%}",
            f"{step['memory_mb']:.0f}",
            f"{step['memory_mb'] / fd['memory_mb']:.2f}",
        ]
        for name, step in steps.items()
    ]
    columns = ["step", "GMACs an image", "vs floor", "extra, of published", "memory MB", "memory vs fd"]
    return [recipe, "", *table(columns, rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images per step on one device (default: 32)")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    recipes = {
        recipe: count(load_recipe(recipe, ["train.precision=float32"]), OPTIONS, [args.batch])[args.batch]
        for recipe in RECIPES
    }
    lines = [line for recipe, steps in recipes.items() for line in lines_of(recipe, steps)]
    foot = "counted, not measured. What lives for a moment only is not in the memory."
    lines.append(f"Batch {args.batch}, float32, with the recipe's optimiser; {foot}")
    found: dict[str, Any] = about(torch.device("cpu")) | {"batch": args.batch, "recipes": recipes}
    write(args.out, "forms", found, lines)


if __name__ == "__main__":
    main()
