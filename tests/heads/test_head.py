"""`scalekd head`: the solver against an independent one, what it may see, and its head as a teacher's classifier."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from damage import some_of
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from small_images import write_images

from scalekd.cli.app import parse
from scalekd.cli.options import recipe_overrides
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config, load_recipe
from scalekd.data.options import Data
from scalekd.distill.build import build
from scalekd.heads import features as head_features
from scalekd.heads import fit_head as head
from scalekd.heads import linear as head_solver
from scalekd.heads import page as head_page
from scalekd.heads.features import pooled
from scalekd.heads.fit_head import Teacher, fit_head
from scalekd.heads.linear import choose, fit, held_out_parts
from scalekd.heads.scores import best_temperature, calibration_error, scores
from scalekd.models.build import build_model
from scalekd.models.fitted_head import build_with_head
from scalekd.models.options import Model
from scalekd.models.weights.match import sha256_of
from scalekd.models.weights.trained import trained
from scalekd.runs import heads as run_head
from scalekd.train.folder import open_folder
from scalekd.train.log import read_log

CPU = torch.device("cpu")
NAME, KWARGS = "test_vit", {"depth": 2}
DINO = ("vit_small_patch14_dinov2", {"embed_dim": 24, "depth": 2, "num_heads": 3})


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (1.0,))


def backbone_file(path: Path, name: str = NAME, seed: int = 0, **kwargs: Any) -> Path:
    """Weights near timm's initial ones and nowhere on them, without a classifier."""
    torch.manual_seed(seed)
    state = timm.create_model(name, num_classes=0, **kwargs).state_dict()
    save_file({k: v + 0.1 * torch.rand_like(v[:1]) if v.is_floating_point() else v for k, v in state.items()}, path)
    return path


def two_models(path: Path) -> None:
    """One file with a teacher of `KWARGS` under a. and another under b."""
    parts = {name: load_file(backbone_file(path, seed=seed, **KWARGS)) for name, seed in (("a", 2), ("b", 3))}
    save_file({f"{name}.{key}": value for name, state in parts.items() for key, value in state.items()}, path)


