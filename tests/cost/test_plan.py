"""Plans: against times and memory worked out by hand, the papers' own days, and NVIDIA's published speeds."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import changed

from scalekd.config.recipe import check_config
from scalekd.cost import gpu_figures, plan_measured
from scalekd.cost.count import cost
from scalekd.cost.plan import (
    GPUS,
    MEMORY_COUNTED,
    UTILISATION_FLOAT32,
    UTILISATION_HALF,
    UTILISATION_V100,
    both_at_work,
    largest_batch,
    limit,
    plan,
    workers_needed,
)
from scalekd.cost.plan_page import between, duration, markdown, narrower

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "how-to" / "plan.md").read_text()
CPU = torch.device("cpu")
# days on 8 V100, and GB of each, for 100 epochs of ImageNet-1K
TABLE_15 = {
    ("fd", "s"): (1.67, 3.66), ("fd", "b"): (1.83, 3.66), ("fd", "l"): (2.24, 4.72),
    ("step", "s"): (2.10, 6.65), ("step", "b"): (2.53, 7.26), ("step", "l"): (3.51, 9.11),
}  # fmt: skip


# ---------------------------------------------------------------- what the assumptions come from


@pytest.mark.parametrize("method, teacher", TABLE_15)
def test_the_papers_days_and_memory_are_within_the_assumptions(method, teacher):
    counted = json.loads((ROOT / f"docs/results/cost/swin-{teacher}-resnet50.json").read_text())[method]
    days, gb = TABLE_15[method, teacher]
    flops = 2e9 * counted["total"]["gmacs"] * 100 * 1_281_167
    rate = flops / (8 * days * 86_400)
    assert UTILISATION_V100[0] < rate / 15.7e12 < UTILISATION_V100[1]
    assert UTILISATION_HALF[0] < rate / 125e12 < UTILISATION_HALF[1]  # should it have been mixed precision
    assert MEMORY_COUNTED[0] < gb * 1e3 / counted["memory_mb"] < MEMORY_COUNTED[1]
    name = {"fd": "FD", "step": "ScaleKD"}[method] + f", Swin-{teacher.upper()}"
    row = re.search(rf"^\| {name} \|(.*)\|$", DOCS, re.MULTILINE)
    assert row, f"docs/how-to/plan.md does not show {name}"
    cells = [float(cell.strip(" %")) for cell in row[1].split("|")]
    shown = [days, counted["total"]["gmacs"], rate / 1e12, 100 * rate / 15.7e12, 100 * rate / 125e12]
    assert cells == pytest.approx(shown, abs=0.051)


@pytest.mark.parametrize(
    "gpu, images_per_s, half, shown",
    [("v100", 2766 / 8, False, 54), ("v100", 8056 / 8, True, 20), ("a100", 7248 / 8, False, 113), ("a100", 16621 / 8, True, 16)],
)  # fmt: skip
def test_published_speeds_of_resnet50_are_within_the_assumptions(gpu, images_per_s, half, shown):
    student = json.loads((ROOT / "docs/results/cost/swin-s-resnet50.json").read_text())["step"]["parts"]["student"]
    _, plain, tensor, _, _ = GPUS[gpu]
    share = images_per_s * 2e9 * (student["forward"] + student["backward"]) / ((tensor if half else plain) * 1e12)
    low, high = UTILISATION_HALF if half else UTILISATION_V100 if gpu == "v100" else UTILISATION_FLOAT32
    assert low < share < high and round(100 * share) == shown and f"{shown} %" in DOCS


# ---------------------------------------------------------------- by hand


def test_reading_and_computing_together():
    # 100 images/s computed, 50 read: one after the other 1 / (1/100 + 1/50) = 33.3; side by side the slower one
    assert both_at_work([100, 200], [50, 200], 0, False) == pytest.approx([100 / 3, 100])
    assert both_at_work([100, 200], [50, 400], 4, False) == [50, 200]
    # on a CPU at worst one core does all of it: 1 / (1/100 + 4/50), as one of 4 readers alone reads 50 / 4
    assert both_at_work([100, 200], [50, 400], 4, True) == pytest.approx([1 / 0.09, 200])


def test_the_bottleneck():
    assert limit([100, 200], [20, 90], 4) == "reading"
    assert limit([100, 200], [20, 150], 4) == limit([100, 200], [150, 300], 4) == "perhaps reading"
    assert limit([100, 200], [201, 300], 4) == "device"
    assert limit([100, 200], [20, 90], 0) == "both in turns"
    # 4 workers read 20 to 80, one 5 to 20: 100 needs 5 of the fast, 200 needs 40 of the slow
    assert workers_needed([100, 200], [20, 80], 4) == [5, 40]


def test_the_largest_batch():
    # 0.95 x 10,000 - 1,000 = 8,500 MB; twice the count: (4,250 - 500) / 50 = 75; as counted: (8,500 - 500) / 50 = 160
    memory = {"fixed_mb": 500.0, "image_mb": 50.0, "times": [1.0, 2.0], "gpu_mb": 10_000.0}
    assert largest_batch(memory) == [75, 160]
    assert largest_batch(memory | {"fixed_mb": 5000.0}) == [0, 70]
    assert largest_batch(memory | {"gpu_mb": None}) is None


def test_seconds_per_image_at_another_batch_size():
    # 4 images: 5 s, 8 images: 9 s, so 1 s and 1 s an image; at 16: 17 s, 1.0625 each; seen 1.1 to 1.5 each
    assert plan_measured.seconds_per_image([5, 4, 6], [9, 8.8, 12], 4, 8, 16) == pytest.approx([1.0625, 1.5])
    assert plan_measured.seconds_per_image([5, 4, 6], [9, 8.8, 12], 4, 8, 8) == pytest.approx([1.1, 1.5])
    assert plan_measured.seconds_per_image([9, 4, 9], [9, 8.8, 12], 4, 8, 2)[1] == pytest.approx(9 / 2)


def test_times_and_numbers_as_text():
    assert duration([0.01, 0.02]) == "36 to 72 seconds" and duration([0.1, 0.4]) == "6 to 24 minutes"
    assert duration([1.23, 45.6]) == "1.2 to 46 hours" and duration([48, 96]) == "2 to 4 days"
    assert between(1234, 56_789) == "1,200 to 57,000" and between(30.1, 30.2) == "30"


# ---------------------------------------------------------------- counted


def test_hours_from_the_count(light_recipe):
    config = check_config(light_recipe, "test")
    (run,) = plan(config, gpu="h100")["runs"]
    # 24 images in batches of 8, 2 epochs, validated after each on 12
    wanted = {"images": 24, "steps": 6, "samples": 48, "validations": 2, "validation_images": 12, "batch_per_gpu": 8}
    assert {key: run[key] for key in wanted} == wanted
    counts = cost(config, classes=3, batch=8)["step"]
    training, student = counts["total"]["gmacs"] * 2e9, counts["parts"]["student"]["forward"] * 2e9
    for end, share, worker in ((1, 0.2, 60), (0, 1.2, 300)):
        computing = 48 * training / (share * 67e12) + 24 * student / (share * 67e12)
        assert run["hours"][end] * 3600 == pytest.approx(computing + (48 + 24) / worker)  # workers: 0, so in turns
    fixed, image = sum(counts["fixed_mb"].values()), counts["total"]["saved_mb"]
    assert run["memory_mb"] == pytest.approx([0.9 * (fixed + 8 * image), 1.3 * (fixed + 8 * image)])
    assert run["largest_batch"][0] == int(((0.95 * 80_000 - 1000) / 1.3 - fixed) / image)


def test_more_gpus_and_more_images(light_recipe):
    config = check_config(changed(light_recipe, train={"accumulate": 2}, data={"workers": 2}), "test")
    found = plan(config, images=1000, gpus=2, gpu="l4", classes=3)
    (run,) = found["runs"]
    assert run["batch_per_gpu"] == 2 and run["samples"] == 2000 and run["read"] == [240, 1200]
    assert found["gpu_hours"] == pytest.approx([2 * hours for hours in found["hours"]])
    (one,) = plan(check_config(changed(light_recipe, data={"workers": 2}), "test"), gpu="l4", classes=3)["runs"]
    assert run["train"] == pytest.approx([2 * rate for rate in one["train"]])
    # with workers the slower of the two, 240 images/s read at worst; they are started for training and two validations
    slow = 2000 / min(run["train"][0], 240) + 2 * 12 / min(run["validate"][0], 240) + 3
    assert run["hours"][1] * 3600 == pytest.approx(slow)


def test_a_card_without_bf16_and_a_recipe_without_a_teacher(light_recipe):
    recipe = changed(light_recipe, teacher=None, losses={"ce": {}}, train={"precision": "bf16"})
    (run,) = plan(check_config(recipe, "test"), gpu="t4")["runs"]
    assert run["teacher"] is None and "no bf16" in run["assumed"][0] and "3.5 to 40 %" in run["assumed"][1]
    assert run["train"][0] * run["gflops"]["train"] * 1e9 == pytest.approx(0.035 * 65e12)


def test_an_assistant_is_two_runs(light_recipe):
    recipe = light_recipe | {"assistant": {"student": {"model": "test_convnext"}, "train": {"epochs": 3}}}
    found = plan(check_config(recipe, "test"))
    first, last = found["runs"]
    assert (first["student"], first["teacher"]) == ("test_convnext", "test_vit") and first["epochs"] == 3
    assert (last["student"], last["teacher"]) == ("test_resnet", "test_convnext") and last["epochs"] == 2
    assert found["hours"] == pytest.approx([first["hours"][end] + last["hours"][end] for end in (0, 1)])
    assert "In total, tiny-assistant, then tiny: " in markdown(found)


# ---------------------------------------------------------------- measured


def test_measured_on_this_machine(light_recipe, monkeypatch):
    monkeypatch.setattr(plan_measured, "ROUND_SECONDS", 0.0)
    reading = plan_measured.load_batch

    def slowly(images: Any, keys: Any) -> Any:
        time.sleep(0.02 * len(keys))
        return reading(images, keys)

    monkeypatch.setattr(plan_measured, "load_batch", slowly)
    config = check_config(changed(light_recipe, train={"ema": 0.9}, augment={"mixup": 0.2}), "test")
    (run,) = plan(config, measure_on=CPU)["runs"]
    rounds = run["probe"]["rounds"]
    assert rounds.keys() == {"train 4", "train 8", "validate 32"}
    assert all(0 < least <= middle <= most for middle, least, most in rounds.values())
    assert run["train"][0] <= 8 / rounds["train 8"][2] / 1.25 * 1.0001
    assert run["train"][1] >= 8 / rounds["train 8"][1] * 1.25 * 0.9999
    assert run["read"][1] <= 1.25 / 0.02 and run["limit"] == "both in turns"
    assert run["hours"][0] * 3600 >= (48 + 24) * 0.02 / 1.25
    assert run["largest_batch"] is None and run["memory_mb"][0] > 100


# ---------------------------------------------------------------- the command


def test_the_command(cli, recipe_file):
    words = ("plan", recipe_file, "losses={ce: {}, kd: {}}", "--gpu", "a100", "--gpus", 2)
    shown = cli(*words, "--images", "10000")
    assert shown.code == 0 and "2 x NVIDIA A100 80 GB, counted, not measured" in shown.out
    assert (
        "20,000 samples: 2 epochs of 10,000 images (as given)" in shown.out
        and "2,500 of 8 images, 4 at a time" in shown.out
    )
    assert "a guess" in shown.out and len(shown.out.splitlines()) < 22
    assert "| steps | 6 of 8 images, 4 at a time |" in cli(*words, "--markdown").out


def test_errors(cli, recipe_file):
    for words, message in [
        (("--gpu", "a101"), "or `a100`?"),
        (("--gpu", "a100", "--measure"), "give one of them"),
        (("--device", "cpu"), "go with `--measure`"),
        (("--measure", "--device", "cpu", "--gpus", 2), "`--gpus` 2: "),
        (("--measure", "--device", "cpu", "--batch", 2), "`--batch` 2: must be 4 or more"),
        (("--together",), "`--together` goes with `--measure`"),
        (("--measure", "--device", "cpu", "--together", "data.train=/nowhere", "--images", 64), "cannot be opened"),
        (("--images", 0), "`--images` 0: must be 1 or more"),
        (("--images", 5), "more than the 5 training images"),
        (("--gpus", 3), "3 processes x 1"),
        (("--gpus", 8), "batch normalisation needs two or more"),
        (("data.train=/nowhere",), "number of images with `--images`"),
        (("teacher=null", "teachers={a: {model: test_vit}, b: {model: test_vit}}"), "one teacher"),
    ]:
        result = cli("plan", recipe_file, *words)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err, words


def test_steps_and_loading_at_once(light_recipe, monkeypatch):
    """The time follows from both together, and not from the two speeds."""
    monkeypatch.setattr(plan_measured, "ROUND_SECONDS", 0.01)
    recipe = changed(light_recipe, data={"workers": 1})
    (run,) = plan(check_config(recipe, "test"), measure_on=CPU, both=True)["runs"]
    least, most = run["probe"]["together"]
    assert 0 < least <= most
    assert run["images_per_s"] == run["together"] == pytest.approx([1 / most / 1.25, 1.25 / least])
    assert "timed together" in markdown({"runs": [run], "hours": run["hours"], "gpu_hours": run["gpu_hours"]})


def test_imagenet_is_taken_where_a_recipe_names_it(light_recipe):
    recipe = changed(light_recipe, data={"train": "/nowhere/imagenet/train", "val": "/nowhere/imagenet/val"})
    (run,) = plan(check_config(recipe, "test"))["runs"]
    assert run["images"] == 1_281_167 and "cannot be opened" in run["images_from"]
    assert run["samples"] == 2 * (1_281_167 - 7) and run["validation_images"] == 50_000


def test_the_docs_name_every_card():
    for gpu, (name, plain, half, has_bf16, gb) in GPUS.items():
        assert f"| `{gpu}` | {name} | {plain:g} | {half:g} | {'yes' if has_bf16 else 'no'} | {gb:g} |" in DOCS


def test_what_would_narrow_a_wide_interval():
    counted = {"source": "counted", "hours": [1.9, 14.0]}
    assert "--measure" in narrower(counted)[0] and narrower(counted | {"hours": [1.9, 3.0]}) == []
    measured = counted | {"source": "measured", "shared_cores": True, "workers": 4, "limit": "reading"}
    measured |= {"train": [50.0, 60.0], "read": [200.0, 300.0], "probe": {"read": [0.01, 0.02]}}
    assert len(narrower(measured)) == 1 and narrower(measured)[0].startswith("--together times steps while")
    assert len(narrower(measured | {"probe": {}})) == 1 and "name the data" in narrower(measured | {"probe": {}})[0]
    busy = narrower(measured | {"together": [10.0, 60.0]})
    assert len(busy) == 1 and "nothing else runs here" in busy[0]
    busy = narrower(measured | {"workers": 0, "train": [10.0, 60.0]})
    assert len(busy) == 1 and "nothing else runs here" in busy[0]


# ---------------------------------------------------------------- figures of GPUs


@pytest.fixture
def measured_gpus(tmp_path, monkeypatch):
    """Steps of an H200 as benchmarks/gpu_table.py writes them: 20 and 30 % of its 989 TFLOP/s, compiled 40 %."""
    steps = [
        {"half": True, "compiled": compiled, "images_per_s": share * 989e12 / 1e11, "flops_per_image": 1e11,
         "peak_mb": times * 5000, "counted_mb": 5000}
        for share, times, compiled in ((0.2, 0.9, False), (0.3, 1.2, False), (0.4, 1.0, True))
    ]  # fmt: skip
    file = tmp_path / "gpus.json"
    file.write_text(json.dumps({"h200": {"device": "NVIDIA H200", "table": "docs/results/gpu/x.md", "steps": steps}}))
    monkeypatch.setattr(gpu_figures, "FILE", file)


def on(gpu: str, tiny_recipe: dict[str, Any], **train: Any) -> dict[str, Any]:
    config = check_config(changed(tiny_recipe, train={"precision": "bf16"} | train), "test")
    return plan(config, images=1000, classes=3, gpu=gpu)["runs"][0]


def test_a_plan_uses_what_was_measured_on_the_card(measured_gpus, tiny_recipe):
    run = on("h200", tiny_recipe)
    flops = 1e9 * run["gflops"]["train"]
    assert run["train"] == pytest.approx([0.2 / 1.25 * 989e12 / flops, 0.3 * 1.25 * 989e12 / flops])
    assert run["memory"]["times"] == pytest.approx([0.9, 1.2 * 1.15])
    assert "16 to 37.5 % of the card's 989 TFLOP/s in fp16/bf16 (2 steps measured on NVIDIA H200" in run["assumed"][0]
    assert "memory is 0.9 to 1.38 times" in run["assumed"][1]
    compiled = on("h200", tiny_recipe, compile=True)
    assert compiled["train"] == pytest.approx([0.4 / 1.25 * 989e12 / flops, 0.4 * 1.25 * 989e12 / flops])


def test_other_cards_and_precisions_keep_the_assumptions(measured_gpus, tiny_recipe):
    for run in (on("h100", tiny_recipe), on("h200", tiny_recipe, precision="float32")):
        assert "not verified by a run" in run["assumed"][0] and run["memory"]["times"] == MEMORY_COUNTED


@pytest.mark.parametrize(
    ("device", "gb", "card"),
    [
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA A100-SXM4-40GB", 42.3, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.0, "a100"),
        ("Tesla V100-SXM2-16GB", 16.9, "v100-16"),
        ("NVIDIA GeForce RTX 4090", 25.4, "rtx4090"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA L4", 23.6, "l4"),
        ("CPU, Intel(R) Xeon(R) Processor, 1 threads", 0.0, None),
    ],
)
def test_the_card_of_a_device(device, gb, card):
    assert gpu_figures.card_of(device, gb, {key: values[4] for key, values in GPUS.items()}) == card
