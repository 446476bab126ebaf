"""The pre-flight finds typical errors of a teacher: weights, class order, normalisation. Nothing is trained.

The teacher is the demo's, a ViT with 92 % on real images.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from scalekd.checks import step as step_module
from scalekd.checks import teacher as teacher_checks
from scalekd.checks.model import Check
from scalekd.checks.preflight import preflight
from scalekd.checks.statistical_tests import (
    Sample,
    better_features,
    by_neighbours,
    clearly_more,
    features_of,
    finite_loss,
    is_order,
    logits_of,
    other_order,
    other_statistics,
)
from scalekd.cli.app import parse
from scalekd.cli.options import recipe_overrides
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config, load_recipe
from scalekd.config.recipe_files import recipe_values
from scalekd.data.sources.idx import FASHION_CLASSES
from scalekd.distill.build import build
from scalekd.models import embeddings
from scalekd.models.class_order import natural, put_in_order, remedy, rows, teachers_order
from scalekd.models.create import resolve
from scalekd.models.unseen_pixels import unseen
from scalekd.models.weights.match import sha256_of

CPU = torch.device("cpu")
FILE = resolve("package:demo/teacher.safetensors")
UNPACKED = functools.lru_cache(maxsize=4)(gzip.decompress)
STUDENT = {"model": "test_resnet", "mean": [0.286], "std": [0.353]}


@pytest.fixture(scope="module")
def run() -> Any:
    return build(check_config(demo(), "test"), CPU)


@pytest.fixture(scope="module")
def sample(run) -> Sample:
    return teacher_checks.sample_of(run, run.taught_by[0], 256)


def demo(**teacher: Any) -> dict[str, Any]:
    """The demo's recipe with logit losses only and a tiny student."""
    recipe = recipe_values("demo")
    recipe |= {"student": STUDENT, "losses": {"ce": {}, "kd": {}}, "track": []}
    recipe["teacher"] = recipe["teacher"] | teacher
    return recipe


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    """Small samples, images that are unpacked once, and no trial steps except in the tests of them."""
    monkeypatch.setattr(gzip, "decompress", UNPACKED)
    monkeypatch.setattr(teacher_checks, "SAMPLE", 160)
    monkeypatch.setattr(teacher_checks, "FEW", 120)
    if "steps" not in request.node.name:
        monkeypatch.setattr(step_module, "one_step", lambda run: [])
        monkeypatch.setattr("scalekd.checks.preflight.gradient_check", lambda run: Check("losses", "ok", ""))


def screen(recipe: dict[str, Any]) -> str:
    text = io.StringIO()
    preflight(build(check_config(recipe, "test"), CPU), Console(file=text, width=500))
    return text.getvalue()


def line(text: str, name: str) -> str:
    return next(found for found in text.splitlines() if found.split(None, 1)[1].startswith(name))


def mean_std(mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), std)


def changed_weights(path: Path, change: Any) -> str:
    state = load_file(FILE)
    change(state, torch.Generator().manual_seed(0))
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return str(path)


# ---------------------------------------------------------------- a correct teacher


def test_no_warning_for_a_correct_teacher():
    text = screen(demo())
    assert "warn" not in text
    assert "83 of 83 tensors" in line(text, "teacher weights") and "0% of the weight matrices" in text
    accuracy = float(line(text, "teacher accuracy").split("accuracy")[1].split("%")[0])
    assert 86 < accuracy < 98


# ---------------------------------------------------------------- another number of classes


def test_another_number_of_classes(tmp_path):
    def more(state, generator):
        state["head.weight"], state["head.bias"] = torch.randn(12, 96), torch.randn(12)

    weights = changed_weights(tmp_path / "w.safetensors", more)
    with pytest.raises(UserError, match="kd: test_resnet has 10 classes and vit_tiny_r_s16_p8_224 12"):
        build(check_config(demo(weights=weights), "test"), CPU)
    text = screen(demo(weights=weights) | {"losses": {"ce": {}, "fd": {}}})
    assert "the teacher has 12 other classes: only its features are used" in text
    assert "ok" in line(text, "teacher features")


# ---------------------------------------------------------------- another order of classes


