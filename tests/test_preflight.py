"""What the pre-flight says of a teacher that is wrong in one way or another; nothing is trained.

The teacher is the demo's, a ViT with 92 % on real images, and what is done to it is what happens to people.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from scalekd import preflight as preflight_module
from scalekd import teacher_checks
from scalekd.build import build
from scalekd.cli import parse, shortcuts
from scalekd.config import check_config, load_recipe, recipe_values
from scalekd.errors import UserError
from scalekd.models import resolve
from scalekd.preflight import preflight
from scalekd.sources import FASHION_CLASSES
from scalekd.wrong_teacher import Sample, _loss, by_neighbours, clearly_more, logits_of, other_order, other_statistics

CPU = torch.device("cpu")
FILE = resolve("package:demo/teacher.safetensors")
STUDENT = {"model": "test_resnet", "mean": [0.286], "std": [0.353]}


@pytest.fixture(scope="module")
def run() -> Any:
    return build(check_config(demo(), "test"), CPU)


@pytest.fixture(scope="module")
def sample(run) -> Sample:
    return teacher_checks._sample(run, run.taught_by[0], 256)


def demo(**teacher: Any) -> dict[str, Any]:
    """The demo's recipe, logits alone, for a student of milliseconds."""
    recipe = recipe_values("demo")
    recipe |= {"student": STUDENT, "losses": {"ce": {}, "kd": {}}, "track": []}
    recipe["teacher"] = recipe["teacher"] | teacher
    return recipe


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    """A sample that takes a second; and no training step but where that is what is looked at."""
    monkeypatch.setattr(teacher_checks, "SAMPLE", 160)
    monkeypatch.setattr(teacher_checks, "FEW", 120)
    if "steps" not in request.node.name:
        monkeypatch.setattr(preflight_module, "_one_step", lambda run: [])


def screen(recipe: dict[str, Any]) -> str:
    told = io.StringIO()
    preflight(build(check_config(recipe, "test"), CPU), Console(file=told, width=400))
    return told.getvalue()


def line(told: str, name: str) -> str:
    return next(found for found in told.splitlines() if found.split(None, 1)[1].startswith(name))


def mean_std(mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), std)


def changed_weights(path: Path, change: Any) -> str:
    state = load_file(FILE)
    change(state, torch.Generator().manual_seed(0))
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return str(path)


# ---------------------------------------------------------------- a right one


def test_nothing_is_said_against_a_right_teacher():
    told = screen(demo())
    assert "warn" not in told
    assert "83 of 83 tensors" in line(told, "teacher weights") and "0% of the weight matrices" in told
    accuracy = float(line(told, "teacher accuracy").split("accuracy")[1].split("%")[0])
    assert 86 < accuracy < 98


# ---------------------------------------------------------------- another number of classes


def test_another_number_of_classes(tmp_path):
    def more(state, generator):
        state["head.weight"], state["head.bias"] = torch.randn(12, 96), torch.randn(12)

    weights = changed_weights(tmp_path / "w.safetensors", more)
    with pytest.raises(UserError, match="kd: test_resnet has 10 classes and vit_tiny_r_s16_p8_224 12"):
        build(check_config(demo(weights=weights), "test"), CPU)
    told = screen(demo(weights=weights) | {"losses": {"ce": {}, "fd": {}}})
    assert "the teacher's 12 classes are others, only its features are used" in told
    assert "ok" in line(told, "teacher features")


# ---------------------------------------------------------------- another order of classes


def test_another_order_of_classes_by_its_answers(tmp_path):
    order = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]

    def turn(state, generator):
        state["head.weight"], state["head.bias"] = state["head.weight"][order], state["head.bias"][order]

    told = line(screen(demo(weights=changed_weights(tmp_path / "w.safetensors", turn))), "teacher accuracy")
    assert "warn" in told and "With its classes in another order, found on one half of the images" in told
    assert sum(f"its {FASHION_CLASSES[i]} is {FASHION_CLASSES[order[i]]} here" in told for i in range(10)) == 3
    share = float(told.split("half of the images, ")[1].split(" %")[0])
    assert 86 < share < 98


