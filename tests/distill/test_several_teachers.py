"""Several teachers for one student: the mean of their logits, and other methods once for each teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from whole_runs import assert_same, changed, start

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.distiller import Distiller

SIZE = (64, 64)
IMAGES, TARGETS = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def model(name: str, seed: int, classes: int = 5, **kwargs: Any) -> nn.Module:
    made = timm.create_model(name, num_classes=classes, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    return made.eval()


def teachers() -> dict[str, nn.Module]:
    return {"vit": model("test_vit", 1, img_size=64), "cnn": model("test_convnext", 2)}


def distiller(losses: dict[str, Any], given: Any = None, **options: Any) -> Distiller:
    torch.manual_seed(0)  # of the methods' own parameters
    student = model("test_resnet", 0)
    return Distiller(student, given or teachers(), losses, image_size=SIZE, **options).eval()


def test_methods_of_logits_read_the_mean_of_the_teachers_logits() -> None:
    both = distiller({"kd": {"temperature": 2.0}})
    normal = {name: (IMAGES - t.mean) / t.std for name, t in both.teachers.items()}
    mean = sum(t.view.model(normal[name]) for name, t in both.teachers.items()) / 2
    ours = both.student((IMAGES - both.student_mean) / both.student_std)
    wanted = 4 * F.kl_div((ours / 2).log_softmax(1), (mean / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(both(IMAGES, TARGETS)["kd"], wanted)


def test_methods_since_scalekd_work_with_several_teachers() -> None:
    """Those on logits alone read the mean; the others have a projector, or costs, of each teacher."""
    losses = {"deit": {}, "kd": {"standardize": True}, "wkd_l": {}, "wkd_f": {}, "vkd": {}, "rsd": {}}
    torch.manual_seed(0)
    student = model("deit_tiny_distilled_patch16_224", 0, img_size=64, depth=4, embed_dim=24, num_heads=2)
    both = Distiller(student, teachers(), losses, image_size=SIZE).train()
    found = both(IMAGES, TARGETS)
    each = (
        "wkd_l@{}.target",
        "wkd_l@{}.transport",
        "wkd_f@{}.s4",
        "vkd@{}",
        "rsd@{}.invariance",
        "rsd@{}.decorrelation",
    )
    assert set(found) == {"deit", "kd", "total", *(name.format(t) for name in each for t in ("vit", "cnn"))}
    found["total"].backward()
    assert all(p.grad is not None for name, p in both.named_parameters() if name != "student.head.bias")
    vit, cnn = (both.methods[f"vkd@{t}"].projector.matrix().shape for t in ("vit", "cnn"))
    assert vit == (64, 24) and cnn == (64, 24)


def test_other_methods_are_built_once_for_each_teacher_with_half_the_weight() -> None:
    both = distiller({"fd": {"weight": 3.0}})
    torch.manual_seed(0)
    found = both(IMAGES, TARGETS)
    assert set(found) == {"fd@vit.s4", "fd@cnn.s4", "total"}
    for name, teacher in teachers().items():
        alone = distiller({"fd": {}}, teacher)
        alone.methods["fd"].load_state_dict(both.methods[f"fd@{name}"].state_dict())
        torch.testing.assert_close(found[f"fd@{name}.s4"], 1.5 * alone(IMAGES, TARGETS)["fd.s4"])
    torch.testing.assert_close(found["total"], found["fd@vit.s4"] + found["fd@cnn.s4"])


def test_scalekd_has_projectors_of_its_own_for_each_teacher_and_all_get_gradients() -> None:
    both = distiller({"ce": {}, "kd": {}, "scalekd": {}}).train()
    both(IMAGES, TARGETS)["total"].backward()
    assert [name for name, p in both.named_parameters() if p.grad is None] == []
    caps = [both.methods[f"scalekd@{name}"].student_caps["both"] for name in ("vit", "cnn")]
    assert not {id(p) for p in caps[0].parameters()} & {id(p) for p in caps[1].parameters()}
    assert all(p.grad is None for t in both.teachers.values() for p in t.view.model.parameters())
    assert not any("teacher" in key for key in both.state_dict())


def test_a_loss_can_choose_its_teachers_and_others_need_not_fit_it() -> None:
    given = {"vit": model("test_vit", 1, img_size=64), "other": model("test_convnext", 2, classes=7)}
    chosen = distiller({"kd": {"teachers": ["vit"]}, "fd": {"teachers": ["other"]}}, given)
    assert set(chosen(IMAGES, TARGETS)) == {"kd", "fd.s4", "total"}
    assert not chosen.teachers["vit"].needs_maps and chosen.teachers["other"].needs_maps
    torch.testing.assert_close(
        chosen(IMAGES, TARGETS)["kd"], distiller({"kd": {}}, given["vit"])(IMAGES, TARGETS)["kd"]
    )
    with pytest.raises(UserError, match=r"losses.kd: the mean .*test_vit 5, test_vit 9"):
        distiller({"kd": {}}, {"a": given["vit"], "b": model("test_vit", 3, classes=9, img_size=64)})
    with pytest.raises(
        UserError, match=r"losses.kd: the mean of several teachers' logits .*test_vit 5, test_convnext 7"
    ):
        distiller({"kd": {}}, given)


def test_each_teacher_sees_its_own_size_and_statistics() -> None:
    own = {"teacher_size": {"vit": (96, 96)}, "teacher_stats": {"cnn": ((0.1,) * 3, (0.2,) * 3)}}
    given = {"vit": model("test_vit", 1, img_size=96), "cnn": model("test_convnext", 2)}
    both = distiller({"kd": {}}, given, **own)
    assert both.teachers["vit"].size == (96, 96) and both.teachers["cnn"].size == SIZE
    assert both.teachers["cnn"].std.flatten().tolist() == pytest.approx([0.2] * 3)
    both.double()
    assert both.teachers["cnn"].mean.dtype == torch.float64
    with pytest.raises(UserError, match="this supports one teacher and the recipe has several: vit, cnn"):
        both.teacher_features(IMAGES)


# ---------------------------------------------------------------- recipes


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Two teachers, one of them with a larger input size."""
    several = changed(tiny_recipe, losses={"ce": {}, "kd": {}, "fd": {"teachers": ["small", "large"]}})
    several["teachers"] = {
        "small": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
        "large": {"model": "test_convnext", "weights": "random", "image_size": 64},
    }
    del several["teacher"]
    return several


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"kd": {"teachers": ["smal"]}}, r"losses.kd.teachers: no teacher `smal`. Did you mean `?small"),
        ({"kd": {"teachers": []}}, "losses.kd.teachers: is empty"),
        ({"ce": {"teachers": ["small"]}, "kd": {}}, "losses.ce.teachers: ce uses no teacher"),
        ({"kd": {"teachers": ["small"]}}, "teachers.large: no loss uses it"),
        ({"ce": {}}, "teachers.small: no loss uses it"),
    ],
)
def test_an_invalid_choice_of_teachers_is_rejected(
    recipe: dict[str, Any], losses: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_config(changed(recipe, losses=losses), "test")


def test_one_teacher_or_several_not_both(recipe: dict[str, Any], tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="teacher: the recipe has `teachers` too"):
        check_config(recipe | {"teacher": {"model": "test_vit"}}, "test")
    with pytest.raises(UserError, match=r"losses.kd.teachers: the recipe has one teacher"):
        check_config(changed(tiny_recipe, losses={"kd": {"teachers": ["a"]}}), "test")


def test_an_error_of_a_teacher_names_its_key(recipe: dict[str, Any]) -> None:
    recipe["teachers"]["large"]["weights"] = "nowhere.pt"
    with pytest.raises(UserError, match=r"teachers.large.weights: no file nowhere.pt"):
        build(check_config(recipe, "test"), torch.device("cpu"))


def test_each_teacher_has_an_order_of_classes_of_its_own(recipe: dict[str, Any]) -> None:
    as_it_is = build(check_config(recipe, "test"), torch.device("cpu"))
    theirs = list(reversed(as_it_is.classes))
    recipe["teachers"]["large"]["classes"] = theirs
    put = build(check_config(recipe, "test"), torch.device("cpu"))
    before, after = ({one.label: one.teacher(IMAGES).logits for one in run.taught_by} for run in (as_it_is, put))
    torch.testing.assert_close(after["small"], before["small"])
    torch.testing.assert_close(after["large"], before["large"].flip(1))
    recipe["teachers"]["large"]["classes"] = theirs[1:]
    with pytest.raises(UserError, match=r"teachers.large.classes: list each of the data's 3 classes once"):
        build(check_config(recipe, "test"), torch.device("cpu"))


def test_an_unknown_key_of_a_teacher_is_named(recipe: dict[str, Any]) -> None:
    recipe["teachers"]["large"]["wieghts"] = "random"
    recipe["teachers"]["model"] = {"model": "test_vit", "modle": 1}  # a teacher that is called as a field
    with pytest.raises(UserError, match=r"teachers.large.wieghts: unknown. Did you mean `weights`") as error:
        check_config(recipe, "test")
    assert "teachers.model.modle: unknown. Did you mean `model`" in str(error.value)


def test_a_run_with_two_teachers(recipe: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    screen = " ".join(result.out.split())
    assert "test_resnet <- test_convnext, test_vit" in screen and "fd@small.s4" in screen
    assert "large weights" in screen and "small accuracy" in screen
    report = (tmp_path / "run" / "report.html").read_text()
    assert "teachers.small" in report and "fd@large.s4" in report
    refused = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "b", "--teacher-outputs", tmp_path / "o")
    assert refused.code == 2 and "`--teacher-outputs` supports one teacher only" in refused.err


def test_a_run_with_two_teachers_goes_on_where_it_stopped(recipe: dict[str, Any], tmp_path: Path) -> None:
    from whole_runs import Interrupted

    whole = start(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(changed(recipe, train={"save_minutes": 0}), tmp_path / "parts", stop_at=4)
    parts = start(recipe, tmp_path / "parts")
    assert_same(whole.distiller.state_dict(), parts.distiller.state_dict())
