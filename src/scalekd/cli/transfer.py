"""`scalekd detect` and `scalekd segment`: train, evaluate, predict, recipes. Slow imports are inside functions."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalekd.common import stop
from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.transfer.tasks import TASKS, need_extra

from .options import keeps_result

DEVICE = "cpu, cuda, cuda:1 (default: a GPU if there is one)"
# options of train and the recipe keys that they set
SHORTCUTS = {
    "annotations": "data.annotations",
    "images": "data.images",
    "val_annotations": "data.val_annotations",
    "val_images": "data.val_images",
    "data": "data.root",
    "backbone": "backbone.model",
    "weights": "backbone.weights",
    "teacher": "teacher.model",
}


def add_commands(commands: Any) -> None:
    """Adds both commands to the sub-commands of `scalekd`."""
    _add_detect(commands)
    _add_segment(commands)


def _add_detect(commands: Any) -> None:
    parser = commands.add_parser(
        "detect",
        help="Mask R-CNN or RetinaNet on a backbone: train, evaluate, predict, export (`scalekd docs transfer`)",
    )
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = _train_command(group, "detection", "Train a detector. The same command resumes a stopped run.")
    sub.add_argument("--annotations", metavar="FILE", help="COCO's format, such as instances_train2017.json")
    sub.add_argument("--images", metavar="DIR", help="the folder that the file's image names are relative to")
    sub.add_argument("--val-annotations", metavar="FILE", help="as --annotations, for validation")
    sub.add_argument("--val-images", metavar="DIR", help="as --images, for validation")
    sub = _evaluate_command(group, "detection", _evaluate_detector, "Print box and mask AP of a trained detector.")
    sub.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="COCO's format")
    sub.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder of its images")
    sub = _predict_command(group, "detection", _predict_objects, "Draw the objects that a trained detector finds.")
    sub.add_argument(
        "--threshold", type=float, default=0.5, metavar="X", help="omit objects that score below (default: 0.5)"
    )
    sub = _command(
        group, "export", _export, "detection", "Write a trained RetinaNet as an ONNX file that returns boxes."
    )
    sub.add_argument("trained", type=Path, metavar="RUN", help="a run's folder, or its .safetensors file")
    sub.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images that the file takes, in pixels (default: a square of the short side in validation)",
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="the file (default: detector.onnx next to the weights)")
    _recipes_command(group, "detection")


def _add_segment(commands: Any) -> None:
    parser = commands.add_parser(
        "segment", help="UPerNet on a backbone: train, evaluate, predict (`scalekd docs transfer`)"
    )
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = _train_command(group, "segmentation", "Train a segmenter. The same command resumes a stopped run.")
    sub.add_argument("--data", metavar="DIR", help="images and masks, as in ADE20K (`scalekd docs transfer`)")
    sub = _evaluate_command(
        group, "segmentation", _evaluate_segmenter, "Print mIoU and accuracies of a trained segmenter."
    )
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="images and masks")
    sub.add_argument("--classes", type=Path, metavar="FILE", help="class names (default: DIR/classes.txt)")
    _add_inference(sub)
    sub = _predict_command(
        group, "segmentation", _predict_classes, "Draw the classes that a trained segmenter predicts, and write masks."
    )
    _add_inference(sub)
    _recipes_command(group, "segmentation")


def _command(group: Any, name: str, function: Callable[..., None], task: str, text: str) -> argparse.ArgumentParser:
    sub = group.add_parser(name, help=text, description=text)
    sub.set_defaults(run=function, task=task)
    return sub


def _train_command(group: Any, task: str, text: str) -> argparse.ArgumentParser:
    sub = _command(group, "train", _train, task, text)
    keeps_result(sub)
    sub.add_argument("recipe", help=f"a shipped recipe's name (`{TASKS[task].command} recipes`) or a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-4 train.batch_size=8")
    sub.add_argument("--backbone", metavar="MODEL", help="a timm name, or the folder of a distilled student")
    sub.add_argument("--weights", metavar="FILE", help="weights of the backbone: a file, `pretrained` or `random`")
    sub.add_argument(
        "--teacher", metavar="MODEL", help="a frozen ViT beside the backbone: a timm name, or a run's folder"
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument("--dry-run", action="store_true", help="stop after the pre-flight and write nothing")
    return sub


def _evaluate_command(
    group: Any, task: str, function: Callable[..., dict[str, Any]], text: str
) -> argparse.ArgumentParser:
    sub = _command(group, "evaluate", _evaluate, task, text)
    sub.set_defaults(evaluate=function)
    sub.add_argument("trained", type=Path, metavar="RUN", help="a run's folder, or its .safetensors file")
    sub.add_argument("--workers", type=int, default=4, metavar="N", help="processes that read images (default: 4)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="also write evaluation.json and evaluation.md there")
    sub.add_argument("--device", help=DEVICE)
    sub.add_argument("--json", action="store_true", help="print the results as JSON")
    return sub


def _predict_command(group: Any, task: str, function: Callable[..., None], text: str) -> argparse.ArgumentParser:
    sub = _command(group, "predict", function, task, text)
    sub.add_argument("trained", type=Path, metavar="RUN", help="a run's folder, or its .safetensors file")
    sub.add_argument("source", type=Path, metavar="IMAGES", help="one image, or a folder that is searched recursively")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    sub.add_argument("--device", help=DEVICE)
    return sub


def _recipes_command(group: Any, task: str) -> None:
    sub = _command(group, "recipes", _recipes, task, "List the shipped recipes.")
    sub.add_argument("--json", action="store_true", help="print the list as JSON")


def _add_inference(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--inference",
        choices=["whole", "sliding"],
        help="whole images or sliding windows (default: as in the run's validation)",
    )


# ---------------------------------------------------------------- actions


def _train(args: argparse.Namespace) -> None:
    need_extra(args.task)
    from rich.console import Console

    from scalekd.common.parallel import processes
    from scalekd.runs.transfer import train
    from scalekd.transfer.config import load

    config = load(args.task, args.recipe, [*shortcuts(args), *args.overrides])
    folder = args.out or Path("runs") / config.name
    with processes(args.device) as device:
        summary = train(config, folder, device, Console(emoji=False), stop=stop.current(), dry_run=args.dry_run)
    if summary and int(os.environ.get("RANK", "0")) == 0:
        logged = {name: summary[key] for key, name in TASKS[args.task].figures.items() if key in summary}
        figures = "  ".join(f"{name} {value:.2f} %" for name, value in logged.items())
        report = folder / "report.html"
        print(printable(f"{figures}  model {summary['model']}" + (f"  report {report}" if report.is_file() else "")))


def shortcuts(args: argparse.Namespace) -> list[str]:
    """The overrides that --annotations, --data, --backbone, --teacher and so on set."""
    given = {key: getattr(args, option, None) for option, key in SHORTCUTS.items()}
    if args.backbone and not args.weights:
        given["backbone.weights"] = "pretrained"  # timm's or the folder's; the recipe's belong to another model
    if args.teacher:
        given["teacher.weights"] = "pretrained"
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def _evaluate(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.files import make_folder, write_text
    from scalekd.common.out_of_memory import explain_out_of_memory
    from scalekd.common.parallel import pick_device
    from scalekd.transfer.evaluate import detector_table, segmenter_table

    need_extra(args.task)
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more, not {args.workers}")
    if args.out:
        make_folder(args.out)
    device = pick_device(args.device)
    with explain_out_of_memory(device, "Try --device cpu."):
        result = args.evaluate(args, device, Console(emoji=False, stderr=True))
    table = (detector_table if args.task == "detection" else segmenter_table)(result)
    if args.out:
        write_text(args.out / "evaluation.json", json.dumps(result, indent=2) + "\n")
        write_text(args.out / "evaluation.md", table)
    print(json.dumps(result) if args.json else table, end="\n" if args.json else "")


def _evaluate_detector(args: argparse.Namespace, device: Any, console: Any) -> dict[str, Any]:
    from scalekd.transfer.evaluate import evaluate_detector

    return evaluate_detector(args.trained, args.annotations, args.images, device, console, args.workers)


def _evaluate_segmenter(args: argparse.Namespace, device: Any, console: Any) -> dict[str, Any]:
    from scalekd.transfer.evaluate import evaluate_segmenter

    return evaluate_segmenter(args.trained, args.data, device, console, args.inference, args.classes, args.workers)


def _predict_objects(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.out_of_memory import explain_out_of_memory
    from scalekd.common.parallel import pick_device
    from scalekd.transfer.predict import predict_objects

    need_extra("detection")
    device = pick_device(args.device)
    with explain_out_of_memory(
        device, "Try --device cpu, smaller images, or a higher --threshold: masks take most of the memory."
    ):
        predict_objects(args.trained, args.source, args.out, device, Console(emoji=False), args.threshold)


def _predict_classes(args: argparse.Namespace) -> None:
    from rich.console import Console

    from scalekd.common.out_of_memory import explain_out_of_memory
    from scalekd.common.parallel import pick_device
    from scalekd.transfer.predict import predict_classes

    need_extra("segmentation")
    device = pick_device(args.device)
    with explain_out_of_memory(device, "Try --device cpu, or smaller images."):
        predict_classes(args.trained, args.source, args.out, device, Console(emoji=False), args.inference)


def _export(args: argparse.Namespace) -> None:
    from scalekd.common.files import make_folder
    from scalekd.transfer.detection.onnx_file import write_onnx
    from scalekd.transfer.exported_model import load

    need_extra("detection")
    detector, card = load(args.trained, "detection")
    size = tuple(args.image_size or (card["short"], card["short"]))
    if not all(0 < side < 2**16 for side in size):
        raise UserError(f"--image-size must be two numbers of pixels from 1 to 65535, not {size[0]} {size[1]}")
    folder = args.trained if args.trained.is_dir() else args.trained.parent
    file = args.out or folder / "detector.onnx"
    if file.suffix != ".onnx":
        raise UserError(f"--out must be a file that ends in .onnx, not {file}")
    make_folder(file.parent)
    written = write_onnx(detector, card, size, file)
    ties = written.compared - written.equal
    text = (
        f"{file}: uint8 images (1, {len(card['mean'])}, {size[0]}, {size[1]}); {written.equal} of {written.compared} objects in "
        f"random images equal those of {args.trained}{f', {ties} have rivals with equal scores' * bool(ties)}; "
        f"{written.milliseconds:.0f} ms per image on this CPU"
    )
    print(printable(text))


def _recipes(args: argparse.Namespace) -> None:
    from scalekd.config.recipe_files import header, recipe_names, recipe_text
    from scalekd.transfer.config import SHELVES

    shelf = SHELVES[args.task]
    entries = [{"name": name} | header(recipe_text(name, shelf)) for name in recipe_names(shelf)]
    if args.json:
        print(json.dumps(entries, indent=2))
        return
    width = max((len(entry["name"]) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry['name']:{width}}  {entry['summary']}")