def in_order(path: Path, order: list[int]) -> str:
    """The demo's teacher, whose output i is now our class order[i]; without a card."""

    def turn(state, generator):
        state["head.weight"], state["head.bias"] = state["head.weight"][order], state["head.bias"][order]

    return changed_weights(path, turn)


TURNED = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.parametrize("losses, status", [({"ce": {}, "kd": {}}, "fail"), ({"ce": {}, "fd": {}}, "warn")])
def test_another_order_of_classes_by_its_predictions(tmp_path, losses, status):
    recipe = demo(weights=in_order(tmp_path / "w.safetensors", TURNED)) | {"losses": losses}
    if status == "fail":
        with pytest.raises(UserError, match="pre-flight: teacher accuracy: ") as error:
            screen(recipe)
        text = str(error.value)
    else:
        text = line(screen(recipe), "teacher accuracy")
        assert text.split()[0] == "warn"
    assert "Its classes seem to be in another order: with the best order for half of the images" in text
    assert "Set teacher.classes to the class names in the order of its outputs" in text  # it is not timm's either
    assert sum(f"output {FASHION_CLASSES[i]} predicts {FASHION_CLASSES[TURNED[i]]}" in text for i in range(10)) == 3
    share = float(text.split("half of the images, ")[1].split(" %")[0])
    assert 86 < share < 98


def test_names_beside_the_weights_are_believed_more_than_answers(tmp_path):
    """A head fitted on few labels may confuse all classes although its class order is right."""
    in_order(tmp_path / "student.safetensors", TURNED)
    card = json.loads(FILE.with_suffix(".json").read_text())
    card |= {"sha256": sha256_of(tmp_path / "student.safetensors"), "classes": FASHION_CLASSES}
    (tmp_path / "student.json").write_text(json.dumps(card))
    text = line(screen(demo(weights=str(tmp_path / "student.safetensors"))), "teacher accuracy")
    assert text.split()[0] == "warn" and "But its class names are in the data's order" in text


def test_its_names_put_its_logits_in_our_order(tmp_path):
    weights = in_order(tmp_path / "w.safetensors", TURNED)
    theirs = [FASHION_CLASSES[i] for i in TURNED]
    text = screen(demo(weights=weights, classes=theirs))
    assert "reordered from teacher.classes to the data's order" in line(text, "classes")
    assert line(text, "teacher accuracy").split()[0] == "ok"


def test_an_order_in_a_message_is_yaml():
    theirs, ours = ["no", "1", 'a "b", c'], ["1", 'a "b", c', "no"]
    text = remedy(theirs, ours, "teachers.x")
    assert text.startswith("set teachers.x.classes='") and yaml.safe_load(text.split("'")[1]) == theirs
    assert remedy([*"zyxwvutsrqponm"], [*"mnopqrstuvwxyz"], "teacher") == (
        "set teacher.classes to the names in that order"
    )


def test_the_order_of_timm_s_train_py_is_named():
    """timm sorts class 10 of eleven last, the data sorts it third; lower-case names likewise."""
    names = sorted(str(i) for i in range(11))
    by_timm = natural(names)
    assert by_timm == [str(i) for i in range(11)] and natural(["b", "C", "a"]) == ["a", "b", "C"]
    targets = torch.arange(220) % 11
    theirs = torch.nn.functional.one_hot(torch.tensor([by_timm.index(names[t]) for t in targets]), 11).float()
    assert is_order(theirs, targets, rows(by_timm, names))
    others = theirs.roll(1, dims=1)
    assert other_order(others, targets, names) and not is_order(others, targets, rows(by_timm, names))
    assert not is_order(theirs[:, rows(by_timm, names)], targets, rows(by_timm, names))


@pytest.mark.parametrize("names", [["Cat", "cat"], ["1", "01"], ["²", "a"]])
def test_names_that_timm_puts_in_no_order(names):
    assert natural(names) is None
    with pytest.raises(UserError, match="`natural` is ambiguous here"):
        teachers_order("natural", names, "teacher")


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "deit_tiny_distilled_patch16_224"])
def test_permuted_logits_are_the_hand_permuted_ones(model):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3} if "deit" in model else {}
    teacher = timm.create_model(model, num_classes=4, **small).eval()
    for p in teacher.parameters():
        torch.nn.init.normal_(p, std=0.1)
    images = torch.rand(2, 3, *teacher.pretrained_cfg["input_size"][-2:])
    with torch.no_grad():
        before = teacher(images)
        put_in_order(teacher, "natural", ["1", "10", "2", "B"], "teacher")
        torch.testing.assert_close(teacher(images), before[:, [0, 2, 1, 3]])
        put_in_order(teacher, ["B", "2", "1", "10"], ["1", "10", "2", "B"], "teacher")
        torch.testing.assert_close(teacher(images), before[:, [0, 2, 1, 3]][:, [2, 3, 1, 0]])


