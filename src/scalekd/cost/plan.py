"""How long a recipe's run will take, and whether it fits, before it is started: `scalekd plan`, docs/how-to/plan.md.

Every answer is an interval `[low, high]`. Speeds are images/s of all GPUs together; memory is in MB of 10^6 bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scalekd.common.errors import UserError, nearest
from scalekd.common.text import counted
from scalekd.config.assistants import chained
from scalekd.config.listing import IMAGENET_IMAGES
from scalekd.config.recipe import Config
from scalekd.data.split import Split, open_split
from scalekd.distill.build import mix_of, untrained

from .count import count_step
from .plan_measured import probe

Interval = list[float]

# Name, peak TFLOP/s in float32 outside the tensor cores, dense fp16/bf16 with float32 sums, whether bf16 is there, GB.
# From NVIDIA's data sheets, SXM where there are several: V100 (2020), T4 (2019), A100 (2021), A10 (2021), L4 (2023),
# L40S (2023), H100 (2023), H200 (2024); RTX: the GA102 (2020) and Ada (2022) white papers. Where a sheet has
# only the figure with sparsity, half of it.
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
# Share of the peak that a step's counted arithmetic reaches; docs/how-to/plan.md has where each comes from
UTILISATION_V100: Interval = [0.29, 0.67]  # the ScaleKD paper's Table 15, taken as float32
UTILISATION_FLOAT32: Interval = [0.20, 1.20]  # above 1: convolutions run in TF32 on tensor cores since the A100
UTILISATION_HALF: Interval = [0.035, 0.40]
MEMORY_COUNTED: Interval = [0.9, 1.3]  # times what `scalekd cost` counts; the same table has 0.87 to 1.24
MEMORY_MEASURED: Interval = [1.0, 1.15]  # the allocator's own share comes on top
READ_BY_WORKER: Interval = [60, 300]  # images/s, 224-pixel crops of JPEG files: a guess
SEVERAL_GPUS: Interval = [0.8, 1.0]  # of a measured one's speed times their number: a guess
SEVERAL_WORKERS: Interval = [0.7, 1.0]  # the same of processes that read images: a guess
START_WORKERS: Interval = [0.0, 1.0]  # seconds, for the training images and at every validation: a guess
UNFORESEEN = 0.25  # of a measured speed, either way: other work on the machine comes and goes
USABLE, RESERVED_MB = 0.95, 1000  # of a GPU's memory; for the CUDA context and the exchange of gradients
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
) -> dict[str, Any]:
    """Plain data: `runs`, one or an assistant's and then the student's, and `hours` and `gpu_hours` of all of them.

    images: training images of an epoch; those of the data unless given. classes: 1000 if the data cannot be opened.
    gpu: a name in GPUS. measure_on: time real steps there instead; `gpus` are then as many of that device, and
    batch the images of such a step. Raises `UserError`.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not in the list.{nearest(gpu, GPUS)} `--measure` plans for the machine at hand")
    for option, value in (("--images", images), ("--gpus", gpus), ("--classes", classes)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: one or more")
    if batch is not None and batch < 4:
        raise UserError(f"--batch {batch}: four or more, as steps of half as many are timed too")
    if measure_on is not None and measure_on.type == "cpu" and gpus > 1:
        raise UserError(f"--gpus {gpus}: this plans for the CPU; leave it out, or leave out --measure and name a --gpu")
    runs = []
    for one in chained(config):
        amount, split = _amount(one, images, gpus)
        of_data = classes or (len(split.classes) if split else 1000)
        if measure_on is None:
            speed = _counted(one, amount, of_data, gpu, gpus)
        else:
            speed = _measured(one, amount, of_data, measure_on, gpus, batch, split)
        runs.append(together(one, amount, speed, gpus))
    totals = {key: [sum(run[key][end] for run in runs) for end in (0, 1)] for key in ("hours", "gpu_hours")}
    return {"runs": runs, **totals}


# ---------------------------------------------------------------- how much there is to do


def _amount(config: Config, images: int | None, gpus: int) -> tuple[dict[str, Any], Split | None]:
    """Images, steps and validations of a run, and its data if they can be opened. Raises `UserError`."""
    data, train = config.data, config.train
    split, mix, told = None, None, "--images"
    try:
        split = open_split(data)
    except UserError as error:
        if images is None and "imagenet" not in (data.train or ""):
            raise UserError(f"{error}\nOr say how many images there will be: --images N") from None
    if data.train and data.unlabelled:
        if images is not None or split is None:
            raise UserError("images with and without labels share this recipe's batches: leave out --images, name both")
        mix = mix_of(config, len(split.train_indices), split.labelled)
    if images is None:
        images = len(split.train_indices) if split else min(IMAGENET_IMAGES, data.limit or IMAGENET_IMAGES)
        told = "the data" if split else "ImageNet-1K's, as the data cannot be opened"
    parts = train.accumulate * gpus
    if train.batch_size > images:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {images} training images; lower it")
    if train.batch_size % parts or train.batch_size == parts:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide among {counted(gpus, 'GPU')} x {train.accumulate} "
            f"accumulated steps into two images or more; make it a multiple of {parts}"
        )
    if (train.batch_size // parts) % 2 and (config.augment.mixup or config.augment.cutmix):
        raise UserError(f"mixup pairs images: {train.batch_size // parts} per GPU and step is odd; change --gpus")
    steps = images // train.batch_size
    if mix is not None:  # until both were gone through, as in build.py
        steps = max(1, mix.labelled // mix.per_batch, (images - mix.labelled) // (train.batch_size - mix.per_batch))
    return {
        "images": images,
        "images_from": told,
        "batch_per_gpu": train.batch_size // parts,
        "steps": steps * train.epochs,
        "samples": steps * train.epochs * train.batch_size,
        "validations": math.ceil(train.epochs / train.eval_every),
        "validation_images": len(split.val_indices) if split else min(VALIDATION_IMAGES, max(1, images // 10)),
    }, split


# ---------------------------------------------------------------- how fast


def _counted(config: Config, amount: dict[str, Any], classes: int, gpu: str, gpus: int) -> dict[str, Any]:
    """From the count of `scalekd cost` and assumptions, without a GPU, data or weights."""
    name, plain, half, has_bf16, gb = GPUS[gpu]
    with torch.device("meta"):
        distiller = untrained(config, classes, config.losses)
    step = count_step(distiller, config, classes, amount["batch_per_gpu"])
    in_half, peak = config.train.precision != "float32", plain
    share = share_plain = UTILISATION_V100 if gpu.startswith("v100") else UTILISATION_FLOAT32
    assumed = []
    if in_half:
        share, peak = UTILISATION_HALF, half
    if config.train.precision == "bf16" and not has_bf16:
        assumed.append(f"{name} has no bf16: counted as fp16, so set train.precision=fp16")
    assumed.append(
        f"a step reaches {100 * share[0]:g} to {100 * share[1]:g} % of the card's {peak:g} TFLOP/s "
        f"in {'fp16/bf16' if in_half else 'float32'} (docs/how-to/plan.md; no such run was made to check it)"
    )
    assumed.append(f"memory is {MEMORY_COUNTED[0]:g} to {MEMORY_COUNTED[1]:g} times what is counted")
    assumed.append(f"a worker reads {READ_BY_WORKER[0]:g} to {READ_BY_WORKER[1]:g} images/s: a guess; --measure tells")
    readers = max(1, config.data.workers) * gpus
    per_image = {"train": 2e9 * step["total"]["gmacs"], "validate": 2e9 * step["parts"]["student"]["forward"]}
    return {
        "on": name,
        "source": "counted",
        "train": [gpus * u * peak * 1e12 / per_image["train"] for u in share],
        "validate": [gpus * u * plain * 1e12 / per_image["validate"] for u in share_plain],  # it is in float32
        "read": [readers * rate for rate in READ_BY_WORKER],
        "read_validation": [readers * rate for rate in READ_BY_WORKER],
        "shared_cores": False,
        "memory": {
            "fixed_mb": sum(value or 0 for value in step["fixed_mb"].values()),
            "image_mb": step["total"]["saved_mb"],
            "times": MEMORY_COUNTED,
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
) -> dict[str, Any]:
    """From real steps on random pixels and, where the data can be opened, from reading some hundred images."""
    found = probe(config, device, classes, amount["batch_per_gpu"], batch, split)
    several = SEVERAL_GPUS if gpus > 1 else [1.0, 1.0]

    def rate(seconds: Interval, times: Interval, number: int) -> Interval:
        """seconds an image, [least, most], of one, to images/s of `number` of them"""
        return [number * times[0] / seconds[1] / (1 + UNFORESEEN), number * times[1] / seconds[0] * (1 + UNFORESEEN)]

    assumed = [f"the run is up to {100 * UNFORESEEN:g} % slower or faster than the rounds timed here"]
    if gpus > 1:
        assumed.append(f"{gpus} GPUs reach {100 * several[0]:g} to 100 % of one's speed times {gpus}")
    readers = max(1, min(config.data.workers * gpus, found["cores"]))
    beside = SEVERAL_WORKERS if readers > 1 else [1.0, 1.0]
    if "read" in found:
        reading = [rate(found[key], beside, readers) for key in ("read", "read_validation")]
    else:
        reading = [[readers * value for value in READ_BY_WORKER]] * 2
        assumed.append(f"a worker reads {READ_BY_WORKER[0]:g} to {READ_BY_WORKER[1]:g} images/s: a guess; no data here")
    return {
        "on": found["machine"],
        "source": "measured",
        "train": rate(found["train"], several, gpus),
        "validate": rate(found["validate"], several, gpus),
        "read": reading[0],
        "read_validation": reading[1],
        "shared_cores": device.type == "cpu",
        "memory": found["memory"] | {"times": MEMORY_MEASURED},
        "probe": found,
        "assumed": assumed,
    }


# ---------------------------------------------------------------- both together


def together(config: Config, amount: dict[str, Any], speed: dict[str, Any], gpus: int) -> dict[str, Any]:
    """A run's entry: time, memory and what will hold it up."""
    workers = config.data.workers
    shared = speed["shared_cores"]
    run = both_at_work(speed["train"], speed["read"], workers, shared)
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
    """Images/s of computing and reading together. shared: the readers take the cores that compute."""
    if not workers:
        return [1 / (1 / a + 1 / b) for a, b in zip(device, reading)]
    at_once = [min(a, b) for a, b in zip(device, reading)]
    return [1 / (1 / device[0] + workers / reading[0]), at_once[1]] if shared else at_once  # at worst, one core for all


def limit(device: Interval, reading: Interval, workers: int) -> str:
    """What holds the run up: `device`, `reading`, `perhaps reading`, or `both in turns` without workers."""
    if not workers:
        return "both in turns"
    if reading[1] < device[0]:
        return "reading"
    return "perhaps reading" if reading[0] < device[1] else "device"


def workers_needed(device: Interval, reading: Interval, workers: int) -> list[int]:
    """How many per GPU would read as fast as the device computes, the number now being `workers`."""
    return [math.ceil(workers * device[0] / reading[1]), math.ceil(workers * device[1] / reading[0])]


def largest_batch(memory: dict[str, Any]) -> list[int] | None:
    """Images per GPU and step that fit, by the wary figure and by the hopeful one; None without a GPU."""
    if memory["gpu_mb"] is None or memory["image_mb"] <= 0:
        return None
    room = USABLE * memory["gpu_mb"] - RESERVED_MB
    low, high = (
        max(0, int((room / times - memory["fixed_mb"]) / memory["image_mb"])) for times in memory["times"][::-1]
    )
    return [low, high]
