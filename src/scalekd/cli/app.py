"""The command line: one sub-command is one function call; what is slow to import is imported inside."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped
from scalekd.common.text import printable
from scalekd.common.version import __version__

from .analyze import add_commands as add_analyze_commands
from .compare import _compare
from .cost import _cost, _pairs, _plan
from .heads import _head, _probe
from .lists import _doctor, _methods, _recipes, _teachers
from .options import _labels
from .train import _demo, _evaluate, _export, _import, _report, _train
from .transfer import add_commands as add_transfer_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed check, 2 for a mistake of the user's, 75 for a run that a
    scheduler stopped and may start again, 130 for Ctrl-C."""
    args = parse(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print("\n".join(printable(line) for line in f"scalekd: {error}".split("\n")), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"scalekd: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nscalekd: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `scalekd recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line; overrides may stand before, between and after the options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # argparse leaves over what follows an option
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; `scalekd COMMAND --help` lists those there are")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scalekd", description="Distil vision transformers into small models.")
    parser.add_argument("--version", action="version", version=f"scalekd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=function)
        return sub

    sub = command("train", _train, "train a student from a recipe; started again, it goes on where it stopped")
    sub.add_argument("recipe", help="a shipped recipe's name (`scalekd recipes`) or a YAML file")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-3 losses.kd.temperature=2 losses.kd=off"
    )
    sub.add_argument(
        "--data", metavar="SOURCE", help="a folder with train/ and val/ or one folder per class, tar:, wds:, hf:, ..."
    )
    sub.add_argument("--val", metavar="SOURCE", help="validation images (default: those of --data, or a part held out)")
    sub.add_argument("--unlabelled", metavar="SOURCE", help="more training images, without labels; or `rest`")
    sub.add_argument("--on-bad-image", choices=["error", "skip"], help="an image that cannot be read (default: error)")
    sub.add_argument(
        "--teacher", metavar="MODEL", help="a timm name, pre-trained unless teacher.weights says otherwise; or a folder"
    )
    sub.add_argument("--teacher-random", action="store_true", help="the teacher at its initial values, on purpose")
    sub.add_argument("--student", metavar="MODEL", help="a timm name, or the folder of a run")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    sub.add_argument(
        "--teacher-outputs",
        type=Path,
        metavar="DIR",
        help="read what the teacher gave in another run, or keep it there",
    )
    sub.add_argument("--dry-run", action="store_true", help="build everything, run the pre-flight, write nothing")
    sub.add_argument("--no-preflight", action="store_true", help="start at once")

    sub = command(
        "head", _head, "a classifier for your classes on a frozen teacher that has none (docs/any-teacher.md)"
    )
    sub.add_argument("model", metavar="MODEL", help="the teacher's timm name, or its folder (docs/any-teacher.md)")
    sub.add_argument("--data", required=True, metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="where head.safetensors and head.json go")
    sub.add_argument("--weights", default="pretrained", metavar="FILE", help="as teacher.weights (default: timm's own)")
    sub.add_argument("--prefix", metavar="TEXT", help="as teacher.prefix: what stands before the names in that file")
    sub.add_argument("--kwargs", metavar="YAML", help="teacher.kwargs of a recipe: '{global_pool: avg}'")
    sub.add_argument("--image-size", metavar="N", help="pixels, such as 98 or '[98, 126]' (default: timm's own)")
    sub.add_argument("--channels", type=int, choices=[1, 3], help="as data.channels (default: 3)")
    sub.add_argument("--mean", metavar="YAML", help="of the input, such as '[0.5, 0.5, 0.5]' (default: timm's own)")
    sub.add_argument("--std", metavar="YAML", help="as --mean")
    sub.add_argument("--crop-pct", type=float, metavar="X", help="as augment.crop_pct (default: timm's own)")
    sub.add_argument("--limit", type=int, metavar="N", help="use only N labels, the same number per class")
    sub.add_argument("--seed", type=int, help="as data.seed: chooses the labels and what is held out (default: 0)")
    sub.add_argument("--draws", type=int, default=1, metavar="K", help="K sets of labels; the first one's head is kept")
    sub.add_argument("--val-limit", type=int, metavar="N", help="use only N validation images")
    sub.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept (default: runs/features)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")

    sub = command("compare", _compare, "methods x students x seeds on your data; started again, it goes on")
    sub.add_argument("ladder", help="a shipped ladder's name or a YAML file (docs/compare.md)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, such as train.epochs=20")
    sub.add_argument("--methods", type=_labels, default=[], metavar="A,B", help="only these, beside the baseline")
    sub.add_argument("--students", type=_labels, default=[], metavar="A,B", help="only these")
    sub.add_argument("--seeds", type=int, help="how many (default: the ladder's)")
    sub.add_argument("--data", metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    sub.add_argument("--on-bad-image", choices=["error", "skip"], help="as for train")
    sub.add_argument("--teacher", metavar="MODEL", help="as for train")
    sub.add_argument("--student", metavar="MODEL", help="as for train; for a ladder without students of its own")
    sub.add_argument("--out", type=Path, metavar="DIR", help="the comparison's folder (default: runs/compare-NAME)")
    sub.add_argument(
        "--known",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another comparison; its equal runs count",
    )
    sub.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, or per CPU core)")
    sub.add_argument(
        "--share-teacher", action="store_true", help="one teacher pass for all runs of a seed, kept on disk meanwhile"
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: all GPUs if there are any)")
    sub.add_argument("--dry-run", action="store_true", help="check every run's recipe, list them, write nothing")

    sub = command(
        "probe", _probe, "what frozen features tell of your classes, from few labels and all (docs/transfer.md)"
    )
    sub.add_argument(
        "models", nargs="+", metavar="MODEL", help="an exported student, a timm name, or NAME=FILE for other weights"
    )
    sub.add_argument("--data", required=True, metavar="SOURCE", help="as for train: the labelled images")
    sub.add_argument("--val", metavar="SOURCE", help="as for train: the images to test on")
    sub.add_argument("--shots", default="1,5,10,25,all", metavar="N,N,..", help="per class (default: 1,5,10,25,all)")
    sub.add_argument("--draws", type=int, default=5, metavar="K", help="sets of labelled images (default: 5)")
    sub.add_argument("--out", type=Path, default=Path("runs/probe"), metavar="DIR", help="(default: runs/probe)")
    sub.add_argument("--image-size", metavar="N", help="for timm names: pixels, such as 98 or '[98, 126]'")
    sub.add_argument("--seed", type=int, help="of the draws, and of what is held out without --val (default: 0)")
    sub.add_argument("--val-limit", type=int, metavar="N", help="test on N images only")
    sub.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept (default: runs/features)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    sub.add_argument("--dry-run", action="store_true", help="check data and models, tell the plan, write nothing")

    add_transfer_commands(commands)

    sub = command("evaluate", _evaluate, "top-1 and top-5 of an exported student")
    sub.add_argument("student", type=Path, help="a run's folder or its student.safetensors")
    sub.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder with one sub-folder per class, or a named source"
    )
    sub.add_argument("--device")
    sub.add_argument("--json", action="store_true")

    sub = command("export", _export, "the student of a run as safetensors for timm, and as ONNX")
    sub.add_argument("run_folder", type=Path)
    sub.add_argument("--checkpoint", choices=["best", "last"], default="last")
    sub.add_argument("--onnx", action="store_true", help="also write student.onnx and compare its outputs")

    sub = command("report", _report, "one HTML page about a run or a comparison, finished or not (docs/report.md)")
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run or of a comparison")
    sub.add_argument(
        "--baseline", type=Path, action="append", default=[], metavar="RUN", help="another run beside it; repeat it"
    )
    sub.add_argument("--data", metavar="SOURCE", help="other images than the run's validation images")
    sub.add_argument("--images", type=int, metavar="N", help="look at so many (default: 2000)")
    sub.add_argument(
        "--analysis", type=Path, action="append", default=[], metavar="DIR", help="`analyze --out` wrote it; repeat it"
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html in the folder)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")

    sub = command("import", _import, "weights that the papers' authors released, as an exported student")
    sub.add_argument("file", type=Path, metavar="FILE", help=".pth, .pt or .safetensors, on this disk")
    sub.add_argument("--model", required=True, metavar="TIMM_NAME")
    sub.add_argument(
        "--kwargs", default="{}", metavar="YAML", help="student.kwargs of a recipe: '{class_token: false}'"
    )
    sub.add_argument("--classes", metavar="SOURCE", help="whose classes the head's rows are (default: ImageNet-1K's)")
    sub.add_argument("--no-ema", action="store_true", help="the plain weights where the file has averaged ones too")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the student goes (default: runs/NAME_OF_FILE)")

    sub = command("demo", _demo, "a ViT teaches a small CNN on embedded real images, offline, in minutes")
    sub.add_argument("--seeds", type=int, default=1, help="seeds per method")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")

    sub = command("methods", _methods, "the distillation methods with their options")
    sub.add_argument("--json", action="store_true")

    sub = command("pairs", _pairs, "the papers' teachers and students, measured: parameters, multiply-adds, stage maps")
    sub.add_argument("names", nargs="*", metavar="NAME", help="only the pairs that have all of these in a model's name")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")

    sub = command("cost", _cost, "what a recipe's step costs, by part and beside plain feature distillation; no data")
    sub.add_argument("recipe", help="as for train")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    sub.add_argument("--teacher", metavar="MODEL", help="as for train")
    sub.add_argument("--student", metavar="MODEL", help="as for train")
    sub.add_argument("--classes", type=int, default=1000, metavar="N", help="of the data (default: 1000)")
    sub.add_argument("--batch", type=int, metavar="N", help="images a device (default: 32 counted, 4 measured)")
    sub.add_argument("--measure", action="store_true", help="also time real steps on random pixels")
    sub.add_argument("--device", help="for --measure: cpu, cuda, cuda:1 (default: a GPU if there is one)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="also write NAME.json and NAME.md there")
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(data=None, val=None, on_bad_image=None)

    sub = command("plan", _plan, "before a big run: hours, GPU-hours and memory as intervals, and what holds it up")
    sub.add_argument("recipe", help="as for train")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    sub.add_argument("--data", metavar="SOURCE", help="as for train")
    sub.add_argument("--val", metavar="SOURCE", help="as for train")
    sub.add_argument("--teacher", metavar="MODEL", help="as for train")
    sub.add_argument("--student", metavar="MODEL", help="as for train")
    sub.add_argument("--images", type=int, metavar="N", help="training images (default: the data's, or ImageNet-1K's)")
    sub.add_argument("--classes", type=int, metavar="N", help="of the data (default: the data's, or 1000)")
    sub.add_argument("--gpu", metavar="KIND", help="v100, a100, h100, l4, rtx4090, ... (default: a100)")
    sub.add_argument("--gpus", type=int, default=1, metavar="K", help="how many (default: 1)")
    sub.add_argument("--measure", action="store_true", help="time real steps and the reading of images on this machine")
    sub.add_argument("--batch", type=int, metavar="N", help="for --measure: images of a step (default: up to 64)")
    sub.add_argument("--device", help="for --measure: cpu, cuda, cuda:1 (default: a GPU if there is one)")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    sub.set_defaults(on_bad_image=None)

    add_analyze_commands(commands)

    sub = command("teachers", _teachers, "which methods a timm model serves as a teacher; without names, the families")
    sub.add_argument("models", nargs="*", metavar="MODEL", help="timm names")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")

    sub = command("recipes", _recipes, "the shipped recipes; `recipes show NAME` writes one out and explains it")
    sub.add_argument("show", nargs="*", metavar="show NAME")
    sub.add_argument("--json", action="store_true")

    sub = command("doctor", _doctor, "what this machine has, and whether it works")
    sub.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