def fitted_on(
    root: Path, out: str, name: str = NAME, kwargs: dict[str, Any] = KWARGS, **options: Any
) -> dict[str, Any]:
    """`fit_head` of root/w.safetensors on the images in root."""
    spec = Model(model=name, weights=str(root / "w.safetensors"), kwargs=kwargs, image_size=options.pop("size", 48))
    sources = {"train": str(root / "train"), "val": str(options.pop("val", root / "val"))}
    read = {key: options.pop(key) for key in ("limit", "on_bad_image", "max_bad") if key in options}
    data = Data.model_validate(sources | read | {"seed": 0})
    return fit_head(spec, data, root / out, CPU, Console(file=io.StringIO()), cache=root / "cache", **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A folder with train/, val/, w.safetensors and head/, fitted on them; not to be changed."""
    root = tmp_path_factory.mktemp("head")
    write_images(root / "train", per_class=8)
    write_images(root / "val", per_class=4, seed=1)
    backbone_file(root / "w.safetensors", **KWARGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_solver, "STRENGTHS", (1.0,))
        fitted_on(root, "head")
    return root


@pytest.fixture
def own(fitted: Path, tmp_path: Path) -> Path:
    """A copy of `fitted` to be changed."""
    return Path(shutil.copytree(fitted, tmp_path / "own"))


# ---------------------------------------------------------------- the solver


def by_scipy(x: np.ndarray, y: np.ndarray, classes: int, strength: float) -> np.ndarray:
    """Logits (N, C), each row's mean 0, of the same problem, written anew in NumPy and solved by BFGS."""
    z = (x - x.mean(0)) / x.std(0)
    truth = np.eye(classes)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[:-classes].reshape(classes, -1), flat[-classes:]
        logits = z @ w.T + b
        log_sum = np.log(np.exp(logits).sum(1, keepdims=True))
        error = np.exp(logits - log_sum) - truth
        slope = np.concatenate([(error.T @ z + strength * w).ravel(), error.sum(0)])
        return -((logits - log_sum) * truth).sum() + strength / 2 * (w**2).sum(), slope

    flat = minimize(loss, np.zeros(classes * (x.shape[1] + 1)), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    logits = z @ flat[:-classes].reshape(classes, -1).T + flat[-classes:]
    return logits - logits.mean(1, keepdims=True)


ZERO = torch.zeros(3, 5, dtype=torch.float64)


def blobs(n: int = 60, width: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return (x + 0.7 * torch.nn.functional.one_hot(y, width)) * torch.logspace(-2, 2, width) + 5, y


@pytest.mark.parametrize("strength", [0.3, 3.0, 1000.0])
def test_the_solver_finds_what_scipy_finds(strength):
    x, y = blobs()
    logits = fit(x, y, 3, strength)(x)
    wanted = by_scipy(x.numpy(), y.numpy(), 3, strength)
    assert np.abs((logits - logits.mean(1, keepdim=True)).numpy() - wanted).max() < 1e-5


def test_with_fewer_images_than_features_the_solver_finds_what_scipy_finds():
    x, y = blobs(n=12, width=20)
    linear = fit(x, y, 3, 2.0)
    wanted = by_scipy(x.numpy(), y.numpy(), 3, 2.0)
    logits = linear(x)
    assert np.abs((logits - logits.mean(1, keepdim=True)).numpy() - wanted).max() < 1e-5
    # and no weight is off the axes that the twelve images span: the whole gradient is zero
    z, weight = (x - x.mean(0)) / x.std(0, correction=0), linear.weight * x.std(0, correction=0)
    slope = (logits.softmax(1) - torch.nn.functional.one_hot(y, 3)).T @ z + 2.0 * weight
    assert slope.abs().max() < 1e-5


def test_a_start_elsewhere_ends_in_the_same_place():
    x, y = blobs()
    cold, warm = fit(x, y, 3, 1.0), fit(x, y, 3, 1.0, start=fit(x, y, 3, 100.0))
    assert (cold(x).softmax(1) - warm(x).softmax(1)).abs().max() < 1e-6


def test_a_feature_that_never_changes_is_harmless_and_one_that_is_not_finite_is_told():
    x, y = blobs()
    flat = torch.cat([x, torch.full((60, 1), 7.0)], 1)
    assert (fit(flat, y, 3, 1.0)(flat) - fit(x, y, 3, 1.0)(x)).abs().max() < 1e-5
    x[3, 1] = math.nan
    with pytest.raises(UserError, match="not finite"):
        fit(x, y, 3, 1.0)


def test_parts_are_disjoint_even_and_leave_one_image_of_each_class():
    targets = [0] * 11 + [1] * 11 + [2] * 3 + [3]
    parts = held_out_parts(targets, seed=1)
    held = [i for part in parts for i in part]
    assert len(held) == len(set(held)) and sorted(targets[i] for i in held) == [0] * 10 + [1] * 10 + [2] * 2
    assert [sum(targets[i] < 2 for i in part) for part in parts] == [4] * 5
    assert held_out_parts(targets, seed=1) == parts != held_out_parts(targets, seed=2)
    assert held_out_parts([0, 1, 2], seed=0) == []


def test_the_strength_is_the_one_with_the_least_held_out_loss(monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (1000.0, 10.0, 0.1))
    x, y = blobs(n=200)
    choice = choose(x, y, 3, seed=0)
    assert choice.strength == min(choice.tried, key=lambda row: row["nll"])["strength"]
    assert choice.held_out["before"]["nll"] == min(row["nll"] for row in choice.tried)
    assert choice.held_out["after"]["nll"] <= choice.held_out["before"]["nll"]
    unchosen = choose(x[:3], torch.arange(3), 3, seed=0)
    assert (unchosen.strength, unchosen.temperature, unchosen.held_out) == (head_solver.UNCHOSEN, 1.0, {})


def test_above_a_number_of_images_one_part_is_held_out(monkeypatch):
    x, y = blobs(n=100)
    monkeypatch.setattr(head_solver, "CROSS_VALIDATED", 99)
    parts = held_out_parts(y.tolist(), seed=0)
    assert choose(x, y, 3, seed=0).held_out["after"]["images"] == len(parts[0])


def test_a_temperature_needs_a_wrong_image_and_its_end_is_told():
    x, y = blobs()
    x = 100 * torch.nn.functional.one_hot(y, 3).double()
    right = choose(x, y, 3, seed=0)
    assert right.held_out["after"]["top1"] == 100 and right.temperature == 1.0
    assert "the temperature cannot be chosen and stays 1" in head_page.warnings(right)[-1]
    senseless = replace(choose(*blobs(), 3, seed=0), temperature=best_temperature(-x, y))
    assert "the temperature is at the end of the range tried, 0.05 to 20" in head_page.warnings(senseless)[-1]
    assert not any("temperature" in line for line in head_page.warnings(replace(senseless, temperature=2.0)))


def test_the_temperature_is_the_best_of_a_grid_and_goes_with_the_scale():
    x, y = blobs()
    logits = 4 * fit(x, y, 3, 1.0)(x)
    found = best_temperature(logits, y)
    grid = [math.exp(k / 100) for k in range(-200, 300)]
    best = min(grid, key=lambda t: torch.nn.functional.cross_entropy(logits / t, y).item())
    assert found == pytest.approx(best, rel=0.01) and best_temperature(3 * logits, y) == pytest.approx(
        3 * found, rel=1e-4
    )


def test_calibration_error_by_hand():
    # bins are 1/15 wide: 0.61 and 0.66 share one (0.6 to 0.667), 0.95 and 1.0 another (0.933 to 1); 0.3 is alone
    confidence = torch.tensor([0.61, 0.66, 0.95, 1.0, 0.3], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, False])
    by_hand = 2 / 5 * abs(0.5 - 0.635) + 2 / 5 * abs(1 - 0.975) + 1 / 5 * abs(0 - 0.3)
    assert calibration_error(confidence, right) == pytest.approx(by_hand, abs=1e-12)


def test_scores_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    found = scores(logits, torch.tensor([0, 1]))
    assert found["top1"] == 50 and found["top5"] == 100 and found["images"] == 2
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    assert found["ece"] == pytest.approx(100 * (abs(1 - 0.7) + abs(0 - 0.5)) / 2)


# ---------------------------------------------------------------- what it sees, what it keeps


def test_validation_images_choose_nothing(own, monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (100.0, 10.0))
    seen = []
    monkeypatch.setattr(head, "choose", lambda x, y, *rest: seen.append((x, y)) or choose(x, y, *rest))
    first = fitted_on(own, "first", limit=12)
    for name, other in (("ant", "cat"), ("cat", "bee")):  # validation labels that would call for another choice
        (own / "planted" / name).mkdir(parents=True)
        for file in (own / "val" / other).iterdir():
            shutil.copy(file, own / "planted" / name)
    shutil.copytree(own / "val" / "ant", own / "planted" / "bee")
    second = fitted_on(own, "second", limit=12, val=own / "planted")
    for key in ("strength", "temperature", "tried", "held_out", "head_sha256"):
        assert first[key] == second[key]
    assert first["validation"] != second["validation"]
    # and the twelve images that it was given are the twelve labelled ones
    split = head.open_split(Data(train=str(own / "train"), val=str(own / "val"), limit=12))
    assert [len(x) for x, _ in seen] == [12, 12]
    assert seen[0][1].tolist() == [split.train.targets[i] for i in split.train_indices]
    assert first["held_out"]["after"]["images"] == 12 - 3


def test_features_are_computed_once_and_again_when_anything_changes(own, monkeypatch):
    computed = []
    give = Teacher.pooled
    monkeypatch.setattr(Teacher, "pooled", lambda self, images: computed.append(len(images)) or give(self, images))

    def images_computed(out: str, **options: Any) -> int:
        computed.clear()
        fitted_on(own, out, **options)
        return sum(computed) - 8  # eight to compare the finished model with

    monkeypatch.setattr(head, "choose", lambda *_: head_solver.Choice(100.0, 1.0, {}, []))  # quick
    train, val = 24, 12
    shutil.rmtree(own / "cache")
    assert images_computed("a", limit=12) == 12 + val
    assert images_computed("b") == 12  # those that are missing
    assert images_computed("c") == 0
    for file in (own / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert images_computed("d") == train + val  # of damaged files
    assert images_computed("e", crop_pct=0.5) == train + val
    assert images_computed("f", size=64) == train + val
    backbone_file(own / "w.safetensors", seed=1, **KWARGS)
    assert images_computed("g") == train + val
    shutil.rmtree(own / "val")
    write_images(own / "val", per_class=4, seed=2)
    assert images_computed("h") == val  # other images under the same names
    flipped = Image.open(own / "train" / "cat" / "5.png").transpose(Image.Transpose.ROTATE_180)
    flipped.save(own / "train" / "cat" / "5.png")  # not one of those whose pixels are compared
    assert images_computed("i") == train


MODELS = {
    "test_vit": {"depth": 2},
    "test_resnet": {},
    "test_convnext": {},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 3},  # two classifiers
    "resnetv2_18": {
        "layers": [1, 1, 1, 1],
        "channels": [16, 16, 16, 32],
        "stem_chs": 8,
    },  # its classifier is a convolution
    "vit_base_patch16_siglip_224": {"embed_dim": 24, "depth": 2, "num_heads": 3},  # pools by attention
    "eva02_tiny_patch14_224": {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3},  # rotary positions
    "hiera_tiny_224": {"embed_dim": 24, "stages": [1, 1, 1, 1]},  # the norm of its head acts after pooling
}
OF_ONE_SIZE = ("vit", "deit", "eva02", "hiera")


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gives_the_head_s_logits_by_itself(own, name, monkeypatch):
    kwargs, side = MODELS[name], 64 if "hiera" in name else 48
    size = {"img_size": side} if any(word in name for word in OF_ONE_SIZE) else {}
    backbone_file(own / "w.safetensors", name, **kwargs, **size)
    found = []
    monkeypatch.setattr(head, "Linear", lambda w, b: found.append(head_solver.Linear(w, b)) or found[-1])
    card = fitted_on(own, "new", name, kwargs, size=side, limit=12)
    spec = Model(model=name, weights=str(own / "w.safetensors"), kwargs=kwargs, head=str(own / "new"))
    model, loaded = build_model(spec, channels=3, image_size=(side, side), classes=3, where="teacher")
    bare, _ = build_model(
        spec.model_copy(update={"head": None}), channels=3, image_size=(side, side), classes=3, where="teacher"
    )
    images = torch.randn(5, 3, side, side)
    with torch.no_grad():
        wanted = found[0](pooled(bare.eval(), images))
        assert (model.eval()(images) - wanted).abs().max() < 1e-4 * (1 + wanted.abs().max())
    assert bare.num_classes == 0 and model.num_classes == 3
    assert loaded.kwargs["num_classes"] == 3 and card["largest_logit_difference"] < 1e-3
    assert loaded.head == f"head {own / 'new'} (sha256 {card['head_sha256'][:12]}) for 3 classes, fitted on 12 labels"


def test_what_is_written(fitted):
    card = json.loads((fitted / "head" / "head.json").read_text())
    tensors = load_file(fitted / "head" / "head.safetensors")
    assert sorted(p.name for p in (fitted / "head").iterdir()) == ["head.json", "head.safetensors"]
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {"weight": (3, 64), "bias": (3,)}
    assert card["model"] == NAME and card["kwargs"] == KWARGS and card["classes"] == ["ant", "bee", "cat"]
    assert card["labels"] == 24 and len(card["sha256"]) == 64 and card["image_size"] == [48, 48]
    assert card["validation"]["after"]["top1"] > 90  # colours are easy
    assert card["held_out"]["after"]["images"] == 21


def test_draws_and_their_interval(own):
    card = fitted_on(own, "draws", limit=6, draws=3, size=32)
    assert card["draws"]["seeds"] == [0, 1, 2] and len(card["draws"]["top1"]) == 3
    assert card["draws"]["mean"] == pytest.approx(sum(card["draws"]["top1"]) / 3)
    spread = np.std(card["draws"]["top1"], ddof=1)
    assert card["draws"]["half_width_95"] == pytest.approx(4.302652729911275 * spread / math.sqrt(3))  # t, 2 d.f.
    assert card["head_sha256"] == fitted_on(own, "first", limit=6, size=32)["head_sha256"]  # the first draw's is kept


def test_one_label_of_each_class(own):
    card = fitted_on(own, "one", limit=3)
    assert (
        card["held_out"] == {}
        and card["strength"] == head_solver.UNCHOSEN
        and card["validation"]["after"]["images"] == 12
    )


# ---------------------------------------------------------------- files without a classifier


def test_a_backbone_s_file_at_another_size_is_as_timm_loads_it(tmp_path):
    name, kwargs = DINO
    file = backbone_file(tmp_path / "w.safetensors", name, img_size=70, **kwargs)
    overlay = {"file": str(file), "num_classes": 0}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(42, 42), **kwargs)
    spec = Model(model=name, weights=str(file), kwargs=kwargs)
    for classes in (None, 3):
        ours, loaded = build_model(spec, channels=3, image_size=(42, 42), classes=classes, where="teacher")
        assert loaded.matched == loaded.total and loaded.head is None and ours.num_classes == 0
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    student, loaded = build_model(spec, channels=3, image_size=(42, 42), classes=3, where="student")
    assert student.num_classes == 3 and loaded.matched == loaded.total - 2
    assert loaded.head == "new head for 3 classes (the file has none)"


# ---------------------------------------------------------------- refusals


def teacher_with(root: Path, size: int = 48, classes: int | None = 3, **changes: Any) -> Any:
    values = {"model": NAME, "weights": str(root / "w.safetensors"), "kwargs": KWARGS, "head": str(root / "head")}
    spec = Model.model_validate(values | changes)
    return build_model(spec, channels=3, image_size=(size, size), classes=classes, where="teacher")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model": "test_vit2"}, "the backbone test_vit, but this recipe has test_vit2.\nSet teacher.model=test_vit."),
        ({"kwargs": {"depth": 3}}, r"kwargs \{'depth': 2\}, but this recipe has \{'depth': 3\}"),
        ({"kwargs": {"depth": 2, "num_classes": 9}}, r"but this recipe has \{'depth': 2, 'num_classes': 9\}"),
        ({"size": 64}, r"images of \[48, 48\], but this recipe has \[64, 64\].\nSet teacher.image_size=\[48, 48\]"),
        ({"classes": 4}, "a number of classes of 3, but this recipe has 4"),
        ({"mean": (0.1, 0.1, 0.1)}, "mean and std"),
        ({"weights": "random"}, "a head needs its backbone's weights; set teacher.weights="),
        ({"head": "nowhere"}, "nowhere has no head.safetensors with its head.json; create them with `scalekd head`"),
    ],
)
def test_another_backbone_or_input_is_refused(fitted, changes, told):
    with pytest.raises(UserError, match=rf"^teacher\.head: .*{told}"):
        teacher_with(fitted, **changes)