@pytest.mark.parametrize(
    "chosen, classes, text",
    [
        (["a", "b", "d"], 3, "teacher.classes: the data has no class d. Valid: c."),
        (["a", "b", "b"], 3, "list each of the data's 3 classes once; b is listed twice"),
        (["a", "b"], 3, "list each of the data's 3 classes once; c is missing"),
        ("natural", 4, "teacher.classes: the teacher has 4 outputs and the data 3 classes"),
        ("natural", 0, "teacher.classes: VisionTransformer has no linear classifier to reorder"),
    ],
)
def test_orders_that_are_refused(chosen, classes, text):
    teacher = timm.create_model("test_vit", num_classes=classes)
    with pytest.raises(UserError) as error:
        put_in_order(teacher, chosen, ["a", "b", "c"], "teacher")
    assert text in str(error.value)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"classes": "natural", "head": "runs/head"}, "teacher.classes: has no effect with a fitted head"),
        (
            {"classes": [1, 2, 10]},
            "teacher.classes: must be `natural` or the names of the data's classes in the teacher's",
        ),
        (
            {"classes": "alphabet"},
            "teacher.classes: must be `natural` or the names of the data's classes in the teacher's",
        ),
    ],
)
def test_orders_that_a_recipe_cannot_ask_for(change, text):
    with pytest.raises(UserError) as error:
        check_config(demo(**change), "test")
    assert text in str(error.value)


def test_two_classes_in_each_other_s_place(run, sample):
    logits = logits_of(run.distiller.teacher_view.model, sample, *mean_std(0.286, 0.353))
    assert other_order(logits, sample.targets, FASHION_CLASSES) is None
    swapped = logits[:, [0, 1, 2, 3, 4, 7, 6, 5, 8, 9]]
    text = other_order(swapped, sample.targets, FASHION_CLASSES)
    assert text is not None and text.endswith(
        (
            "output Sandal predicts Sneaker, output Sneaker predicts Sandal)",
            "output Sneaker predicts Sandal, output Sandal predicts Sneaker)",
        )
    )


@pytest.mark.parametrize("classes, images", [(2, 30), (10, 512), (1000, 512), (5, 1)])
def test_no_order_is_found_in_random_logits(classes, images):
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(images, classes, generator=generator), torch.arange(images) % classes
    assert other_order(logits, targets, [str(i) for i in range(classes)]) is None


def test_many_classes_with_few_images_each_are_tested_on_a_second_sample(run, monkeypatch):
    """500 images of 1000 classes give no evidence of their order; 16 images of each of 16 classes do."""
    asked = []

    def logits(model, sample, mean, std):
        return torch.nn.functional.one_hot((sample.targets + 7) % 1000, 1000).float()

    def some(run, taught, most, of_few_classes=False):
        asked.append(of_few_classes)
        targets = torch.arange(16).repeat(16) * 60 if of_few_classes else torch.arange(500) * 2
        return Sample(torch.zeros(len(targets), 1, 1, 1), targets)

    thousand = copy.copy(run)
    thousand.classes = [f"c{i}" for i in range(1000)]
    monkeypatch.setattr(teacher_checks, "logits_of", logits)
    monkeypatch.setattr(teacher_checks, "sample_of", some)
    check = teacher_checks.accuracy_by_logits(thousand, thousand.taught_by[0])
    assert asked == [False, True] and check.status == "fail"
    assert (
        "100.0 % of the other half are correct instead of 0.0 % (output c7 predicts c0, output c67 predicts c60"
        in check.fix
    )


