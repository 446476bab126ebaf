"""Every entry of METHODS follows the contract, and the two documents on methods match the code."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

from scalekd.methods.names import METHODS
from scalekd.models.stages import Features, Shapes
from scalekd.models.tails import TEACHER_TAILS
from scalekd.models.transformers_vision import TransformersVision

DOCS = Path(__file__).parents[2] / "docs"

VARIANTS = [
    *((name, {}) for name in METHODS),
    *(
        ("fd", {"stages": (1, 2, 3, 4), "projector": projector, "norm": norm})
        for projector, norm in [
            ("linear", None),
            ("conv", "batch"),
            ("conv", "layer"),
            ("cap", "batch"),
            ("cap", "layer"),
        ]
    ),
]


def options_of(method) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract(pair, name, options):
    """Scalars with a gradient for the student and every parameter, and none for the teacher."""
    method = METHODS[name](pair.student, pair.teacher, **options).double()
    student, teacher, indices = pair.features()
    needs_teacher = getattr(METHODS[name], "needs_teacher", True)
    probabilities = torch.nn.functional.one_hot(indices, pair.student.classes).double()
    if not getattr(METHODS[name], "needs_maps", True):
        student, teacher = Features(student.logits, distilled=student.distilled), Features(teacher.logits)
    # a method may draw random numbers and keep state: the twin starts where the method does
    twin = copy.deepcopy(method)
    torch.manual_seed(1)
    losses = method(student, teacher if needs_teacher else None, indices)
    assert losses and all(v.shape == () and v.isfinite() and v > 0 for v in losses.values())
    torch.manual_seed(1)
    for key, value in twin(student, teacher if needs_teacher else None, probabilities).items():
        torch.testing.assert_close(value, losses[key])

    sum(losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    read = (student.logits, student.distilled, student.final, *student.maps)
    reached = [x for x in read if x is not None and x.grad is not None]
    assert reached and all(x.grad.abs().sum() > 0 for x in reached)
    assert all(x is None or x.grad is None for x in (teacher.logits, teacher.final, *teacher.maps))


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", METHODS)
def test_half_precision(pair, name, dtype):
    """Features in half precision, large ones too, under autocast: losses in float32, and finite."""
    needs_teacher, needs_maps = (getattr(METHODS[name], key, True) for key in ("needs_teacher", "needs_maps"))
    method = METHODS[name](pair.student, pair.teacher)
    student, teacher, targets = pair.features(dtype=torch.float32)
    for features in (student, teacher):
        features.logits, features.final = features.logits.to(dtype), (100 * features.final).to(dtype)
        features.maps = tuple((100 * x).to(dtype) for x in features.maps) if needs_maps else ()
    with torch.autocast("cpu", dtype):
        losses = method(student, teacher if needs_teacher else None, targets)
    assert losses and all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_signature(name):
    """student, teacher, then keyword options with annotation and default."""
    parameters = list(inspect.signature(METHODS[name]).parameters.values())
    assert [p.name for p in parameters[:2]] == ["student", "teacher"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    assert all(p.annotation is not p.empty and p.default is not p.empty for p in parameters[2:])


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if getattr(m, "needs_teacher", True)])
def test_a_missing_teacher_is_an_error(pair, name):
    with pytest.raises(ValueError, match="needs a teacher"):
        METHODS[name](pair.student, None)


# ---------------------------------------------------------------- docs


def documented_options(text: str) -> dict[tuple[str, str], object]:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\S.*?) \| \S.*\|$", text, re.MULTILINE)
    return {(method, option): ast.literal_eval(default) for method, option, default in rows if method in METHODS}


def actual_options() -> dict[tuple[str, str], object]:
    return {(name, o): p.default for name, m in METHODS.items() for o, p in options_of(m).items()}


def test_options_table_has_the_options_and_their_defaults():
    assert documented_options((DOCS / "reference" / "methods.md").read_text()) == actual_options()


def losses_of(document: str) -> list[str]:
    return re.findall(r"losses: \{.*\}", (DOCS / document).read_text())


def tupled(value):
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("line", losses_of("reference/methods.md"))
def test_recipe_lines_can_be_built(line):
    student = Shapes("s", ((4, 8, 8), (4, 8, 8), (6, 4, 4), (8, 2, 2)), (8, 2, 2), 5, two_heads=True)
    teacher = Shapes("t", ((4, 8, 8), (4, 8, 8), (48, 4, 4), (96, 2, 2)), (96, 2, 2), 5, can_resume=True, pooled=96)
    losses = yaml.safe_load(line)["losses"]
    for name, options in losses.items():
        weight = options.pop("weight", 1.0)
        assert weight > 0
        METHODS[name](student, teacher, **{k: tupled(v) for k, v in options.items()})


def test_every_ablation_row_has_its_losses():
    table = (DOCS / "reference" / "methods.md").read_text().split("## The ablations")[1]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    lines = [losses for row in rows for losses in re.findall(r"losses: \{.*\}", row)]
    assert len(lines) == len(rows) == len(set(lines))


def check_contract(name, pair):
    test_signature(name)
    test_contract(pair, name, {})
    for dtype in HALF:
        test_half_precision(pair, name, dtype)
    if getattr(METHODS[name], "needs_teacher", True):
        test_a_missing_teacher_is_an_error(pair, name)


def blocks_of(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)


def test_the_example_method_follows_the_contract(monkeypatch, pair):
    """docs/how-to/add-a-method.md, taken literally."""
    module, _, _, line, test = blocks_of("how-to/add-a-method.md", "python")
    names: dict = {"__name__": "scalekd.methods.similarity", "__package__": "scalekd.methods"}
    exec(module, names)  # our own document
    for name, method in eval("{" + line + "}", names).items():  # noqa: S307
        monkeypatch.setitem(METHODS, name, method)
    check_contract("sp", pair)
    (row,) = blocks_of("how-to/add-a-method.md", "markdown")
    assert documented_options(row) == {("sp", o): p.default for o, p in options_of(METHODS["sp"]).items()}
    tests: dict = {}
    exec(test, tests)
    tests["test_sp_by_hand"]()
    for dtype in HALF:
        tests["test_half_precision"](pair, dtype)

    (recipe,) = losses_of("how-to/add-a-method.md")
    options = yaml.safe_load(recipe)["losses"]["sp"]
    options.pop("weight")
    batch = pair.features()
    losses = METHODS["sp"](pair.student, pair.teacher, **{k: tupled(v) for k, v in options.items()})(*batch)
    assert list(losses) == ["s3", "s4"] and all(v.isfinite() and v > 0 for v in losses.values())


def test_the_logit_example_follows_the_contract(monkeypatch, pair):
    module = blocks_of("how-to/add-a-method.md", "python")[2]
    names: dict = {"__name__": "scalekd.methods.logit_distance", "__package__": "scalekd.methods"}
    exec(module, names)
    monkeypatch.setitem(METHODS, "ld", names["LogitDistance"])
    check_contract("ld", pair)
    student, teacher, targets = pair.features()
    expected = sum((s - t) ** 2 for s, t in zip(student.logits.flatten(), teacher.logits.flatten()))
    loss = METHODS["ld"](pair.student, pair.teacher)(student, teacher, targets)["ld"]
    torch.testing.assert_close(loss, expected / student.logits.numel())


def test_the_teachers_that_can_be_resumed_are_those_of_the_table():
    rows = re.findall(
        r"^\| (\w+) \| (`\w+`(?:, `\w+`)*) \|$", (DOCS / "reference" / "methods.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(c.__name__ for c in TEACHER_TAILS if c is not TransformersVision)
    for name, models in rows:
        for model in re.findall(r"\w+", models):
            # on torch's meta device a RegNet cannot be built with torch 2.8
            with torch.device("cpu" if model.startswith("regnet") else "meta"):
                assert type(timm.create_model(model)).__name__ == name, model
