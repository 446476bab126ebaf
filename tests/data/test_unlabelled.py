"""Images without labels: their share of a batch, which losses use them, and validation without a classifier."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from small_images import write_images
from torch.nn import functional as F
from whole_runs import changed

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data.batches import train_batches
from scalekd.data.options import Data
from scalekd.data.samplers import Mix, TrainSampler
from scalekd.data.sources.open import open_unlabelled
from scalekd.data.sources.unlabelled import UNLABELLED
from scalekd.data.split import open_split
from scalekd.data.transforms import make_mixup, mixed
from scalekd.distill.build import build
from scalekd.distill.distiller import Distiller
from scalekd.distill.evaluate import evaluate_features
from scalekd.models.student_file import load_student

CPU = torch.device("cpu")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """20 images in two levels of folders that are not classes."""
    write_images(tmp_path / "pool" / "deep", per_class=6, seed=2)
    for i in range(2):
        shutil.copy(tmp_path / "pool" / "deep" / "ant" / f"{i}.png", tmp_path / "pool" / f"top{i}.png")
    return tmp_path / "pool"


@pytest.fixture
def mixed_recipe(tiny_recipe: dict[str, Any], pool: Path) -> dict[str, Any]:
    return changed(
        tiny_recipe,
        data={"limit": 6, "unlabelled": str(pool), "unlabelled_share": 0.75},
        losses={"ce": {}, "fd": {}},
        train={"batch_size": 8},
    )


@pytest.fixture
def only_images(tiny_recipe: dict[str, Any], pool: Path) -> dict[str, Any]:
    recipe = changed(tiny_recipe, data={"unlabelled": str(pool)}, losses={"fd": {}})
    del recipe["data"]["train"]
    return recipe


# ---------------------------------------------------------------- sampling


def test_every_micro_batch_has_its_labelled_images_first() -> None:
    batches = [TrainSampler(30, 8, 0, 20, accumulate=2, rank=r, world=2, mix=Mix(6, 4)) for r in (0, 1)]
    for of_rank in map(list, batches):
        assert len(of_rank) == 40
        assert all([index < 6 for _, index in keys] == [True, False] for keys in of_rank)


def test_both_kinds_are_gone_through_evenly_and_never_twice_with_the_same_randomness() -> None:
    keys = [key for batch in TrainSampler(30, 8, 0, 30, mix=Mix(6, 2)) for key in batch]
    assert Counter(i for _, i in keys if i < 6) == dict.fromkeys(range(6), 10)  # 60 places, 6 images
    assert set(Counter(i for _, i in keys if i >= 6).values()) == {7, 8}  # 180 places, 24 images
    assert len(set(keys)) == len(keys)


def test_a_run_starts_anywhere_with_the_same_keys_on_any_number_of_processes() -> None:
    whole = list(TrainSampler(30, 8, 5, 12, mix=Mix(6, 4)))
    assert list(TrainSampler(30, 8, 5, 12, 7, mix=Mix(6, 4))) == whole[7:]
    parts = [list(TrainSampler(30, 8, 5, 12, rank=r, world=2, mix=Mix(6, 4))) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(keys) for keys in whole]


def test_fewer_labels_than_places_are_repeated_within_a_batch() -> None:
    (keys,) = TrainSampler(23, 16, 0, 1, mix=Mix(3, 8))
    assert sorted(Counter(i for _, i in keys[:8]).values()) == [2, 3, 3]


# ---------------------------------------------------------------- sources


def test_all_images_below_a_folder_count_and_none_has_a_label(pool: Path) -> None:
    source = open_unlabelled(str(pool), "data.unlabelled")
    assert len(source) == 20 and set(source.targets) == {UNLABELLED}
    image, target = source[0]
    assert image.size == (40, 40) and target == UNLABELLED


def test_archives_and_shards_need_no_labels(pool: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, file in enumerate(sorted(pool.rglob("*.png"))[:4]):
            tar.add(file, arcname=f"{i}.png")
        tar.add(sorted(pool.rglob("*.png"))[5], arcname="0.mask.png")
    assert len(open_unlabelled(f"tar:{tmp_path}/a.tar", "data.unlabelled")) == 5
    shards = open_unlabelled(f"wds:{tmp_path}/a.tar", "data.unlabelled")
    assert len(shards) == 4 and shards[3][1] == UNLABELLED
    assert shards.where(3).startswith("3.png in ")


def test_labels_of_a_labelled_source_are_ignored() -> None:
    source = open_unlabelled("fashion-mnist:train", "data.unlabelled")
    assert len(source) == 10_000 and source[7][1] == UNLABELLED and set(source.targets) == {UNLABELLED}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "data.unlabelled: no folder nowhere"),
        ("", "data.unlabelled: it is empty"),
        ("tar:nowhere.tar", "cannot open nowhere.tar"),
        ("https://example.org/a.tar", "is a stream"),
    ],
)
def test_a_missing_source_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_unlabelled(text, "data.unlabelled")


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no images"):
        open_unlabelled(str(tmp_path), "data.unlabelled")


# ---------------------------------------------------------------- the split


def test_rest_is_what_the_limit_leaves_out(image_folder: Path) -> None:
    split = open_split(Data(train=str(image_folder / "train"), limit=6, unlabelled="rest", val_fraction=0.25))
    names = [split.train.where(i) for i in split.train_indices]
    labelled, rest, held = names[:6], names[6:], [split.val.where(i) for i in split.val_indices]
    assert split.labelled == 6 and len(held) == 6 and len(rest) == 12
    assert sorted([*labelled, *rest, *held]) == sorted(split.val.where(i) for i in range(24))
    assert [split.train[i][1] for i in split.train_indices[6:]] == [UNLABELLED] * 12


def test_a_limit_chooses_unlabelled_images_by_the_seed(image_folder: Path, pool: Path) -> None:
    data = Data(train=str(image_folder / "train"), unlabelled=str(pool), unlabelled_limit=5)
    chosen = [open_split(data.model_copy(update={"seed": seed})).train_indices[-5:] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_validation_images_are_never_trained_on_without_their_labels(image_folder: Path) -> None:
    data = Data(train=str(image_folder / "train"), val=str(image_folder / "val"), unlabelled=str(image_folder))
    with pytest.raises(UserError, match=r"data.unlabelled contains 12 of the validation images, such as .*val"):
        open_split(data)
    data = Data(train=str(image_folder / "train"), unlabelled=str(image_folder / "train"))
    with pytest.raises(UserError, match=r"`data.unlabelled: rest`"):
        open_split(data)


def test_an_image_is_known_however_its_path_is_written(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(image_folder)
    monkeypatch.chdir(tmp_path)
    for unlabelled in ("images/val", "./images/../images/val", str(tmp_path / "link" / "val"), "link"):
        with pytest.raises(UserError, match=r"data.unlabelled contains 12 of the validation images"):
            open_split(Data(train=str(image_folder / "train"), val=str(image_folder / "val"), unlabelled=unlabelled))


def test_an_image_that_cannot_be_read_is_replaced_by_one_of_its_kind(
    mixed_recipe: dict[str, Any], image_folder: Path, pool: Path
) -> None:
    recipe = changed(mixed_recipe, data={"on_bad_image": "skip", "max_bad": 0.5})
    run = build(check_config(recipe, "test"), CPU)
    for i in (5, 25):  # the last with a label, whose next is without, and the last of all
        Path(run.train_images.source.where(run.train_images.indices[i])).write_bytes(b"no image")
    assert run.train_images[0, 5].target in (0, 1, 2)
    assert run.train_images[0, 25].target == UNLABELLED
    for batch in train_batches(run.train_images, run.train_sampler(), 0, pin=False):
        assert (len(batch.images), len(batch.targets)) == (8, 2)


# ---------------------------------------------------------------- losses


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    student, teacher = (timm.create_model(n, num_classes=5, img_size=64) for n in ("test_vit", "test_vit"))
    for model in (student, teacher):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return student, teacher


def test_losses_that_read_targets_see_the_labelled_images_alone_and_the_others_see_all() -> None:
    student, teacher = models()
    losses = {"ce": {}, "bce": {}, "dkd": {}, "ofa": {"stages": [4]}, "kd": {}, "fd": {}}
    both = Distiller(student, teacher, losses, image_size=(64, 64)).eval()
    images, targets = torch.rand(6, 3, 64, 64), torch.tensor([1, 4])
    terms = both(images, targets)
    of_labelled, of_all = both(images[:2], targets), both(images, torch.zeros(6, dtype=torch.int64))
    for name, value in terms.items():
        if name != "total":
            wanted = of_all if name.startswith(("kd", "fd")) else of_labelled
            torch.testing.assert_close(value, wanted[name])
    assert not torch.allclose(
        of_labelled["fd.s4"] if "fd.s4" in terms else of_labelled["fd"],
        of_all["fd"] if "fd" in of_all else of_all["fd.s4"],
    )
    torch.testing.assert_close(
        terms["ce"], F.cross_entropy(student.eval()((images[:2] - both.student_mean) / both.student_std), targets)
    )


def test_a_loss_that_needs_labels_refuses_a_batch_without() -> None:
    student, teacher = models()
    distiller = Distiller(student, teacher, {"ce": {}, "kd": {}}, image_size=(64, 64))
    with pytest.raises(UserError, match=r"losses.ce needs labels"):
        distiller(torch.rand(2, 3, 64, 64), torch.empty(0, dtype=torch.int64))


def test_mixup_mixes_each_kind_with_its_own() -> None:
    images = torch.cat([torch.zeros(4, 3, 8, 8), torch.ones(6, 3, 8, 8)])
    images[0], images[4] = 0.5, 2.0
    mixup = make_mixup(check_config(RECIPE | {"augment": {"mixup": 1.0}}, "test").augment, 3)
    assert mixup is not None
    np.random.seed(1)
    found, targets = mixed(images.clone(), torch.tensor([0, 1, 2, 0]), mixup)
    assert targets.shape == (4, 3) and torch.allclose(targets.sum(1), torch.ones(4))
    assert found[:4].max() <= 0.5 and found[4:].min() >= 1
    assert 0 < found[3].max() < 0.5 and 1 < found[9].max() < 2  # both kinds were mixed
    alone, none = mixed(images.clone(), torch.empty(0, dtype=torch.int64), mixup)
    assert len(alone) == 10 and len(none) == 0


RECIPE: dict[str, Any] = {
    "name": "a",
    "data": {"train": "x"},
    "student": {"model": "test_vit"},
    "losses": {"ce": {}},
    "train": {"epochs": 1, "batch_size": 8},
}


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"train": None}},
            "data.train: missing; set it, or set data.unlabelled to train on images without labels",
        ),
        ({"data": {"train": None, "unlabelled": "p", "val": "v"}}, "losses: ce need\\(s\\) labels"),
        ({"data": {"train": None, "unlabelled": "p"}}, "data.val: needed without data.train"),
        ({"data": {"train": None, "unlabelled": "rest", "val": "v"}}, "set data.train"),
        ({"data": {"train": None, "unlabelled": "p", "val": "v", "limit": 3}}, "data.limit: has no effect"),
        ({"data": {"unlabelled": "rest"}}, "set data.limit"),
        ({"data": {"unlabelled_limit": 3}}, "data.unlabelled_limit: has no effect"),
        ({"data": {"unlabelled_share": 0.25}}, "data.unlabelled_share: has no effect"),
        ({"data": {"unlabelled": "p"}, "augment": {"repeats": 2}}, "augment.repeats: works with labelled images only"),
    ],
)
def test_conflicting_options_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(changed(RECIPE, **changes), "test")


def test_a_student_with_a_layer_that_nothing_would_train_is_an_error(only_images: dict[str, Any]) -> None:
    recipe = changed(only_images, student={"model": "mobilenetv3_small_050"})
    with pytest.raises(UserError, match=r"the layer between mobilenetv3_small_050's last map and its classifier"):
        build(check_config(recipe, "test"), CPU)


def test_a_share_that_leaves_out_one_kind_is_an_error(mixed_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data.unlabelled_share 0.01 of 8 images"):
        build(check_config(changed(mixed_recipe, data={"unlabelled_share": 0.01}), "test"), CPU)


def test_mixup_needs_pairs_of_either_kind(mixed_recipe: dict[str, Any]) -> None:
    recipe = changed(mixed_recipe, augment={"mixup": 0.2}, data={"unlabelled_share": 0.6})  # 5 of 8
    with pytest.raises(UserError, match="even number of labelled images per process and step, not 3"):
        build(check_config(recipe, "test"), CPU)


# ---------------------------------------------------------------- runs


def test_a_run_with_both_kinds(mixed_recipe: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mixed_recipe))
    result = cli("train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert "6 labelled, 20 unlabelled; per step 2 labelled, 6 unlabelled; losses that use labels: ce" in " ".join(
        result.out.split()
    )
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    )  # 2 epochs: 20 of 6 a step, 3 times


def test_the_first_images_of_a_batch_are_those_of_the_targets(mixed_recipe: dict[str, Any]) -> None:
    run = build(check_config(mixed_recipe, "test"), CPU)
    batch = next(train_batches(run.train_images, run.train_sampler(), 0, pin=False))
    images, targets = run.inputs(batch)
    colours = {0: 0, 1: 1, 2: 2}  # ant is red, bee green, cat blue
    for image, target in zip(images, targets.tolist()):
        assert image.mean((1, 2)).argmax().item() == colours[target]


def test_a_run_of_images_alone_exports_a_backbone(
    only_images: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(only_images))
    result = cli("train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert "11-nn top-1" in result.out  # of 12 validation images
    student, card = load_student(tmp_path / "run")
    assert card["classes"] == [] and card["kwargs"]["num_classes"] == 0
    assert student(torch.rand(1, 3, *card["image_size"])).shape[1] == student.num_features
    refused = cli("evaluate", str(tmp_path / "run"), "--data", only_images["data"]["val"])
    assert refused.code == 2 and "has no classifier" in refused.err
    exported = cli("export", str(tmp_path / "run"))
    assert exported.code == 0 and "weights, nearest-neighbour top-1 " in exported.out
    assert "predicts one of" not in (tmp_path / "run" / "README.md").read_text()
    assert "validation by the nearest neighbours" in (tmp_path / "run" / "report.html").read_text()


def test_neighbours_validate_a_backbone_as_a_loop_over_images_does() -> None:
    torch.manual_seed(0)
    batches = [(torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8), torch.randint(0, 3, (7,))) for _ in range(5)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 6)).train()
    mean, std = torch.full((1, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.2)
    from scalekd.data.batches import Batch

    found = evaluate_features(model, [Batch(*b) for b in batches], mean, std, CPU)
    features = torch.cat([model((b[0] / 255 - mean) / std) for b in batches]).detach().double().numpy()
    targets = torch.cat([b[1] for b in batches]).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    hits = 0
    for i, row in enumerate(unit):
        others = [j for j in range(35) if j != i]
        nearest = sorted(others, key=lambda j: -(unit[j] @ row))[:20]
        votes = [sum(np.exp(unit[j] @ row / 0.07) for j in nearest if targets[j] == c) for c in range(3)]
        hits += int(np.argmax(votes) == targets[i])
    assert found == {"top1": pytest.approx(100 * hits / 35), "top5": 100.0, "images": 35, "neighbours": 20}
    assert model.training


def test_a_backbone_starts_from_weights_that_have_a_classifier(only_images: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(whole, tmp_path / "whole.safetensors")
    run = build(
        check_config(changed(only_images, student={"weights": str(tmp_path / "whole.safetensors")}), "test"), CPU
    )
    assert not run.has_classifier
    for name, tensor in run.distiller.student.state_dict().items():
        assert torch.equal(tensor, whole[name])
    assert run.loaded["student"].keys["unexpected"] == ["fc.bias", "fc.weight"]