def test_other_weights_are_refused(own):
    before = json.loads((own / "head" / "head.json").read_text())["sha256"]
    backbone_file(own / "w.safetensors", seed=1, **KWARGS)
    with pytest.raises(
        UserError, match=rf"was fitted for weights with sha256 {before[:12]} .*, but this recipe has (?!{before[:12]})"
    ):
        teacher_with(own)


@pytest.mark.parametrize("harm", ["another file", "cut off", "no json", "a field less", "other shapes"])
def test_a_damaged_head_is_refused(own, harm):
    file, card_file = own / "head" / "head.safetensors", own / "head" / "head.json"
    card = json.loads(card_file.read_text())
    if harm == "another file":
        save_file({"weight": torch.zeros(3, 64), "bias": torch.zeros(3)}, file)
    elif harm == "cut off":
        file.write_bytes(file.read_bytes()[:50])
    elif harm == "no json":
        card_file.write_text("{")
    elif harm == "a field less":
        card_file.write_text(json.dumps({k: v for k, v in card.items() if k != "sha256"}))
    else:
        card_file.write_text(json.dumps(card | {"classes": ["ant", "bee"]}))
    told = {
        "no json": "head.json is damaged: .*Invalid JSON",
        "a field less": "head.json is damaged: sha256 is missing;",
    }
    with pytest.raises(UserError, match=rf"^teacher\.head: .*{told.get(harm, '')}"):
        teacher_with(own)


