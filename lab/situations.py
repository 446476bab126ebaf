"""Saves the program output that three docs pages show: few-labels.md, only-images.md and fine-tuned-teacher.md.

    DINOV2=dinov2.safetensors python lab/situations.py runs/situations docs/results/situations

Makes a typical user's data from Fashion-MNIST, as PNG files of 28 pixels: `photos` with 50 labelled images of each class
and 300 for validation, and `more-photos` with 1,000 unlabelled images. The demo's teacher is saved as timm's `train.py`
saves a model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from importlib import resources
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.utils import CheckpointSaver, ModelEmaV3

from scalekd.cli import app as cli
from scalekd.data.sources.open import open_source
from scalekd.data.sources.source import Source

DINO = "vit_small_patch14_dinov2"
SMALL = "teacher.image_size=56 student.weights=random data.image_size=64 data.workers=0 train.batch_size=32"
SMALL += " train.epochs=1 schedule.warmup_epochs=0 --dry-run"
FEW = f"train own-data --data photos --unlabelled more-photos --teacher {DINO} --student resnet18 teacher.head=head"
FEW += f" teacher.weights=dino.safetensors {SMALL} data.unlabelled_share=0.875"
FEW += " 'losses={ce: {weight: 0.1}, kd: {weight: 0.9, temperature: 2}, scalekd: {}}'"
ONLY = f"train own-images --unlabelled more-photos --val photos/val --teacher {DINO} --student resnet18"
COMMANDS = {
    "head": f"head {DINO} --weights dino.safetensors --data photos --image-size 56 --out head",
    "few-labels": FEW,
    "few-labels-crop": f"{FEW} augment.crop_pct=1",
    "only-images": f"{ONLY} teacher.weights=dino.safetensors {SMALL}",
    "fine-tuned-teacher": "train demo teacher.weights=output/train/model_best.pth.tar --dry-run",
}
OF_THE_MACHINE = re.compile(r"^ ok +(memory|time) |about .* left$")  # these lines differ in every run


def photos(train: Source, val: Source) -> None:
    """Writes `photos` and `more-photos`, from the first images of both parts."""
    taken = dict.fromkeys(range(len(train.classes)), 0)
    others = 0
    for i in range(len(train)):
        image, target = train[i]
        if taken[target] < 50:
            taken[target] += 1
            save(image, Path("photos/train") / name(train, target) / f"{i}.png")
        elif others < 1000:
            others += 1
            save(image, Path("more-photos") / f"{i}.png")
    for i in range(300):
        image, target = val[i]
        save(image, Path("photos/val") / name(val, target) / f"{i}.png")


def name(source: Source, target: int) -> str:
    return source.classes[target].lower().replace("/", "-").replace(" ", "-")


def save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path)


def fine_tuned() -> None:
    """Writes the demo's teacher to `output/train`, as train.py's saver writes the best model and its average."""
    demo = resources.files("scalekd") / "demo"
    card = json.loads((demo / "teacher.json").read_text())
    model = timm.create_model(card["model"], **card["kwargs"])
    model.load_state_dict(load_file(str(demo / "teacher.safetensors")))
    Path("output/train").mkdir(parents=True)
    saved = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters()),
        args=argparse.Namespace(model=card["model"]),
        model_ema=ModelEmaV3(model),
        checkpoint_dir="output/train",
        recovery_dir="output/train",
    )
    saved.save_checkpoint(0, metric=card["top1"])


def main(work: Path, out: Path) -> None:
    fashion = os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
    train, val = (open_source(f"idx:{fashion}/{part}", "data") for part in ("train", "t10k"))
    weights, out = Path(os.environ["DINOV2"]).resolve(), out.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    os.environ["COLUMNS"] = "120"
    Path("dino.safetensors").symlink_to(weights)
    photos(train, val)
    fine_tuned()
    for screen, command in COMMANDS.items():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            code = cli.main(shlex.split(command))
        if code:
            raise SystemExit(f"scalekd {command}\nended with {code}:\n{shown.getvalue()}")
        lines = [line.rstrip() for line in shown.getvalue().splitlines() if not OF_THE_MACHINE.search(line)]
        (out / f"{screen}.txt").write_text("\n".join([f"$ scalekd {command}", *lines]) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