def test_two_classes_in_each_other_s_place(run, sample):
    logits = logits_of(run.distiller.teacher_view.model, sample, *mean_std(0.286, 0.353))
    assert other_order(logits, sample.targets, FASHION_CLASSES) is None
    swapped = logits[:, [0, 1, 2, 3, 4, 7, 6, 5, 8, 9]]
    told = other_order(swapped, sample.targets, FASHION_CLASSES)
    assert told is not None and told.endswith(
        (
            "its Sandal is Sneaker here, its Sneaker is Sandal here",
            "its Sneaker is Sandal here, its Sandal is Sneaker here",
        )
    )


@pytest.mark.parametrize("classes, images", [(2, 30), (10, 512), (1000, 512), (5, 1)])
def test_no_order_is_found_in_answers_that_know_nothing(classes, images):
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(images, classes, generator=generator), torch.arange(images) % classes
    assert other_order(logits, targets, [str(i) for i in range(classes)]) is None


def test_many_classes_with_few_images_each_are_looked_at_once_more(run, monkeypatch):
    """Five hundred images of a thousand classes tell nothing of their order; sixteen of each of sixteen do."""
    asked = []

    def logits(model, sample, mean, std):
        return torch.nn.functional.one_hot((sample.targets + 7) % 1000, 1000).float()

    def some(run, of, most, of_few_classes=False):
        asked.append(of_few_classes)
        targets = torch.arange(16).repeat(16) * 60 if of_few_classes else torch.arange(500) * 2
        return Sample(torch.zeros(len(targets), 1, 1, 1), targets)

    thousand = copy.copy(run)
    thousand.classes = [f"c{i}" for i in range(1000)]
    monkeypatch.setattr(teacher_checks, "logits_of", logits)
    monkeypatch.setattr(teacher_checks, "_sample", some)
    check = teacher_checks._by_logits(thousand, thousand.taught_by[0])
    assert asked == [False, True] and check.status == "warn"
    assert "100.0 % of the other half are right, not 0.0 %: its c7 is c0 here, its c67 is c60 here" in check.fix


@pytest.mark.parametrize("losses, status", [({"ce": {}, "kd": {}}, "fail"), ({"ce": {}, "fd": {}}, "warn")])
def test_another_order_of_classes_by_the_names_beside_the_weights(tmp_path, losses, status):
    card = json.loads(FILE.with_suffix(".json").read_text())
    card["classes"] = sorted(FASHION_CLASSES)
    (tmp_path / "student.json").write_text(json.dumps(card))
    shutil.copy(FILE, tmp_path / "student.safetensors")
    recipe = demo(weights=str(tmp_path / "student.safetensors")) | {"losses": losses}
    odd = "class 0 is Ankle boot there and T-shirt/top here"
    if status == "fail":
        with pytest.raises(UserError, match=rf"(?s){odd}.*so kd would teach the wrong ones"):
            screen(recipe)
    else:
        assert odd in line(screen(recipe), "classes")
    card["classes"] = FASHION_CLASSES
    (tmp_path / "student.json").write_text(json.dumps(card))
    assert "of the same names in the same order" in screen(recipe)


# ---------------------------------------------------------------- shuffled weights


def test_rows_of_every_matrix_in_another_order(tmp_path):
    def shuffle(state, generator):
        for key, value in state.items():
            if value.ndim > 1:
                state[key] = value[torch.randperm(len(value), generator=generator)]

    weights = changed_weights(tmp_path / "w.safetensors", shuffle)
    assert "That is chance level (10.0 %)" in line(screen(demo(weights=weights)), "teacher accuracy")


SMALL = {"patch_size": 1, "embed_dim": 96, "depth": 6, "num_heads": 3}
FD = {"ce": {}, "fd": {}}