def test_a_student_takes_no_head(tiny_recipe):
    tiny_recipe["student"]["head"] = "x"
    with pytest.raises(UserError, match=r"student\.head: has no effect here; it is an option of teachers"):
        check_config(tiny_recipe, "test")


@pytest.mark.parametrize(
    "options, told",
    [
        (["--weights", "random"], "--weights: a head needs a trained backbone"),
        (["--weights", "nowhere.pt"], "--weights: no file nowhere.pt"),
        (["--limit", 2], "--data: no labelled images of 1 of the 3 classes: .*; --limit 2 is fewer than the 3 classes"),
        (["--draws", 0], "`--draws` is 0 and must be 1 or more"),
        (["--limit", -1], "--limit: Input should be greater than 0"),
        (["--image-size", "wide"], "--image-size: pixels, such as 224"),
        (["--mean", "[0.5]"], "--mean has 1 values, but --channels is 3"),
        (["--weights", "two.safetensors"], r"choose one with --prefix=(a|b)\. or --prefix=(a|b)\."),
        (
            ["--weights", "shuffled.safetensors"],
            "--weights: shuffled.*: 0% of .*without structure: .* only a few steps",
        ),
        (["--out", "train"], "train is not empty; choose another folder with `--out`"),
    ],
)
def test_mistakes_on_the_command_line(cli, fitted, monkeypatch, options, told):
    monkeypatch.chdir(fitted)
    two_models(fitted / "two.safetensors")
    shuffled = {k: torch.randn(v.shape) for k, v in load_file("w.safetensors").items()}
    save_file(shuffled, "shuffled.safetensors")
    given = ["--data", fitted, "--weights", "w.safetensors", "--kwargs", "{depth: 2}", "--image-size", 48, "--out", "o"]
    shown = cli("head", NAME, *given, *options)
    assert shown.code == 2 and not Path("o").exists()
    assert re.search(told, shown.err), shown.err