@pytest.mark.parametrize("losses, status", [({"ce": {}, "kd": {}}, "fail"), ({"ce": {}, "fd": {}}, "warn")])
def test_another_order_of_classes_by_the_names_next_to_the_weights(tmp_path, losses, status):
    card = json.loads(FILE.with_suffix(".json").read_text())
    card["classes"] = sorted(FASHION_CLASSES)
    (tmp_path / "student.json").write_text(json.dumps(card))
    shutil.copy(FILE, tmp_path / "student.safetensors")
    recipe = demo(weights=str(tmp_path / "student.safetensors")) | {"losses": losses}
    odd = "class 0 is Ankle boot in the file next to its weights and T-shirt/top in the data"
    if status == "fail":
        remedy = "so kd would teach the wrong classes; set teacher.classes=natural, the order of timm's train.py"
        with pytest.raises(UserError, match=rf"(?s){odd}.*{remedy}"):
            screen(recipe)
        believed = recipe | {"teacher": recipe["teacher"] | {"classes": "natural"}}
        with pytest.raises(UserError, match=r"(?s)pre-flight: teacher accuracy.*Check teacher\.classes"):
            screen(believed)  # it is the card that is wrong: the weights are in our order
    else:
        assert odd in line(screen(recipe), "classes")
    card["classes"] = FASHION_CLASSES
    (tmp_path / "student.json").write_text(json.dumps(card))
    assert "with the same names in the same order" in screen(recipe)


# ---------------------------------------------------------------- shuffled weights


def test_rows_of_every_matrix_in_another_order(tmp_path):
    def shuffle(state, generator):
        for key, value in state.items():
            if value.ndim > 1:
                state[key] = value[torch.randperm(len(value), generator=generator)]

    weights = changed_weights(tmp_path / "w.safetensors", shuffle)
    assert "This is chance level (10.0 %)" in line(screen(demo(weights=weights)), "teacher accuracy")


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
    with pytest.raises(UserError, match="100% of the weight matrices without structure: shuffling their entries"):
        screen(demo(weights=weights))


def test_a_teacher_without_a_head_is_checked_by_its_features(tmp_path, monkeypatch):
    def backbone(state, generator):
        del state["head.weight"], state["head.bias"]

    def shuffled_backbone(state, generator):
        backbone(state, generator)
        for key, value in state.items():
            if value.ndim > 1:
                state[key] = value[torch.randperm(len(value), generator=generator)]

    right = changed_weights(tmp_path / "right.safetensors", backbone)
    text = line(screen(demo(weights=right) | {"losses": FD}), "teacher features")
    assert text.split()[0] == "ok"
    trained, fresh = (float(part.split()[-1].strip("(")) for part in text.split(" %")[:2])
    assert trained > 75 and fresh < trained - 15
    wrong = changed_weights(tmp_path / "wrong.safetensors", shuffled_backbone)
    text = line(screen(demo(weights=wrong) | {"losses": FD}), "teacher features")
    assert float(text.split(" %")[0].split()[-1]) < trained - 15
    as_good = torch.arange(120) % 2 == 0
    monkeypatch.setattr(teacher_checks, "neighbours", lambda *args: as_good)
    monkeypatch.setattr(teacher_checks, "by_neighbours", lambda *args: as_good)
    text = line(screen(demo(weights=right) | {"losses": FD}), "teacher features")
    assert text.split()[0] == "warn" and "Its features are not clearly better than those of initial values" in text


# ---------------------------------------------------------------- random weights


def test_initial_values_in_a_file(tmp_path):
    state = timm.create_model("vit_tiny_r_s16_p8_224", in_chans=1, img_size=28, num_classes=10, **SMALL).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="of the biases and norms are at their initial values"):
        screen(demo(weights=str(tmp_path / "w.safetensors")))


def test_initial_values_but_for_biases_and_norms(tmp_path):
    """As after one or two steps, or if only the norms were tuned."""
    model = timm.create_model("vit_tiny_r_s16_p8_224", in_chans=1, img_size=28, num_classes=10, **SMALL)
    state = {k: v + 1e-3 * torch.randn(v.shape) if v.ndim == 1 else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"0% of the biases and norms at initial values, \d+% of the weight matrices"):
        screen(demo(weights=str(tmp_path / "w.safetensors")))


def test_random_on_purpose():
    text = screen(demo(weights="random", top1=None))
    assert "random initial values, as teacher.weights=random asks: this teacher is untrained" in line(
        text, "teacher weights"
    )
    assert "This is chance level" in line(text, "teacher accuracy")


