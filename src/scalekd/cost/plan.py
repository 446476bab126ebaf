"""Estimates the time and memory of a recipe's run before it starts: `scalekd plan`, docs/how-to/plan.md.

Estimates are intervals `[low, high]`. Speeds are images/s of all GPUs together; memory is in MB of 10^6 bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scalekd.common.errors import UserError, nearest
from scalekd.config.assistants import chained
from scalekd.config.listing import IMAGENET_IMAGES
from scalekd.config.recipe import Config
from scalekd.data.description import KEY
from scalekd.data.split import Split, open_split
from scalekd.distill.build import steps_of_an_epoch, untrained
from scalekd.models.unfilled import unfilled
from scalekd.train.hardware import MOST_WORKERS, for_device, resolved, workers_of

from .count import count_step
from .gpu_figures import figures
from .plan_measured import probe

Interval = list[float]

# Name, peak TFLOP/s in float32 outside the tensor cores, dense fp16/bf16 with float32 sums, whether it has bf16, GB.
# From NVIDIA's data sheets, SXM if there are several versions: V100 (2020), T4 (2019), A100 (2021), A10 (2021), L4
# (2023), L40S (2023), H100 (2023), H200 (2024); RTX: the GA102 (2020) and Ada (2022) white papers. If a sheet has only
# the figure with sparsity, half of it.
GPUS: dict[str, tuple[str, float, float, bool, float]] = {
    "v100-16": ("NVIDIA V100 16 GB", 15.7, 125, False, 16),
    "v100": ("NVIDIA V100 32 GB", 15.7, 125, False, 32),
    "t4": ("NVIDIA T4", 8.1, 65, False, 16),
    "a100-40": ("NVIDIA A100 40 GB", 19.5, 312, True, 40),
    "a100": ("NVIDIA A100 80 GB", 19.5, 312, True, 80),
    "a10": ("NVIDIA A10", 31.2, 125, True, 24),
    "l4": ("NVIDIA L4", 30.3, 121, True, 24),
    "l40s": ("NVIDIA L40S", 91.6, 362, True, 48),
    "h100": ("NVIDIA H100 SXM", 67, 989, True, 80),
    "h200": ("NVIDIA H200 SXM", 67, 989, True, 141),
    "rtx3090": ("NVIDIA RTX 3090", 35.6, 71, True, 24),
    "rtx4090": ("NVIDIA RTX 4090", 82.6, 165, True, 24),
}
# Share of the peak that a step's counted arithmetic reaches; docs/how-to/plan.md gives the source of each
UTILISATION_V100: Interval = [0.29, 0.67]  # the ScaleKD paper's Table 15, taken as float32
UTILISATION_FLOAT32: Interval = [0.20, 1.20]  # above 1: convolutions run in TF32 on tensor cores since the A100
UTILISATION_HALF: Interval = [0.035, 0.40]
MEMORY_COUNTED: Interval = [0.9, 1.3]  # times what `scalekd cost` counts; Table 15 has 0.87 to 1.24
MEMORY_MEASURED: Interval = [1.0, 1.15]  # for memory that the allocator reserves
READ_BY_WORKER: Interval = [60, 300]  # images/s, 224-pixel crops of JPEG files: a guess
SEVERAL_GPUS: Interval = [0.8, 1.0]  # times the number of GPUs and the speed of one: a guess
SEVERAL_WORKERS: Interval = [0.7, 1.0]  # the same for processes that load images: a guess
START_WORKERS: Interval = [0.0, 1.0]  # seconds, at the start of training and at every validation: a guess
UNFORESEEN = 0.25  # a measured speed varies by this share, because other work on the machine varies
USABLE = 0.95  # share of a GPU's memory
RESERVED_MB = 1000  # for the CUDA context and the exchange of gradients
VALIDATION_IMAGES = 50_000  # ImageNet's; a tenth of the training images if that is less


def plan(
    config: Config,
    *,
    images: int | None = None,
    gpu: str = "a100",
    gpus: int = 1,
    classes: int | None = None,
    measure_on: torch.device | None = None,
    batch: int | None = None,
    both: bool = False,
) -> dict[str, Any]:
    """`runs` (one, or the assistant's and then the student's), and their `hours` and `gpu_hours`, as plain data.

    images, classes: of the data; by default those of the data, and 1000 classes if they cannot be opened. gpu: a name in
    GPUS. measure_on: a device to time real steps on instead, with `batch` images; `gpus` is then the number of such
    devices. both: with the data here, also time steps while the workers load images. Raises `UserError`.
    """
    if gpu not in GPUS:
        raise UserError(f"`gpu` {gpu}: unknown.{nearest(gpu, GPUS)} Use `measure` to plan for this machine")
    for name, value in (("images", images), ("gpus", gpus), ("classes", classes)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` {value}: must be 1 or more")
    if batch is not None and batch < 4:
        raise UserError(f"`batch` {batch}: must be 4 or more, because steps of half as many images are timed too")
    if measure_on is not None and measure_on.type == "cpu" and gpus > 1:
        raise UserError(
            f"`gpus` {gpus}: `measure` plans for the CPU here; leave out `gpus`, or name a `gpu` without `measure`"
        )
    runs = []
    for recipe in chained(config):
        run = for_device(recipe, measure_on) if measure_on else _for_gpu(recipe, GPUS[gpu][3])
        amount, split = _amount(run, images, gpus)
        if both:
            _check_both(run, split, measure_on, gpus)
        outputs = classes or (len(split.classes) if split else 1000)
        if measure_on is None:
            speed = _counted(run, amount, outputs, gpu, gpus)
        else:
            speed = _measured(run, amount, outputs, measure_on, gpus, batch, split, both)
        runs.append(together(run, amount, speed, gpus))
    totals = {key: [sum(run[key][end] for run in runs) for end in (0, 1)] for key in ("hours", "gpu_hours")}
    return {"runs": runs, **totals}


def _check_both(config: Config, split: Split | None, device: torch.device | None, gpus: int) -> None:
    """Raises `UserError` if steps and loading cannot be timed at once."""
    if device is None:
        raise UserError("`together` goes with `measure`; without it nothing is run")
    if split is None:
        raise UserError("`together` loads images while it trains, and the data cannot be opened; set `data`")
    if gpus > 1:
        raise UserError("`together` times one device with its workers; leave out `gpus`")
    if config.data.train and config.data.unlabelled:
        raise UserError("`together` does not mix labelled and unlabelled images; leave it out")


def _for_gpu(config: Config, has_bf16: bool) -> Config:
    """The recipe with what `auto` would choose on a machine with this GPU and enough cores."""
    held = {"precision": "bf16" if has_bf16 else "fp16", "channels_last": True}
    return resolved(config, torch.device("cuda"), held, threads=MOST_WORKERS + 1)


# ---------------------------------------------------------------- images and steps


def _amount(config: Config, images: int | None, gpus: int) -> tuple[dict[str, Any], Split | None]:
    """Images, steps and validations of a run, and its data if they can be opened. Raises `UserError`."""
    data, train = config.data, config.train
    split = None
    try:
        split = open_split(data)
    except UserError as error:
        if images is None and "imagenet" not in (data.train or ""):
            raise UserError(f"{error}\nOr set the number of images with `images`.") from None
    mixed = data.train and data.unlabelled
    if mixed and (images is not None or split is None):
        raise UserError(
            "data.train and data.unlabelled share this recipe's batches: leave out `images`, and name data that exist"
        )
    source = "as given"
    if images is None:
        images = len(split.train_indices) if split else min(IMAGENET_IMAGES, data.limit or IMAGENET_IMAGES)
        source = "the data" if split else "ImageNet-1K's, because the data cannot be opened"
    steps, _ = steps_of_an_epoch(config, images, split.labelled if mixed and split else images, gpus)
    return {
        "images": images,
        "images_from": source,
        KEY: dict(split.described) if split else {},
        "batch_per_gpu": train.batch_size // (train.accumulate * gpus),
        "steps": steps * train.epochs,
        "samples": steps * train.epochs * train.batch_size,
        "validations": math.ceil(train.epochs / train.eval_every),
        "validation_images": len(split.val_indices) if split else min(VALIDATION_IMAGES, max(1, images // 10)),
    }, split


# ---------------------------------------------------------------- speed


def _counted(config: Config, amount: dict[str, Any], classes: int, gpu: str, gpus: int) -> dict[str, Any]:
    """Speed and memory from the count of `scalekd cost` and assumptions, without a GPU, data or weights."""
    name, plain, half, has_bf16, gb = GPUS[gpu]
    with unfilled():
        distiller = untrained(config, classes, config.losses)
    step = count_step(distiller, config, classes, amount["batch_per_gpu"])
    in_half, peak = config.train.precision != "float32", plain
    share = share_plain = UTILISATION_V100 if gpu.startswith("v100") else UTILISATION_FLOAT32
    assumed = []
    if in_half:
        share, peak = UTILISATION_HALF, half
    if config.train.precision == "bf16" and not has_bf16:
        assumed.append(f"{name} has no bf16, so the run is counted as fp16; set train.precision=fp16")
    known = figures(gpu, in_half, config.train.compile, peak * 1e12)
    memory, why = MEMORY_COUNTED, "`scalekd docs plan`; not verified by a run"
    if known:
        share = [known.utilisation[0] / (1 + UNFORESEEN), known.utilisation[1] * (1 + UNFORESEEN)]
        memory = [known.memory[0], known.memory[1] * MEMORY_MEASURED[1]]
        why = f"{known.steps} steps measured on {known.device}, {100 * UNFORESEEN:g} % slower or faster: {known.table}"
    assumed.append(
        f"a step reaches {100 * share[0]:.3g} to {100 * share[1]:.3g} % of the card's {peak:g} TFLOP/s "
        f"in {'fp16/bf16' if in_half else 'float32'} ({why})"
    )
    assumed.append(f"memory is {memory[0]:.2g} to {memory[1]:.3g} times what is counted")
    assumed.append(f"a worker loads {READ_BY_WORKER[0]:g} to {READ_BY_WORKER[1]:g} images/s: a guess, not measured")
    readers = max(1, workers_of(config)) * gpus
    per_image = {"train": 2e9 * step["total"]["gmacs"], "validate": 2e9 * step["parts"]["student"]["forward"]}
    return {
        "on": name,
        "source": "counted",
        "train": [gpus * u * peak * 1e12 / per_image["train"] for u in share],
        "validate": [gpus * u * plain * 1e12 / per_image["validate"] for u in share_plain],  # validation is in float32
        "read": [readers * rate for rate in READ_BY_WORKER],
        "read_validation": [readers * rate for rate in READ_BY_WORKER],
        "shared_cores": False,
        "memory": {
            "fixed_mb": sum(value or 0 for value in step["fixed_mb"].values()),
            "image_mb": step["total"]["saved_mb"],
            "times": memory,
            "gpu_mb": 1000 * gb,
        },
        "gflops": {key: value / 1e9 for key, value in per_image.items()},
        "assumed": assumed,
    }


def _measured(
    config: Config,
    amount: dict[str, Any],
    classes: int,
    device: torch.device,
    gpus: int,
    batch: int | None,
    split: Split | None,
    both: bool,
) -> dict[str, Any]:
    """Speed and memory from real steps on random pixels and, if the data can be opened, from loading some hundred images."""
    measured = probe(config, device, classes, amount["batch_per_gpu"], batch, split, both)
    several = SEVERAL_GPUS if gpus > 1 else [1.0, 1.0]

    def rate(seconds: Interval, times: Interval, number: int) -> Interval:
        """Images/s of `number` devices or workers, from the seconds per image of one, [least, most]."""
        return [number * times[0] / seconds[1] / (1 + UNFORESEEN), number * times[1] / seconds[0] * (1 + UNFORESEEN)]

    assumed = [f"the run is up to {100 * UNFORESEEN:g} % slower or faster than the timed rounds"]
    if gpus > 1:
        assumed.append(f"{gpus} GPUs reach {100 * several[0]:g} to 100 % of {gpus} times the speed of one")
    readers = max(1, min(workers_of(config) * gpus, measured["cores"]))
    share = SEVERAL_WORKERS if readers > 1 else [1.0, 1.0]
    if "read" in measured:
        reading = [rate(measured[key], share, readers) for key in ("read", "read_validation")]
    else:
        reading = [[readers * value for value in READ_BY_WORKER]] * 2
        assumed.append(f"a worker loads {READ_BY_WORKER[0]:g} to {READ_BY_WORKER[1]:g} images/s: a guess, without data")
    return {
        "on": measured["machine"],
        "source": "measured",
        "train": rate(measured["train"], several, gpus),
        "validate": rate(measured["validate"], several, gpus),
        "read": reading[0],
        "read_validation": reading[1],
        "together": rate(measured["together"], [1.0, 1.0], 1) if both else None,
        "shared_cores": device.type == "cpu",
        "memory": measured["memory"] | {"times": MEMORY_MEASURED},
        "probe": measured,
        "assumed": assumed,
    }


# ---------------------------------------------------------------- time, memory and bottleneck


def together(config: Config, amount: dict[str, Any], speed: dict[str, Any], gpus: int) -> dict[str, Any]:
    """A run's entry in the plan: time, memory and bottleneck. amount: `_amount`. speed: counted or measured."""
    workers = workers_of(config)
    shared = speed["shared_cores"]
    run = speed.get("together") or both_at_work(speed["train"], speed["read"], workers, shared)
    validating = both_at_work(speed["validate"], speed["read_validation"], workers, shared)
    evaluated = amount["validations"] * amount["validation_images"]
    seconds = [amount["samples"] / run[end] + evaluated / validating[end] for end in (1, 0)]
    starts = (1 + amount["validations"]) * (workers > 0)  # of worker processes
    hours = [(value + starts * each) / 3600 for value, each in zip(seconds, START_WORKERS)]
    memory, micro = speed["memory"], amount["batch_per_gpu"]
    at_batch = memory["fixed_mb"] + micro * memory["image_mb"]
    return {
        "name": config.name,
        "teacher": config.teacher.model if config.teacher else None,
        "student": config.student.model,
        "precision": config.train.precision,
        "losses": list(config.losses),
        "gpus": gpus,
        "epochs": config.train.epochs,
        "batch": config.train.batch_size,
        **amount,
        **speed,
        "images_per_s": run,
        "hours": hours,
        "gpu_hours": [gpus * value for value in hours],
        "memory_mb": [times * at_batch for times in memory["times"]],
        "largest_batch": largest_batch(memory),
        "limit": limit(speed["train"], speed["read"], workers),
        "workers": workers,
        "workers_needed": workers_needed(speed["train"], speed["read"], max(1, workers)),
        "versions": {"torch": torch.__version__},
    }