# ---------------------------------------------------------------- from the command line to a student


def test_a_head_is_fitted_and_a_student_learns_from_it(cli, recipe_file, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone_file(tmp_path / "w.safetensors", **{"depth": 4})
    given = ["--weights", "w.safetensors", "--kwargs", "{depth: 4}", "--image-size", 48, "--crop-pct", 0.875]
    shown = cli("head", NAME, "--data", image_folder, *given, "--out", "my-head", "--val-limit", 9)
    assert shown.code == 0, shown.err
    assert "24 labels of 3 classes, 64 features; strength" in shown.out and "validation, after temperature" in shown.out
    assert json.loads(Path("my-head/head.json").read_text())["validation"]["after"]["images"] == 9
    assert "teacher.head=my-head teacher.weights=w.safetensors teacher.image_size=48" in shown.out
    assert "augment.crop_pct=0.875 augment.interpolation=" in shown.out

    use = ["teacher.weights=w.safetensors", "teacher.head=my-head", "losses={ce: {}, kd: {}}"]
    shown = cli("train", recipe_file, *use, "--out", "run")
    told = " ".join(shown.out.split())
    assert shown.code == 0, shown.err
    assert (
        "tensors from w.safetensors" in told
        and "head my-head (sha256" in told
        and "data 3, student 3, teacher 3" in told
    )
    assert (
        "100.0 % on 12 validation images (known: 100.0 %)" in told and "its head was fitted with crop_pct" not in told
    )
    assert all(event["loss.kd"] > 0 for event in read_log(Path("run")) if "loss.kd" in event)
    provenance = json.loads(Path("run/provenance.json").read_text())
    assert provenance["weights"]["teacher"]["head"].startswith("head my-head (sha256")

    shown = cli("train", recipe_file, *use, "augment.crop_pct=0.5", "--dry-run", "--out", "other")
    assert "its head was fitted with crop_pct 0.875, bicubic (set them in `augment`, for both" in " ".join(
        shown.out.split()
    )


def test_classes_in_another_order_fail_the_pre_flight(cli, recipe_file, image_folder, own, monkeypatch):
    for part in ("train", "val"):
        (image_folder / part / "bee").rename(image_folder / part / "dog")
    changes = {"weights": own / "w.safetensors", "head": own / "head", "kwargs": "{depth: 2}"}
    use = [f"teacher.{key}={value}" for key, value in changes.items()]
    shown = cli("train", recipe_file, "--dry-run", *use, "teacher.cuts=null", "losses={ce: {}, kd: {}}")
    assert shown.code == 2
    assert "was fitted for other classes than the data's 3: bee there, cat here" in shown.err


def test_the_run_is_built_with_the_head(tiny_recipe, own):
    tiny_recipe["teacher"] |= {"weights": str(own / "w.safetensors"), "head": str(own / "head"), "kwargs": KWARGS}
    tiny_recipe["losses"] = {"kd": {}}
    run = build(check_config(tiny_recipe, "test"), CPU)
    assert run.distiller.teacher_view is not None
    weight = run.distiller.teacher_view.model.get_classifier().weight
    assert torch.equal(weight, load_file(own / "head" / "head.safetensors")["weight"])


def test_the_printed_options_can_be_copied(cli, own, recipe_file, monkeypatch):
    monkeypatch.chdir(own)
    two_models(own / "two of them.safetensors")
    given = ["--weights", "two of them.safetensors", "--prefix", "a.", "--kwargs", "{depth: 2}", "--image-size", 48]
    given += ["--mean", "[124, 116, 104]", "--limit", 6, "--out", "its head"]
    shown = cli("head", NAME, "--data", own, *given)
    assert shown.code == 0, shown.err
    assert (
        "std [0.5, 0.5, 0.5]: mean and std must be for pixels in [0, 1]; divide values for pixels up to 255 by 255"
        in shown.out
    )
    words = shlex.split(shown.out.partition("Use it in `scalekd train` with: ")[2].splitlines()[0])
    args = parse(["train", str(recipe_file), *words])
    spec = load_recipe(args.recipe, [*recipe_overrides(args), "teacher.cuts=null"]).teacher
    build_with = {"channels": 3, "image_size": (48, 48), "classes": 3, "where": "teacher"}
    assert build_model(spec, **build_with)[1].head.startswith("head its head (sha256")
    with pytest.raises(
        UserError, match=r"was fitted for weights with the prefix `a.`, but this recipe has `b.`.\nSet teacher.prefix"
    ):
        build_model(spec.model_copy(update={"prefix": "b."}), **build_with)


# ---------------------------------------------------------------- whether anyone trained the weights


def test_matrices_without_structure_are_refused_but_of_a_run(tmp_path):
    file = tmp_path / "w.safetensors"
    state = {k: torch.randn(v.shape) for k, v in timm.create_model(NAME, img_size=48, **KWARGS).state_dict().items()}
    save_file(state, file)

    def found() -> Any:
        spec = Model(model=NAME, weights=str(file), kwargs=KWARGS)
        return trained(build_model(spec, channels=3, image_size=(48, 48), classes=None, where="teacher")[1])

    assert found().status == "fail" and "100% of the weight matrices without structure" in found().figures
    card = {"model": NAME, "kwargs": KWARGS, "classes": ["ant"], "image_size": [48, 48], "mean": [0.5], "std": [0.5]}
    card |= {"interpolation": "bicubic", "crop_pct": 1.0, "sha256": sha256_of(file)}
    file.with_suffix(".json").write_text(json.dumps(card | {"sha256": None}))
    assert found().status == "fail"
    file.with_suffix(".json").write_text(json.dumps(card))
    assert found().status == "warn" and "after a few steps of training" in found().meaning
    save_file(timm.create_model(NAME, img_size=48, **KWARGS).state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps(card | {"sha256": sha256_of(file)}))
    assert found().status == "fail" and "never trained" in found().meaning  # biases at initial values


# ---------------------------------------------------------------- fitted by the run itself


def test_a_run_fits_its_head_first_and_once(cli, recipe_file, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone_file(tmp_path / "w.safetensors", depth=4)
    asked = ["teacher.weights=w.safetensors", "teacher.head=fit", "losses={ce: {}, kd: {}}", "data.unlabelled=rest"]
    asked += ["data.limit=12", "augment.crop_pct=0.9", "augment.interpolation=bilinear", "train.epochs=1"]
    shown = cli("train", recipe_file, *asked, "--out", "run", "--dry-run")
    told = " ".join(shown.out.split())
    assert shown.code == 0, shown.err
    assert "12 labels of 3 classes" in told and "(known: 100.0 %)" in told and "its head was fitted with" not in told
    assert not Path("run").exists() and not Path("runs").exists()

    (tmp_path / "run" / "head").mkdir(parents=True)
    (tmp_path / "run" / "head" / "head.json").write_text("of a start that came to nothing")
    shown = cli("train", recipe_file, *asked, "--out", "run", "--no-preflight")
    assert shown.code == 0, shown.err
    card = json.loads(Path("run/head/head.json").read_text())
    assert (card["labels"], card["crop_pct"], card["interpolation"], card["image_size"]) == (
        12,
        0.9,
        "bilinear",
        [48, 48],
    )
    assert load_recipe("run/recipe.yaml").teacher.head == "run/head"
    assert "head run/head (sha256" in json.loads(Path("run/provenance.json").read_text())["weights"]["teacher"]["head"]

    Path("run/summary.json").unlink()  # as if it had been stopped just before its end
    monkeypatch.setattr(run_head, "fit_head", None)
    assert cli("train", recipe_file, *asked, "--out", "run", "--no-preflight").code == 0
    assert json.loads(Path("run/head/head.json").read_text()) == card


def test_heads_of_several_teachers_are_in_folders_of_their_own(tiny_recipe, tmp_path):
    vit = tiny_recipe.pop("teacher")
    tiny_recipe["teachers"] = {"a": vit | {"head": "fit"}, "b": vit | {"head": "runs/b"}}
    config = check_config(tiny_recipe | {"losses": {"kd": {}}}, "test")
    run = tmp_path / "run"
    named = run_head.with_heads(config, run)
    assert {k: spec.head for k, spec in named.teachers.items()} == {"a": str(run / "head-a"), "b": "runs/b"}
    (run / "head-a").mkdir(parents=True)
    open_folder(run, named, run_head.heads_of(named))  # after a start that ended when its head was fitted
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_folder(run, config, run_head.heads_of(config))
    with pytest.raises(UserError, match=r"^teachers\.a\.head: `fit` works only in `scalekd train`"):
        build(config, CPU)


def test_unreadable_images_are_left_out(own):
    """With `data.on_bad_image: skip`, in a run too: the head is that of the other images."""
    images = sorted(own.glob("train/*/*.png"))
    first = images[0]
    first.write_bytes(b"")
    with pytest.raises(UserError, match=r"ant/0\.png: it is empty"):
        fitted_on(own, "new")
    card = fitted_on(own, "new", on_bad_image="skip", max_bad=0.5)
    assert fitted_on(own, "again", on_bad_image="skip", max_bad=0.5)["head_sha256"] == card["head_sha256"]  # cached
    first.unlink()
    assert fitted_on(own, "fewer")["head_sha256"] == card["head_sha256"]
    for image in images[:8]:
        image.write_bytes(b"")
    with pytest.raises(UserError, match=r"^none of the 8 training images of the class ant can be"):
        fitted_on(own, "none", on_bad_image="skip", max_bad=0.5)


def test_a_batch_without_a_readable_image_is_left_out(own, monkeypatch):
    monkeypatch.setattr(head_features, "BATCH", 2)
    monkeypatch.setattr(head_features, "CHUNK", 4)
    images = sorted(own.glob("train/*/*.png"))
    for image in images[2:5]:  # the second batch, and the first image of the third
        image.write_bytes(b"")
    card = fitted_on(own, "new", on_bad_image="skip", max_bad=0.5)
    for image in images[2:5]:
        image.unlink()
    assert fitted_on(own, "fewer")["head_sha256"] == card["head_sha256"]


def test_a_head_needs_labels(tiny_recipe, image_folder):
    data = {"train": None, "unlabelled": str(image_folder / "train")}
    no_labels = tiny_recipe | {"data": tiny_recipe["data"] | data, "losses": {"kd": {}}}
    no_labels["teacher"] = tiny_recipe["teacher"] | {"head": "fit"}
    with pytest.raises(UserError, match=r"teacher\.head: fit needs labelled images; set data\.train"):
        check_config(no_labels, "test")


def test_the_search_ends_when_the_held_out_loss_rises(monkeypatch):
    monkeypatch.setattr(head_solver, "STRENGTHS", (1000.0, 100.0, 10.0, 1.0, 0.1))
    losses, fits = iter([3.0, 2.0, 2.05, 1.0, 1.0]), []
    monkeypatch.setattr(head_solver, "fit", lambda *args: fits.append(args[3]) or head_solver.Linear(ZERO, ZERO[:, 0]))
    monkeypatch.setattr(head_solver, "scores", lambda *_: {"nll": next(losses, 9.0), "top1": 50.0})
    x, y = blobs()
    choice = choose(x, y, 3, seed=0)
    assert [row["nll"] for row in choice.tried] == [3.0, 2.0, 2.05]
    assert choice.strength == head_solver.STRENGTHS[1] and len(fits) == 3 * head_solver.PARTS


def test_the_search_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(head_solver, "TELL_EVERY", 0.0)
    monkeypatch.setattr(head_solver, "STRENGTHS", (1000.0, 10.0))
    lines: list[str] = []
    choose(*blobs(), 3, 0, lines.append)
    assert "(1 of at most 2), fit 1 of 5" in lines[0] and "best so far" in lines[-1]


def test_a_damaged_head_gives_a_message_and_damaged_features_are_computed_again(own):
    spec = Model(model=NAME, weights=str(own / "w.safetensors"), kwargs=KWARGS, head=str(own / "head"))
    for name, content in some_of(own / "head", ["head.json", "head.safetensors"], 5):
        before = (own / "head" / name).read_bytes()
        (own / "head" / name).write_bytes(content)
        try:
            build_with_head(spec, channels=3, image_size=(48, 48), classes=3, where="teacher")
        except UserError as error:
            assert str(error).startswith("teacher")
        except Exception as error:
            raise AssertionError(f"{name}: {content[:3000]!r}") from error
        (own / "head" / name).write_bytes(before)
    whole = fitted_on(own, "whole")
    for file in (own / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert fitted_on(own, "again")["validation"] == whole["validation"]