def test_random_on_purpose_from_the_command_line():
    args = parse(["train", "demo", "--teacher", "test_vit", "--teacher-random", "teacher.kwargs={}"])
    config = load_recipe(args.recipe, recipe_overrides(args))
    assert config.teacher is not None and (config.teacher.model, config.teacher.weights) == ("test_vit", "random")


# ---------------------------------------------------------------- another mean and std


def test_another_mean_and_std_by_its_predictions(run, sample):
    model = run.distiller.teacher_view.model
    found = {}
    for mean, std in ((0.286, 0.353), (0.0, 1.0)):
        statistics = mean_std(mean, std)
        logits = logits_of(model, sample, *statistics)
        found[mean] = 100 * (logits.argmax(1) == sample.targets).double().mean().item()
        text = other_statistics(model, sample, *statistics, logits)
        if mean:
            assert text is None
    assert text is not None and text.startswith("With mean 0.2") and "(of these images)" in text
    after, before = (float(part.split()[-1]) for part in text.split(" %")[:2])
    assert before == pytest.approx(found[0.0], abs=0.06) and after == pytest.approx(found[0.286], abs=2)


def test_mean_and_std_for_pixels_up_to_255():
    text = screen(demo(mean=[73.0], std=[90.0]))
    assert "mean and std must be for pixels in [0, 1]; divide values for pixels up to 255 by 255" in line(
        text, "teacher input"
    )
    assert "check the mean and std that it was trained with" in line(text, "teacher accuracy")


def test_another_mean_and_std_than_the_card_of_the_weights():
    text = line(screen(demo(mean=[0.3])), "teacher input")
    assert (
        "warn" in text
        and "The file next to its weights says mean 0.286, std 0.353; if that is right, set teacher.mean" in text
    )


def without_head(state, generator):
    del state["head.weight"], state["head.bias"]


def test_another_mean_and_std_of_a_teacher_without_a_head(tmp_path):
    weights = changed_weights(tmp_path / "w.safetensors", without_head)
    text = screen(demo(weights=weights, mean=[0.9], std=[0.1], top1=None) | {"losses": FD})
    assert "timm's default is mean 0.500, std 0.500; to use it, remove teacher.mean and" in line(text, "teacher input")
    assert "nearest-neighbour accuracy" in line(text, "teacher features")


class Clamped(torch.nn.Module):
    """Ignores values outside its range, as a model trained on other pixels may."""

    def forward_features(self, x):
        return x.clamp(-1, 1)

    def forward_head(self, x, pre_logits):
        return x.mean((2, 3))


