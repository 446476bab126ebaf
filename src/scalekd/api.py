"""The Python interface: one function for each command, with the same code behind it.

Every function returns data, raises `UserError` for a mistake in its input, never exits the process, and prints only
with `verbose=True`. Heavy imports happen on the first call. docs/python.md shows how to use them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scalekd.common.errors import UserError
from scalekd.common.results import (
    Advice,
    Comparison,
    Cost,
    Embeddings,
    Evaluation,
    Export,
    Head,
    Method,
    Plan,
    Predictions,
    Probe,
    Pushed,
    Quantized,
    Report,
    Result,
    Retrieval,
)
from scalekd.common.stop import StopRequest
from scalekd.config.arguments import overrides_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from scalekd.config.recipe import Config

AnyPath = str | PathLike[str]


def train(
    recipe: str | PathLike[str],
    *,
    data: AnyPath | Mapping[str, Any] | None = None,
    val: AnyPath | None = None,
    unlabelled: AnyPath | None = None,
    teacher: AnyPath | Mapping[str, Any] | Literal[False] | None = None,
    student: AnyPath | Mapping[str, Any] | None = None,
    out: AnyPath | None = None,
    device: str | None = None,
    preflight: bool = True,
    teacher_outputs: AnyPath | None = None,
    stop: StopRequest | None = None,
    verbose: bool = False,
    overrides: Sequence[str] = (),
    **sections: Any,
) -> Result:
    """Trains a student from a recipe; `scalekd train`. The same call resumes a run that was interrupted.

    Args:
        recipe: the name of a shipped recipe (`recipes()` lists them) or a YAML file.
        data: training images: a folder with `train/` and `val/` or with one folder per class, `tar:...`, `wds:...`,
            `hf:...`, `torchvision:...`; or a mapping of keys of the recipe's section `data`.
        val: validation images, in the same forms. By default those of `data`, or a held-out part.
        unlabelled: more training images, without labels; or `rest`.
        teacher: a timm model name with pre-trained weights, or the folder of a run; or a mapping of keys of the
            section, such as `{"model": "resnet18", "weights": "pretrained"}`. `False` removes the recipe's teacher;
            remove the losses that need it too.
        student: a timm model name, or the folder of a run; or a mapping of keys of the section.
        out: the run's folder; `runs/NAME` by default.
        device: `cpu`, `cuda`, `cuda:1`; by default a GPU if there is one.
        preflight: check data, models and two real steps before training.
        teacher_outputs: a folder where runs that show their teacher the same pixels share its outputs.
        stop: a `StopRequest` that is entered already. By default SIGINT, SIGTERM and SIGUSR1 stop the run after the
            current step, with a checkpoint.
        verbose: print the pre-flight and a progress line.
        overrides: keys of the recipe as on the command line, such as `["optim.lr=1e-3"]`.
        **sections: the same as keyword arguments: `optim={"lr": 1e-3}, losses={"kd": {"temperature": 2}}, seed=1`.
            Nested mappings change single keys and keep the others. `losses={"kd": False}` removes a loss.

    Raises:
        UserError: for anything wrong with the recipe, data, models or `out`; lists every problem of a recipe.
        Stopped: when a signal stopped the run; `exit_code` is that of the command line.

    Example:
        >>> result = scalekd.train("own-data", data="photos", teacher="swin_tiny_patch4_window7_224",
        ...                        student="resnet18", out="runs/photos", train={"epochs": 30})
        >>> result.top1, result.student
    """
    with _stoppable(stop) as stop:
        from scalekd.common.parallel import processes
        from scalekd.runs.assistants import train_chain

        config = _config(recipe, overrides_of(data, val, unlabelled, teacher, student, overrides, sections))
        folder = Path(out) if out else Path("runs") / config.name
        with processes(device) as on:
            summary = train_chain(
                config,
                folder,
                on,
                _console(verbose),
                check=preflight,
                stop=stop,
                teacher_outputs=Path(teacher_outputs) if teacher_outputs else None,
            )
    metrics = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    return Result(
        folder, summary.get("top1"), metrics, folder / "student.safetensors", folder / "report.html", dict(summary)
    )


def evaluate(student: AnyPath, *, data: AnyPath, device: str | None = None, verbose: bool = False) -> Evaluation:
    """Evaluates an exported student; `scalekd evaluate`.

    Args:
        student: a run's folder, its student.safetensors, or an .onnx file.
        data: images with the student's classes, in any form that `train` takes. A student of sets of labels needs sets.
        device: as for `train`.
        verbose: print what the data are.
    """
    from scalekd.runs.students import evaluate_student

    found, described = evaluate_student(Path(student), fspath(data), device, _console(verbose))
    more = {key: found[key] for key in ("map", "f1_macro", "f1_micro", "threshold", "classes") if key in found}
    return Evaluation(found.get("top1"), found.get("top5"), found["loss"], int(found["images"]), described, **more)


def evaluate_retrieval(
    student: AnyPath,
    *,
    data: AnyPath,
    gallery: AnyPath | None = None,
    sheet: AnyPath | None = None,
    device: str | None = None,
    verbose: bool = False,
) -> Retrieval:
    """Measures how well a student's embeddings find images of the same class; `scalekd evaluate --retrieval`.

    Args:
        student: as for `evaluate`; it needs no classifier.
        data: the queries, in any form that `train` takes. Their classes may be others than the student's.
        gallery: the images to search, with some of the classes of `data`; by default the images of `data` query each other.
        sheet: draw some queries with their nearest images into this .png or .jpg file.
        device: as for `train`.
        verbose: print what the data are, and what is skipped.

    Raises:
        UserError: for sets of labels, a single class, a gallery without a class of the queries, and one with fewer than
            ten images.
    """
    from scalekd.runs.retrieval import evaluate_retrieval as evaluated

    texts = fspath(data), fspath(gallery) if gallery is not None else None
    return evaluated(Path(student), *texts, Path(sheet) if sheet else None, device, _console(verbose))


def predict(
    student: AnyPath,
    inputs: AnyPath | Sequence[AnyPath],
    *,
    top: int | None = None,
    threshold: float | None = None,
    csv: AnyPath | None = None,
    jsonl: AnyPath | None = None,
    sheet: AnyPath | None = None,
    batch: int = 64,
    workers: int | Literal["auto"] = "auto",
    device: str | None = None,
    verbose: bool = False,
) -> Predictions:
    """The most probable classes of images, with the preprocessing of the run's validation; `scalekd predict`.

    Images that cannot be read are skipped and listed in the result.

    Args:
        student: a run's folder, its student.safetensors, or an .onnx file.
        inputs: image files, folders that are searched at any depth, or other sources, as `train` takes them.
        top: how many classes per image at most: 5 by default; with sets of labels all that reach the threshold.
        threshold: for a student of sets of labels, the probability from which on an image has a class; by default that of
            its card, which was chosen on the validation images.
        csv: write a table to this file.
        jsonl: write a JSON object per image to this file.
        sheet: draw the images with their classes into this .png or .jpg file; at most 120 of them.
        batch: images at a time.
        workers: processes that read images.
        device: as for `train`.
        verbose: print what is skipped, and the progress, to standard error.

    Raises:
        UserError: for a student without a classifier, a threshold out of range, and if no image can be read.
    """
    from scalekd.runs.predict import predict as predicted

    return predicted(
        Path(student),
        _texts(inputs),
        top=top,
        threshold=threshold,
        csv=Path(csv) if csv else None,
        jsonl=Path(jsonl) if jsonl else None,
        sheet=Path(sheet) if sheet else None,
        batch=batch,
        workers=workers,
        device=device,
        console=_console(verbose, stderr=True),
    )


def embed(
    student: AnyPath,
    inputs: AnyPath | Sequence[AnyPath],
    *,
    out: AnyPath | None = None,
    batch: int = 64,
    workers: int | Literal["auto"] = "auto",
    device: str | None = None,
    verbose: bool = False,
) -> Embeddings:
    """The embeddings of images, not normalised; `scalekd embed`.

    They are the output of the student's embedding head or, without one, pooled features, the input of its classifier.

    Args:
        student: as for `predict`; it needs no classifier.
        inputs: as for `predict`.
        out: a .npy file, with the names of the images in .names.txt next to it, or a .safetensors file, with the names
            in its metadata.
        batch: as for `predict`.
        workers: as for `predict`.
        device: as for `train`.
        verbose: as for `predict`.
    """
    from scalekd.runs.predict import embed as embedded

    return embedded(
        Path(student),
        _texts(inputs),
        out=Path(out) if out else None,
        batch=batch,
        workers=workers,
        device=device,
        console=_console(verbose, stderr=True),
    )


def push(run: AnyPath, repo: str, *, private: bool = False, dry_run: bool = False) -> Pushed:
    """Uploads a student to the Hugging Face Hub in timm's format; `scalekd push`.

    The files are config.json, model.safetensors and README.md. They are made on this machine and loaded back with timm
    before anything is sent. Uses the token of `hf auth login` or of the variable HF_TOKEN.

    Args:
        run: a run's folder.
        repo: USER/NAME; created if it does not exist.
        private: create it as a private one.
        dry_run: make and check the files, and send nothing.

    Raises:
        UserError: for a name that the Hub does not accept, without a token or a network, and if the Hub refuses.
    """
    from scalekd.runs.push import push as pushed

    return pushed(Path(run), repo, private=private, dry_run=dry_run)


def probe(
    models: str | Sequence[str],
    *,
    data: AnyPath,
    val: AnyPath | None = None,
    shots: Sequence[int | Literal["all"]] = (1, 5, 10, 25, "all"),
    draws: int = 5,
    out: AnyPath = "runs/probe",
    image_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
    val_limit: int | None = None,
    cache: AnyPath | None = None,
    device: str | None = None,
    verbose: bool = False,
) -> Probe:
    """Fits linear classifiers and nearest neighbours on frozen features; `scalekd probe`.

    Args:
        models: exported students (a run's folder or file), timm names, or `NAME=FILE`. Others are compared with the
            first.
        data: as for `train`.
        val: as for `train`.
        shots: labelled images per class.
        draws: sets of labelled images of each size.
        out: the folder for results.json, summary.md and the figure.
        image_size: pixels, for timm names; timm's own by default.
        seed: chooses the draws, and what is held out without `val`.
        val_limit: test on this many images only.
        cache: where features are kept; `runs/features` by default.
        device: as for `train`.
        verbose: as for `train`.
    """
    from scalekd.analyze.probe import probe_named
    from scalekd.analyze.shots import parse_shots

    folder = Path(out)
    results = probe_named(
        [models] if isinstance(models, str) else list(models),
        fspath(data),
        fspath(val) if val else None,
        folder,
        _console(verbose),
        shots=parse_shots(",".join(str(count) for count in shots)),
        draws=draws,
        image_size=image_size,
        seed=seed,
        val_limit=val_limit,
        cache=Path(cache) if cache else None,
        device_name=device,
    )
    assert results is not None  # None of a dry run alone
    return Probe(folder, results)


def fit_head(
    model: str,
    *,
    data: AnyPath,
    val: AnyPath | None = None,
    out: AnyPath,
    weights: str = "pretrained",
    prefix: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    limit: int | None = None,
    seed: int | None = None,
    draws: int = 1,
    val_limit: int | None = None,
    cache: AnyPath | None = None,
    device: str | None = None,
    verbose: bool = False,
) -> Head:
    """Fits a linear classifier for your classes on a frozen teacher that has none; `scalekd head`.

    Args:
        model: the teacher's timm name, or its folder.
        data: as for `train`.
        val: as for `train`.
        out: an empty or new folder, for head.safetensors and head.json.
        weights: as in a recipe's section `teacher`.
        prefix: as in a recipe's section `teacher`.
        kwargs: as in a recipe's section `teacher`.
        mean: as in a recipe's section `teacher`.
        std: as in a recipe's section `teacher`.
        image_size: as in a recipe's section `teacher`.
        channels: as in a recipe's section `data`.
        limit: as in a recipe's section `data`.
        seed: as in a recipe's section `data`.
        crop_pct: as `augment.crop_pct`; timm's for that model by default.
        draws: fit on this many draws of the labels and keep the first one's head.
        val_limit: as for `probe`.
        cache: as for `probe`.
        device: as for `probe`.
        verbose: as for `probe`.
    """
    from scalekd.heads.fit_head import fit_named

    card = fit_named(
        {
            "model": model,
            "weights": weights,
            "prefix": prefix,
            "kwargs": kwargs and dict(kwargs),
            "image_size": image_size,
            "mean": mean,
            "std": std,
        },
        {"train": fspath(data), "val": val and fspath(val), "limit": limit, "seed": seed, "channels": channels},
        Path(out),
        _console(verbose),
        crop_pct=crop_pct,
        draws=draws,
        val_limit=val_limit,
        cache=Path(cache) if cache else None,
        device_name=device,
    )
    figures = card["validation"]["after"]
    return Head(Path(out), figures.get("top1"), card, figures.get("map"))


def compare(
    ladder: AnyPath,
    *,
    data: AnyPath | Mapping[str, Any] | None = None,
    val: AnyPath | None = None,
    teacher: AnyPath | Mapping[str, Any] | Literal[False] | None = None,
    student: AnyPath | Mapping[str, Any] | None = None,
    methods: Sequence[str] = (),
    students: Sequence[str] = (),
    seeds: int | None = None,
    out: AnyPath | None = None,
    known: Sequence[AnyPath] = (),
    jobs: int | None = None,
    share_teacher: bool = False,
    device: str | None = None,
    stop: StopRequest | None = None,
    verbose: bool = False,
    overrides: Sequence[str] = (),
    **sections: Any,
) -> Comparison:
    """Runs methods x students x seeds; `scalekd compare`. The same call resumes it.

    Each run is a process of its own. In a script, call this under `if __name__ == "__main__":`.

    Args:
        ladder: the name of a shipped ladder or a YAML file.
        data: as for `train`.
        val: as for `train`.
        teacher: as for `train`.
        student: as for `train`.
        stop: as for `train`.
        verbose: as for `train`.
        methods: only these rows; the baseline always runs.
        students: only these rows; the baseline always runs.
        seeds: how many; the ladder's by default.
        out: the comparison's folder; `runs/compare-NAME` by default.
        known: folders of other comparisons whose equal runs count.
        jobs: runs at a time; by default one per GPU, or per CPU core.
        share_teacher: one teacher pass for all runs of a seed.
        device: as for `train`; all GPUs by default.
        overrides: as for `train`, for every run.
        **sections: as for `train`, for every run.
    """
    with _stoppable(stop) as stop:
        from scalekd.compare.compare import compare as run
        from scalekd.compare.ladder import chosen, load_ladder
        from scalekd.compare.runner import places

        whole = load_ladder(fspath(ladder))
        found = chosen(whole, students, methods, seeds, student)
        folder = Path(out) if out else Path("runs") / f"compare-{found.name}"
        summary = run(
            found,
            fspath(ladder),
            overrides_of(data, val, None, teacher, student, overrides, sections),
            folder,
            places(jobs, device),
            share=share_teacher,
            known=[Path(k) for k in known],
            whole=chosen(whole, [], [], max(len(whole.seeds), len(found.seeds))),
            stop=stop,
            console=_console(verbose),
        )
    return Comparison(folder, folder / "report.html", summary, summary["failed"])


def export(
    run: AnyPath,
    *,
    checkpoint: Literal["best", "last"] = "last",
    onnx: bool = False,
    formats: Sequence[str] = (),
    data: AnyPath | None = None,
) -> Export:
    """Exports a run's student for timm, and as ONNX; `scalekd export`. Needs neither its data nor its teacher.

    The run's folder is then also one in timm's format: `timm.create_model("local-dir:RUN", pretrained=True)`.

    Args:
        run: the run's folder.
        checkpoint: `last`, or `best` by `train.best_by` on the validation images: top-1, or mAP, unless the recipe says so.
        onnx: also write student.onnx. Needs the extra `onnx`.
        formats: also convert it for these runtimes: fp16, openvino, coreml, litert, executorch, tensorrt. Each needs its
            converter, which the error for a missing one names, and is compared with the student if it runs here.
        data: images to compare on, in place of the run's validation images. At most 1,000 are used.
    """
    from scalekd.runs.students import export_run

    if data is not None and not formats:
        raise UserError("`data` goes with `formats`; without them nothing is compared on images")
    if formats:
        from scalekd.runs.formats import check_formats, export_formats

        check_formats(formats)
    figures, best_by, differences = export_run(Path(run), checkpoint, onnx)
    files = list(differences)
    made = export_formats(Path(run), formats, fspath(data) if data else None) if formats else {}
    chosen = (best_by, figures[best_by])
    return Export(
        files[0], figures.get("top1"), differences, files[1] if onnx else None, made, figures.get("map"), chosen
    )


def quantize(
    run: AnyPath,
    *,
    data: AnyPath | None = None,
    val: AnyPath | None = None,
    qat: bool = False,
    qat_labels: bool = False,
    epochs: int = 3,
    calibration: Literal["auto", "minmax", "entropy", "percentile"] = "auto",
    images: int = 256,
    out: AnyPath | None = None,
    device: str | None = None,
    stop: StopRequest | None = None,
    verbose: bool = False,
    overrides: Sequence[str] = (),
    **sections: Any,
) -> Quantized:
    """Writes the student of a run as int8, for onnxruntime, and compares it with float32; `scalekd quantize`.

    The int8 file is calibrated on training images and, if asked for, also trained for a few epochs. The same call
    resumes. Needs the extra `onnx`.

    Args:
        run: the folder of a finished run. It gets student.int8.onnx and quantize.json.
        data: training images, in place of the run's; as for `train`.
        val: validation images, in place of the run's; as for `train`.
        qat: also train the int8 student with the run's teacher and losses.
        qat_labels: also train it with the run's labels only.
        epochs: of each training.
        calibration: how the ranges of activations are found; `auto` tries all and takes the most accurate on training
            images that were kept apart.
        images: training images that the ranges are measured on.
        out: the folder for the files and runs of every way; `run`/quantize by default.
        device: as for `train`, for the trainings. Everything else runs on the CPU.
        stop: as for `train`.
        verbose: as for `train`.
        overrides: keys of the recipe of the trainings, such as `["optim.lr=1e-5"]`.
        **sections: the same as keyword arguments, as for `train`.

    Raises:
        UserError: for a run without a classifier, and for data whose classes are not the student's.
        Stopped: as for `train`.
    """
    with _stoppable(stop) as stop:
        from scalekd.common.parallel import processes
        from scalekd.runs.quantize import quantize as quantized
        from scalekd.runs.quantized_recipe import LABELS, TEACHER

        with processes(device) as on:
            return quantized(
                Path(run),
                data_overrides=overrides_of(data, val, None, None, None),
                ways=[way for way, wanted in ((LABELS, qat_labels), (TEACHER, qat)) if wanted],
                epochs=epochs,
                calibration=calibration,
                images=images,
                overrides=overrides_of(None, None, None, None, None, overrides, sections),
                out=Path(out) if out else None,
                device=on,
                console=_console(verbose),
                stop=stop,
            )


def report(
    folder: AnyPath,
    *,
    baselines: Sequence[AnyPath] = (),
    data: AnyPath | None = None,
    images: int | None = None,
    analyses: Sequence[AnyPath] = (),
    out: AnyPath | None = None,
    device: str | None = None,
) -> Report:
    """Writes one HTML page about a run or a comparison, finished or not; `scalekd report`.

    Args:
        folder: of the run or the comparison.
        baselines: folders of runs to show beside it.
        data: images with the run's classes, in place of its validation images.
        images: look at this many at most; 2,000 by default.
        analyses: folders that `scalekd analyze ... --out` wrote.
        out: the file; report.html in `folder` by default.
        device: as for `train`.
    """
    from scalekd.compare.report import report_any

    path, left_out = report_any(
        Path(folder),
        device,
        baselines=[Path(b) for b in baselines],
        data=fspath(data) if data else None,
        images=images,
        analyses=[Path(a) for a in analyses],
        out=Path(out) if out else None,
    )
    return Report(path, left_out)


def cost(
    recipe: AnyPath,
    *,
    teacher: AnyPath | Mapping[str, Any] | Literal[False] | None = None,
    student: AnyPath | Mapping[str, Any] | None = None,
    classes: int = 1000,
    batch: int | None = None,
    measure: bool = False,
    device: str | None = None,
    out: AnyPath | None = None,
    overrides: Sequence[str] = (),
    **sections: Any,
) -> Cost:
    """Counts what a recipe's step costs, by part and beside plain feature distillation; `scalekd cost`. Needs no data.

    Args:
        recipe: as for `train`.
        teacher: as for `train`.
        student: as for `train`.
        overrides: as for `train`.
        **sections: as for `train`.
        classes: of the data.
        batch: images of a step on one device; 32 counted and 4 measured by default.
        measure: also time real steps on random pixels.
        device: where to time them; as for `train`.
        out: a folder for NAME.json and NAME.md.
    """
    from scalekd.common.parallel import pick_device
    from scalekd.cost.count import cost as count
    from scalekd.cost.page import write
    from scalekd.cost.seconds import measure as timed
    from scalekd.train.hardware import for_device

    config = _config(recipe, overrides_of(None, None, None, teacher, student, overrides, sections))
    on = pick_device(device)
    config = for_device(config, on)
    found = count(config, classes=classes, batch=batch)
    if measure:
        found["measured"] = timed(config, on, classes=classes, batch=batch or 4)
    if out:
        write(found, Path(out))
    step = found["step"]
    return Cost(step["total"]["gmacs"], step["memory_mb"], found)


def plan(
    recipe: AnyPath,
    *,
    data: AnyPath | Mapping[str, Any] | None = None,
    val: AnyPath | None = None,
    teacher: AnyPath | Mapping[str, Any] | Literal[False] | None = None,
    student: AnyPath | Mapping[str, Any] | None = None,
    images: int | None = None,
    classes: int | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    measure: bool = False,
    together: bool = False,
    batch: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    **sections: Any,
) -> Plan:
    """Estimates hours and memory of a recipe before it is started; `scalekd plan`.

    Args:
        recipe: as for `train`.
        data: as for `train`.
        val: as for `train`.
        teacher: as for `train`.
        student: as for `train`.
        overrides: as for `train`.
        **sections: as for `train`.
        images: of the data, where it is not at hand.
        classes: of the data, where it is not at hand.
        gpu: v100, a100, h100, l4, ...; a100 by default.
        gpus: how many.
        measure: time real steps and the reading of images on this machine.
        together: with `measure`, also time steps while the workers load images. It narrows the time.
        batch: images of a timed step; up to 64 by default.
        device: where to time them; as for `train`.
    """
    from scalekd.common.parallel import pick_device
    from scalekd.cost.plan import plan as planned

    if measure and gpu:
        raise UserError("`gpu` and `measure`: give one of them; `measure` plans for this machine")
    if not measure and (device or batch):
        raise UserError("`device` and `batch` go with `measure`; without it nothing is run, and `gpu` names the card")
    found = planned(
        _config(recipe, overrides_of(data, val, None, teacher, student, overrides, sections)),
        images=images,
        gpu=gpu or "a100",
        gpus=gpus,
        classes=classes,
        measure_on=pick_device(device) if measure else None,
        batch=batch,
        both=together,
    )
    return Plan(tuple(found["hours"]), tuple(found["gpu_hours"]), found["runs"])


def advise(
    *,
    data: AnyPath | None = None,
    val: AnyPath | None = None,
    unlabelled: AnyPath | None = None,
    teacher: AnyPath | None = None,
    student: AnyPath | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> Advice:
    """Chooses a recipe and losses for your images, teacher, student and steps; `scalekd advise`. Trains nothing.

    The choice and the expected gain are those of the measured comparison that is closest to your situation.

    Args:
        data: labelled images, as for `train`.
        val: as for `train`.
        unlabelled: as for `train`. Without `data`, advice is about a student that sees no labels.
        teacher: as for `train`; the recipe's by default.
        student: as for `train`; the recipe's by default.
        steps: about how many the run is to have; by default those of the recipe's epochs.
        overrides: as for `train`.

    Raises:
        UserError: for a mistake in the arguments or the images.
    """
    from scalekd.compare.advice_page import commands
    from scalekd.compare.advise import advise as chosen

    if not data and not unlabelled:
        raise UserError("`data`: name your images, or images without labels with `unlabelled`")
    recipe = "own-data" if data else "own-images"
    found = chosen(recipe, overrides_of(data, val, unlabelled, teacher, student, overrides), steps)
    options = {"data": data, "val": val, "unlabelled": unlabelled, "teacher": teacher, "student": student}
    given = [word for name, value in options.items() if value for word in (f"--{name}", fspath(value))]
    details = found | commands(found["recipe"], [*given, *overrides], found["overrides"])
    return Advice(found["recipe"], found["overrides"], details["command"], found["expected"], found["reasons"], details)


def load_student(folder: AnyPath) -> tuple[nn.Module, dict[str, Any]]:
    """The student of a run, in eval mode, and its card: classes, image_size, mean, std, interpolation, crop_pct, ...

    Args:
        folder: a run's folder or its student.safetensors.
    """
    from scalekd.models.student_file import load_student as load

    return load(Path(folder))


def recipes() -> list[dict[str, Any]]:
    """The shipped recipes; `scalekd recipes --json`. Each has name, summary, command, expected, cost, status, ..."""
    from scalekd.config.listing import listed

    return listed()


def methods() -> list[Method]:
    """The distillation methods with their options; `scalekd methods`."""
    from scalekd.config.losses import options_of
    from scalekd.methods.names import METHODS

    return [
        Method(
            name,
            " ".join((method.__doc__ or "").strip().split("\n\n")[0].split()),
            getattr(method, "needs_teacher", True),
            getattr(method, "needs_targets", False),
            {option: parameter.default for option, parameter in options_of(method).items()},
        )
        for name, method in METHODS.items()
    ]


def _config(recipe: AnyPath, arguments: list[str]) -> Config:
    from scalekd.config.recipe import load_recipe

    return load_recipe(fspath(recipe), arguments)


def _console(verbose: bool, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(emoji=False, quiet=not verbose, stderr=stderr)


def _texts(inputs: AnyPath | Sequence[AnyPath]) -> list[str]:
    return [fspath(inputs)] if isinstance(inputs, (str, PathLike)) else [fspath(text) for text in inputs]


@contextlib.contextmanager
def _stoppable(stop: StopRequest | None) -> Iterator[StopRequest]:
    if stop is not None:
        yield stop
        return
    with StopRequest() as stop:
        yield stop