def both_at_work(device: Interval, reading: Interval, workers: int, shared: bool) -> Interval:
    """Images/s of computing and loading together. shared: the workers use the cores that compute."""
    if not workers:
        return [1 / (1 / a + 1 / b) for a, b in zip(device, reading)]
    at_once = [min(a, b) for a, b in zip(device, reading)]
    return (
        [1 / (1 / device[0] + workers / reading[0]), at_once[1]] if shared else at_once
    )  # at worst, one core does all


def limit(device: Interval, reading: Interval, workers: int) -> str:
    """The bottleneck: `device`, `reading` (of images), `perhaps reading`, or `both in turns` without workers."""
    if not workers:
        return "both in turns"
    if reading[1] < device[0]:
        return "reading"
    return "perhaps reading" if reading[0] < device[1] else "device"


def workers_needed(device: Interval, reading: Interval, workers: int) -> list[int]:
    """Workers per GPU, [least, most], that would load as fast as the device computes; `reading` is for `workers`."""
    return [math.ceil(workers * device[0] / reading[1]), math.ceil(workers * device[1] / reading[0])]


def largest_batch(memory: dict[str, Any]) -> list[int] | None:
    """Images per GPU and step that fit, [low, high]; None without a GPU."""
    if memory["gpu_mb"] is None or memory["image_mb"] <= 0:
        return None
    room = USABLE * memory["gpu_mb"] - RESERVED_MB
    low, high = (
        max(0, int((room / times - memory["fixed_mb"]) / memory["image_mb"])) for times in memory["times"][::-1]
    )
    return [low, high]