def test_tensors_of_one_shape_in_each_other_s_place(tmp_path):
    def swap(state, generator):
        for i in range(3):
            for part in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
                a, b = f"blocks.{i}.{part}", f"blocks.{5 - i}.{part}"
                state[a], state[b] = state[b], state[a]

    weights = changed_weights(tmp_path / "w.safetensors", swap)
    assert "warn" in line(screen(demo(weights=weights)), "teacher accuracy")


def test_entries_of_every_matrix_in_another_order(tmp_path):
    def shuffle(state, generator):
        for key, value in state.items():
            if value.ndim > 1:
                state[key] = value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)

    weights = changed_weights(tmp_path / "w.safetensors", shuffle)
    with pytest.raises(UserError, match="100% of the weight matrices without structure: their entries might as well"):
        screen(demo(weights=weights))


def test_a_teacher_without_a_head_is_told_by_its_features(tmp_path, monkeypatch):
    def backbone(state, generator):
        del state["head.weight"], state["head.bias"]

    def shuffled_backbone(state, generator):
        backbone(state, generator)
        for key, value in state.items():
            if value.ndim > 1:
                state[key] = value[torch.randperm(len(value), generator=generator)]

    right = changed_weights(tmp_path / "right.safetensors", backbone)
    told = line(screen(demo(weights=right) | {"losses": FD}), "teacher features")
    assert told.split()[0] == "ok"
    trained, fresh = (float(part.split()[-1].strip("(")) for part in told.split(" %")[:2])
    assert trained > 75 and fresh < trained - 15
    wrong = changed_weights(tmp_path / "wrong.safetensors", shuffled_backbone)
    told = line(screen(demo(weights=wrong) | {"losses": FD}), "teacher features")
    assert float(told.split(" %")[0].split()[-1]) < trained - 15
    as_good = torch.arange(120) % 2 == 0
    monkeypatch.setattr(teacher_checks, "by_neighbours", lambda *args: as_good)
    told = line(screen(demo(weights=right) | {"losses": FD}), "teacher features")
    assert told.split()[0] == "warn" and "They are not clearly better than those of initial values" in told


# ---------------------------------------------------------------- random weights


def test_initial_values_in_a_file(tmp_path):
    state = timm.create_model("vit_tiny_r_s16_p8_224", in_chans=1, img_size=28, num_classes=10, **SMALL).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="of the biases and norms are at their initial values"):
        screen(demo(weights=str(tmp_path / "w.safetensors")))


def test_initial_values_but_for_biases_and_norms(tmp_path):
    """As after a step or two, or where only the norms were tuned."""
    model = timm.create_model("vit_tiny_r_s16_p8_224", in_chans=1, img_size=28, num_classes=10, **SMALL)
    state = {k: v + 1e-3 * torch.randn(v.shape) if v.ndim == 1 else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"0% of the biases and norms at initial values, \d+% of the weight matrices"):
        screen(demo(weights=str(tmp_path / "w.safetensors")))


def test_random_on_purpose():
    told = screen(demo(weights="random", top1=None))
    assert "random, as the recipe asks: it knows nothing" in line(told, "teacher weights")
    assert "That is chance level" in line(told, "teacher accuracy")


def test_random_on_purpose_from_the_command_line():
    args = parse(["train", "demo", "--teacher", "test_vit", "--teacher-random", "teacher.kwargs={}"])
    config = load_recipe(args.recipe, [*shortcuts(args), *args.overrides])
    assert config.teacher is not None and (config.teacher.model, config.teacher.weights) == ("test_vit", "random")


# ---------------------------------------------------------------- another mean and std


def test_another_mean_and_std_by_its_answers(run, sample):
    model = run.distiller.teacher_view.model
    found = {}
    for mean, std in ((0.286, 0.353), (0.0, 1.0)):
        statistics = mean_std(mean, std)
        logits = logits_of(model, sample, *statistics)
        found[mean] = 100 * (logits.argmax(1) == sample.targets).double().mean().item()
        told = other_statistics(model, sample, *statistics, logits)
        if mean:
            assert told is None
    assert told is not None and told.startswith("With mean 0.2") and "(the images' own)" in told
    after, before = (float(part.split()[-1]) for part in told.split(" %")[:2])
    assert before == pytest.approx(found[0.0], abs=0.06) and after == pytest.approx(found[0.286], abs=2)