def test_better_features_under_another_mean_and_std():
    targets = torch.arange(120) % 4
    red, green, shade = 60 + 120 * (targets % 2), 60 + 120 * (targets // 2), torch.arange(120) // 40
    pixels = torch.stack([red + shade, green - shade, 120 + shade], 1).to(torch.uint8)
    sample = Sample(pixels.view(-1, 3, 1, 1).expand(-1, -1, 2, 2), targets)
    model, colours = Clamped(), torch.ones(1, 3, 1, 1)
    wrong, right = (1.5 * colours, 0.1 * colours), (0.5 * colours, 0.5 * colours)
    before = by_neighbours(model, sample, *wrong)
    text = better_features(model, sample, *wrong, features_of(model, sample, *wrong))
    assert text is not None and text.endswith("check the mean and std that it was trained with")
    assert f"it is 100.0 % instead of {100 * before.double().mean():.1f} %" in text
    assert better_features(model, sample, *right, features_of(model, sample, *right)) is None


def test_better_features_are_reported_unless_the_card_confirms_the_statistics(run, monkeypatch):
    right = torch.arange(120) % 4 > 0
    monkeypatch.setattr(teacher_checks, "has_data_classes", lambda *args: False)
    monkeypatch.setattr(teacher_checks, "features_of", lambda *args: torch.zeros(120, 2))
    monkeypatch.setattr(teacher_checks, "neighbours", lambda *args: right)
    monkeypatch.setattr(teacher_checks, "by_neighbours", lambda *args: ~right)
    monkeypatch.setattr(teacher_checks, "better_features", lambda *args: "With mean 0.5")
    (check,) = teacher_checks.teacher_accuracy(run, run.taught_by[0])
    assert check.status == "ok"
    monkeypatch.setattr(teacher_checks, "card_of", lambda taught: None)
    taught = run.taught_by[0]
    (check,) = teacher_checks.teacher_accuracy(
        run, taught._replace(spec=taught.spec.model_copy(update={"mean": (0.9,)}))
    )
    assert (check.status, check.fix) == ("warn", "With mean 0.5")


def test_timm_s_mean_is_shown_next_to_the_recipe_s_for_a_file_with_a_head(tmp_path):
    text = screen(demo(weights=changed_weights(tmp_path / "w.safetensors", lambda *args: None)))
    assert line(text, "teacher input").split()[0] == "ok" and "; timm's default is mean 0.500" in line(
        text, "teacher input"
    )
    assert line(text, "teacher accuracy").split()[0] == "ok"


# ---------------------------------------------------------------- outputs that are no classes


def test_an_embedding_is_no_classifier(monkeypatch):
    """Ten outputs that other weights of that name have, like CLIP's 512. `scalekd head` fixes it."""
    monkeypatch.setattr(embeddings.timm, "list_pretrained", lambda name: ["clip"])
    cfg = timm.models.PretrainedCfg(num_classes=12)
    monkeypatch.setattr(embeddings.timm, "get_pretrained_cfg", lambda name: cfg)
    recipe = demo(weights="random", top1=None, kwargs=demo()["teacher"]["kwargs"] | {"num_classes": 12})
    with pytest.raises(UserError, match=r"losses.kd: the 12 outputs of teacher, \w+, are an embedding.*scalekd head"):
        build(check_config(recipe, "test"), CPU)
    text = line(screen(recipe | {"losses": FD}), "classes")
    assert "the teacher's 12 outputs are an embedding, not classes: only its features are used" in text


# ---------------------------------------------------------------- pixels without effect


VIT = {"embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.mark.parametrize(
    "name, kwargs, size, left_out",
    [
        ("vit_small_patch14_dinov2", VIT, (100, 84), (2, 0)),
        ("vit_small_patch14_dinov2", VIT, (98, 84), None),
        ("vit_small_patch14_dinov2", VIT | {"dynamic_img_size": True, "dynamic_img_pad": True}, (100, 90), None),
        ("test_convnext", {}, (66, 71), (2, 3)),
        ("test_resnet", {}, (65, 67), None),
        ("tf_efficientnet_b0", {}, (65, 67), None),  # pads as it convolves
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 1)}, (58, 59), (2, 3)),
    ],
)
def test_pixels_that_no_patch_takes_up(name, kwargs, size, left_out):
    """Against the gradient of the whole model."""
    sized = {} if name in ("test_convnext", "test_resnet", "tf_efficientnet_b0") else {"img_size": size}
    model = timm.create_model(name, num_classes=3, **kwargs, **sized)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    images = torch.rand(1, 3, *size, requires_grad=True)
    model.eval()(images).sum().backward()
    assert images.grad is not None
    used = images.grad[0].abs().sum(0) > 0
    beyond = tuple(whole - int(used.any(dim).nonzero().max()) - 1 for whole, dim in zip(size, (1, 0)))
    assert beyond == (left_out or (0, 0))
    model.train()
    found = unseen(model, 3, size)
    assert (found and found[:2]) == left_out and all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_patches_that_do_not_fill_the_image_are_told(light_recipe):
    light_recipe["teacher"] |= {"model": "vit_small_patch14_dinov2", "weights": "random", "image_size": [50, 64]}
    light_recipe["teacher"]["kwargs"] = VIT
    light_recipe["data"]["image_size"] = 66
    light_recipe["student"] = {"model": "test_convnext"}
    text = screen(light_recipe)
    teacher, student = line(text, "teacher pixels"), line(text, "student pixels")
    assert teacher.split()[0] == "warn" and "the model ignores the last 8 rows and 8 columns of 50x64" in teacher
    assert "Set teacher.image_size=[42, 56] or [56, 70]" in teacher
    assert "ignores the last 2 rows and 2 columns of 66x66" in student and "Set data.image_size=64 or 68" in student


# ---------------------------------------------------------------- how it counts


@pytest.mark.parametrize("gained, lost", [(0, 0), (7, 0), (8, 0), (20, 5), (15, 5), (5, 20), (300, 200), (260, 250)])
def test_clearly_is_an_exact_sign_test(gained, lost):
    a = torch.tensor([True] * gained + [False] * lost + [True, False])
    b = torch.tensor([False] * gained + [True] * lost + [True, False])
    wanted = gained > lost and scipy.stats.binomtest(gained, gained + lost).pvalue < 0.01
    assert clearly_more(a, b) == wanted


def test_a_nan_loss_counts_as_infinite():
    assert finite_loss(torch.full((2, 3), torch.nan), torch.tensor([0, 1])) == torch.inf


def test_neighbours_are_counted_without_the_image_itself(run):
    """Of three equal images the first has another class: with their own votes, the other two would be right."""
    images = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    images[3:, :, :14] = 255
    sample = Sample(images, torch.tensor([0, 1, 1, 1, 1, 1]))
    found = by_neighbours(run.distiller.teacher_view.model, sample, *mean_std(0.3, 0.3))
    assert found.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "top1, images, known, status, text",
    [
        (33.0, 512, None, "warn", "This is chance level (33.3 %): check its weights and class order"),
        (0.0, 512, None, "warn", "This is chance level (33.3 %)"),
        (33.0, 30, None, "warn", "30 images cannot tell this from chance level (33.3 %)"),
        (55.0, 30, None, "warn", "30 images cannot tell this from chance level (33.3 %)"),
        (55.0, 30, 90.0, "warn", "This is far below its known accuracy"),
        (50.0, 512, 90.0, "warn", "This is far below its known accuracy"),
        (80.0, 30, 90.0, "ok", ""),
        (50.0, 512, None, "ok", ""),
    ],
)
def test_warnings_about_low_accuracy(light_recipe, monkeypatch, top1, images, known, status, text):
    light_recipe["teacher"]["top1"] = known
    run = build(check_config(light_recipe, "test"), CPU)
    targets = torch.arange(images) % 3
    right = torch.arange(images) < round(images * top1 / 100)
    logits = torch.nn.functional.one_hot(torch.where(right, targets, (targets + 1) % 3), 3).float()
    monkeypatch.setattr(teacher_checks, "sample_of", lambda *args, **kwargs: Sample(torch.empty(images), targets))
    monkeypatch.setattr(teacher_checks, "logits_of", lambda *args: logits)
    (check,) = teacher_checks.teacher_accuracy(run, run.taught_by[0])
    assert check.status == status and check.fix.startswith(text) and bool(check.fix) == bool(text)
    assert check.text.startswith(f"{100 * right.double().mean():.1f} % on {images} validation images")


@pytest.mark.parametrize("epochs, text", [(1, "for 1 epoch of 3 steps,"), (2, "for 2 epochs of 3 steps,")])
def test_one_epoch_of_steps_is_no_epochs(cli, recipe_file, epochs, text):
    shown = cli("train", recipe_file, "--dry-run", f"train.epochs={epochs}", "losses={ce: {}}", "teacher=null")
    assert text in " ".join(shown.out.split())


@pytest.mark.parametrize("bits, warned", [(12, True), (10, True), (16, False)])
def test_values_that_do_not_fill_their_16_bits(cli, recipe_file, image_folder, bits, warned):
    random = np.random.default_rng(0)
    for file in (image_folder / "train").rglob("*.png"):
        Image.fromarray(random.integers(0, 2**bits, (40, 40)).astype(np.uint16)).save(file)
    shown = cli("train", recipe_file, "--dry-run", "losses={ce: {}}", "teacher=null")
    assert shown.code == 0 and ("they are nearly black" in " ".join(shown.out.split())) == warned


def test_lines_are_printed_as_they_are_known(run, monkeypatch):
    screen, shown = Console(file=io.StringIO(), width=120), []

    def seen(*_: object) -> list[Any]:
        shown.append(screen.file.getvalue())
        return []

    monkeypatch.setattr("scalekd.checks.preflight.teacher_accuracy", seen)
    monkeypatch.setattr(step_module, "one_step", seen)
    preflight(run, screen)
    assert "teacher input" in shown[0] and "... teacher: a sample of the validation images" in shown[0]
    assert "device" not in shown[0] and "device" in shown[1] and "... two trial steps" in shown[1]