def test_mean_and_std_for_pixels_up_to_255():
    told = screen(demo(mean=[73.0], std=[90.0]))
    assert "They are for pixels in [0, 1]; divide those for pixels up to 255 by 255" in line(told, "teacher input")
    assert "was it trained with another mean and std?" in line(told, "teacher accuracy")


def test_another_mean_and_std_than_stands_beside_the_weights():
    told = line(screen(demo(mean=[0.3])), "teacher input")
    assert "warn" in told and "Beside its weights stands: mean 0.286, std 0.353; set teacher.mean" in told


# ---------------------------------------------------------------- how it counts


@pytest.mark.parametrize("gained, lost", [(0, 0), (7, 0), (8, 0), (20, 5), (15, 5), (5, 20), (300, 200), (260, 250)])
def test_clearly_is_an_exact_sign_test(gained, lost):
    a = torch.tensor([True] * gained + [False] * lost + [True, False])
    b = torch.tensor([False] * gained + [True] * lost + [True, False])
    wanted = gained > lost and scipy.stats.binomtest(gained, gained + lost).pvalue < 0.01
    assert clearly_more(a, b) == wanted


def test_a_loss_that_is_no_number_is_no_reason():
    assert _loss(torch.full((2, 3), torch.nan), torch.tensor([0, 1])) == torch.inf


def test_neighbours_are_counted_without_the_image_itself(run):
    """Of three equal images the first has another class: with their own votes, the other two would be right."""
    images = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    images[3:, :, :14] = 255
    sample = Sample(images, torch.tensor([0, 1, 1, 1, 1, 1]))
    found = by_neighbours(run.distiller.teacher_view.model, sample, *mean_std(0.3, 0.3))
    assert found.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "top1, images, known, status, told",
    [
        (33.0, 512, None, "warn", "That is chance level (33.3 %): wrong weights, or classes in another order?"),
        (0.0, 512, None, "warn", "That is chance level (33.3 %)"),
        (33.0, 30, None, "warn", "That cannot be told from chance (33.3 %) on 30 images"),
        (55.0, 30, None, "warn", "That cannot be told from chance (33.3 %) on 30 images"),
        (55.0, 30, 90.0, "warn", "Far below its known figure"),
        (50.0, 512, 90.0, "warn", "Far below its known figure"),
        (80.0, 30, 90.0, "ok", ""),
        (50.0, 512, None, "ok", ""),
    ],
)
def test_how_strongly_chance_is_said(light_recipe, monkeypatch, top1, images, known, status, told):
    light_recipe["teacher"]["top1"] = known
    run = build(check_config(light_recipe, "test"), CPU)
    targets = torch.arange(images) % 3
    right = torch.arange(images) < round(images * top1 / 100)
    logits = torch.nn.functional.one_hot(torch.where(right, targets, (targets + 1) % 3), 3).float()
    monkeypatch.setattr(teacher_checks, "_sample", lambda *args, **kwargs: Sample(torch.empty(images), targets))
    monkeypatch.setattr(teacher_checks, "logits_of", lambda *args: logits)
    (check,) = teacher_checks.teacher_accuracy(run, run.taught_by[0])
    assert check.status == status and check.fix.startswith(told) and bool(check.fix) == bool(told)
    assert check.text.startswith(f"{100 * right.double().mean():.1f} % on {images} validation images")


@pytest.mark.parametrize("epochs, told", [(1, "for 1 epoch of 3 steps,"), (2, "for 2 epochs of 3 steps,")])
def test_one_epoch_of_steps_is_no_epochs(cli, recipe_file, epochs, told):
    shown = cli("train", recipe_file, "--dry-run", f"train.epochs={epochs}", "losses={ce: {}}", "teacher=null")
    assert told in " ".join(shown.out.split())
