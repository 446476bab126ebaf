"""A recipe is loaded as a `Config`, or rejected with all its errors and the nearest valid names."""

from __future__ import annotations

import inspect

import pytest
import yaml

from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.losses import options_of
from scalekd.config.recipe import check_config, load_recipe
from scalekd.config.recipe_files import merged
from scalekd.methods.names import METHODS
from scalekd.train.resume import recipe_difference

BASE = """
name: x
data: {train: images}
student: {model: resnet18}
teacher: {model: test_vit, weights: random}
losses: {ce: {}, kd: {temperature: 2}}
train: {epochs: 2, batch_size: 8}
"""


@pytest.fixture
def load(tmp_path):
    """`load(*overrides, text=BASE)` -> the `Config`."""

    def load(*overrides, text=BASE):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(str(path), overrides)

    return load


@pytest.fixture
def rejected(load):
    """`rejected(*overrides, text=BASE)` -> the error message."""

    def rejected(*overrides, text=BASE):
        with pytest.raises(UserError) as error:
            load(*overrides, text=text)
        return str(error.value)

    return rejected


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 1e-3), ("5E+2", 500.0), ("1.e3", 1000.0), (".5e1", 5.0), ("-2e0", -2.0), ("1.5", 1.5), ("3", 3),
     ("'1e-3'", "1e-3"), ("e3", "e3"), ("1e", "1e"), ("off", False), ("", None)],
)  # fmt: skip
def test_yaml_values(text, value):
    read = parse_yaml(text, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: {b: 1, b: 1}", "a: 1\n'a': 1"])
def test_duplicate_keys_are_rejected(text):
    with pytest.raises(UserError, match=r"here is not valid YAML: `[ab]` is given twice \(line 1\)"):
        parse_yaml(text, "here")


def test_all_errors_are_reported_together(rejected):
    text = """
    name: x
    dta: {}
    data: {train: images, image_sze: 32}
    student: {model: resnet81}
    teacher: {model: tset_vit, weigths: random}
    losses: {scaleKD: {}, kd: {temprature: 2, weight: heavy}}
    train: {epochs: 0, batch_size: 8}
    optim: {name: adamv}
    augment: {auto_augment: rnd-m7}
    """
    message = rejected(text=text)
    assert message.splitlines()[0].endswith("recipe.yaml: 11 problems")
    for line in (
        "dta: unknown. Did you mean `data`?",
        "data.image_sze: unknown. Did you mean `image_size`?",
        "student.model: timm has no model `resnet81`. Did you mean `resnet18`",
        "teacher.model: timm has no model `tset_vit`. Did you mean `test_vit`",
        "teacher.weigths: unknown. Did you mean `weights`?",
        "losses.scaleKD: unknown method. Did you mean `scalekd`?",
        "losses.kd.temprature: unknown option. Did you mean `temperature`?",
        "losses.kd.weight: Input should be a valid number",
        "train.epochs: Input should be greater than 0 (given 0)",
        "optim.name: timm has no optimiser `adamv`. Did you mean `adam",
        "augment.auto_augment: timm cannot read `rnd-m7`",
    ):
        assert f"\n  - {line}" in message


def test_overrides(load):
    config = load("optim.lr=1e-3", "losses.kd.temperature=4", "data.image_size=[32, 48]", "augment.mixup=0.2")
    assert (config.optim.lr, config.losses["kd"], config.augment.mixup) == (1e-3, {"temperature": 4.0}, 0.2)
    assert config.data.image_size == (32, 48)
    assert "kd" not in load("losses.kd=off", "teacher=null").losses
    assert load("losses.kd=off", "teacher=null").teacher is None
    assert load("losses.kd=off", "losses.fd.stages=[3, 4]").losses == {"ce": {}, "fd": {"stages": (3, 4)}}
    assert load("losses.kd=").losses["kd"] == {}  # all defaults again
    assert load("teacher.kwargs.depth=4", "student.kwargs.a.b=c").teacher.kwargs == {"depth": 4}


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr", "`optim.lr` is not an override: write key=value"),
        ("=3", "`=3` is not an override"),
        ("--lr=3", "--lr: unknown"),
        ("name.x=1", "`name.x=1`: name is a single value and has no key `x`"),
        ("optim.lr={", "`optim.lr={` is not valid YAML"),
        ("optim=3", "optim: must have keys and values"),
        ("optim..lr=3", "optim.: unknown"),
        ("losses={}", "losses: empty"),
        ("losses.ce=3", "losses.ce: options must be a mapping, not 3"),
        ("losses.ce.weight=0", "losses.ce.weight: Input should be greater than 0"),
        ("losses.ce.weight=.nan", "losses.ce.weight: Input should be a finite number"),
        ("optim.lr=.inf", "optim.lr: Input should be a finite number"),
        ("data.image_size=[1, 2, 3]", "data.image_size: pixels, such as 224 or [192, 256]"),
        ("augment.auto_augment=rand-m-mstd0.5", "timm would ignore `m`"),
        ("student.kwargs.x=!!set {a}", "student.kwargs.x"),
        ("name=../elsewhere", "name: String should match pattern"),
        ("teacher=null", "kd need(s) a teacher"),
        ("losses.kd=off", "teacher: no loss uses it"),
        ("train.accumulate=3", "train.batch_size 8 is not a multiple of train.accumulate 3"),
        (
            "schedule.warmup_epochs=2",
            "must be below train.epochs 2; for a short trial set schedule.warmup_epochs=0",
        ),
    ],
)
def test_bad_overrides(rejected, override, message):
    text = rejected(override)
    assert message in text and len(text.splitlines()) <= 2


@pytest.mark.parametrize(
    "idle, read",
    [
        (["augment.crop=pad", "augment.scale=[0.5, 1]"], ["augment.scale=[0.5, 1]"]),
        (["augment.pad=2"], ["augment.crop=pad", "augment.pad=2"]),
        (["augment.auto_augment=rand-m7", "augment.color_jitter=0.4"], ["augment.color_jitter=0.4"]),
        (["schedule.milestones=[1]"], ["schedule.name=multistep", "schedule.milestones=[1]"]),
        (["schedule.decay_rate=0.5"], ["schedule.name=multistep", "schedule.decay_rate=0.5"]),
        (["schedule.name=multistep", "schedule.min_lr=1e-5"], ["schedule.min_lr=1e-5"]),
        (["schedule.warmup_lr=1e-5"], ["schedule.warmup_epochs=1", "schedule.warmup_lr=1e-5"]),
        (["optim.name=momentum", "optim.betas=[0.9, 0.95]"], ["optim.betas=[0.9, 0.95]"]),
        (["optim.name=momentum", "optim.eps=1e-6"], ["optim.eps=1e-6"]),
        (["optim.momentum=0.8"], ["optim.name=momentum", "optim.momentum=0.8"]),
        (["data.val=images", "data.val_fraction=0.2"], ["data.val_fraction=0.2"]),
        (["data.val=images", "data.seed=1"], ["data.val=images", "data.seed=1", "data.limit=9"]),
        (["student.image_size=32"], ["teacher.image_size=32"]),
        (["student.top1=32"], ["teacher.top1=32"]),
    ],
)
def test_a_value_without_effect_is_rejected(load, rejected, idle, read):
    assert f"{idle[-1].split('=')[0]}: has no effect here; it is " in rejected(*idle)
    load(*read)


@pytest.mark.parametrize("name", ["name", "data", "student", "losses", "train"])
def test_missing_sections_are_named(rejected, name):
    values = yaml.safe_load(BASE)
    del values[name]
    assert f"  - {name}: missing" in rejected(text=yaml.safe_dump(values))


def test_the_resolved_recipe_reads_back_equal(load):
    config = load(
        "losses.scalekd={heads: [3, 6], beta: 1}", "optim.lr=1e-30", "data.image_size=[32, 48]", "student.cuts=[1,2,3,4]",
        "augment.auto_augment=rand-m7-mstd0.5", "teacher.kwargs={a: [1, {b: 2.5}], c: null}", "train.ema=0.9999",
    )  # fmt: skip
    again = check_config(parse_yaml(to_yaml(config), "again"), "again")
    assert to_yaml(again) == to_yaml(config)
    assert again.model_copy(update={"losses": config.losses}) == config  # its losses have no option left out


def test_a_runs_recipe_leaves_nothing_to_a_methods_defaults(load, monkeypatch):
    """Otherwise a changed default in a later version would change the recipe of a finished run."""

    def later(
        *, temperature: float = 9.0, probabilities: str = "sigmoid", standardize: bool = True, variant: str = "ttm"
    ) -> None: ...

    config = load("losses.kd={weight: 2}", "losses.scalekd={heads: [3, 6]}")
    text = to_yaml(config)
    losses = yaml.safe_load(text)["losses"]
    assert losses["kd"] == {
        "weight": 2.0, "temperature": 1.0, "probabilities": "softmax", "standardize": False, "variant": "kd"
    }  # fmt: skip
    assert losses["scalekd"]["heads"] == [3, 6] and losses["scalekd"]["views"] == "all_alt"
    for name, options in losses.items():
        assert {*options} - {"weight"} == {*options_of(METHODS[name])}

    assert text == to_yaml(load("losses.kd={weight: 2}", "losses.scalekd={shared: null, beta: 0.571, heads: [3, 6]}"))

    monkeypatch.setitem(METHODS, "kd", later)
    assert load("losses.kd={}").losses["kd"] == {}
    assert check_config(yaml.safe_load(text), "again").losses["kd"]["temperature"] == 1.0
    assert "temperature" in recipe_difference(text, load("losses.kd={weight: 2}", "losses.scalekd={heads: [3, 6]}"))


def test_defaults_of_methods_live_in_their_signatures_only(load):
    assert load("losses.kd={}", "losses.scalekd={}").losses == {"ce": {}, "kd": {}, "scalekd": {}}
    for name, method in METHODS.items():
        for option, parameter in options_of(method).items():
            assert parameter.default is not inspect.Parameter.empty, f"{name}.{option} has no default"
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}.{option} has no type"


NASTY = [
    "", "null", "[]", "3", "text", "- a\n- b", "{", "}", "\t", "a: b: c", "a: *x", "&a [*a]", "x: &a {b: *a}",
    "!!python/object/apply:os.system ['true']", "!!set {a, b}", "? [1, 2]\n: 3", "1: 2", "true: 1", "null: 1",
    "a: !!binary x", "a: !!bool x", "a: !!timestamp x", "a: !!float x", "a: !!omap 3", "a: 9999-99-99",
    "a: 1\n---\nb: 2", "\x00", "a: \x07", "<<: 3", "=: 3", "a: " + "[" * 500, "a: " + "9" * 5000, "data: 3", "data: []",
    "losses: 3", "losses: [ce]", "losses: {1: {}}", "losses: {null: {}}", "losses: {ce: {1: 2}}", "losses: {ce: [1]}",
    "losses: &a {ce: *a}", "losses: {ce: {weight: [1]}}", "losses: {scalekd: {heads: {a: 1}}}", "losses: {fd: {stages: 3}}",
    "student: {model: ''}", "student: {model: [1]}", "student: {model: hf-hub:a/b}", "teacher: {kwargs: {1: 2}}",
    "teacher: &a {model: test_vit, kwargs: *a}", "student: {kwargs: {a: !!binary gIGC}}", "train: {epochs: .nan}",
    "optim: {name: ''}", "schedule: {milestones: 3}", "augment: {auto_augment: ''}", "name: ''", "name: [1]",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_malformed_text_raises_user_error_only(rejected, text):
    assert rejected(text=text)
    try:
        nasty = parse_yaml(text, "nasty")
    except UserError:
        return
    if isinstance(nasty, dict):  # again, with all other sections valid
        merged = yaml.safe_load(BASE)
        for key, value in nasty.items():
            inner = merged.get(key)
            merged[key] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value
        with pytest.raises(UserError):
            check_config(merged, "nasty")


def test_a_file_that_is_not_a_recipe(tmp_path):
    with pytest.raises(UserError, match=r"no recipe `dmo`.*Did you mean `demo`"):
        load_recipe("dmo")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_recipe(str(tmp_path / "picture.yaml"))
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(str(tmp_path))


# recipes with a base


@pytest.fixture
def recipe_file(tmp_path):
    """`recipe_file(name, text)` -> the path of a recipe in one folder."""

    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_recipe_overrides_its_base(recipe_file):
    recipe_file("first.yaml", BASE)
    second = recipe_file("second.yaml", "base: first.yaml\nname: y\ntrain: {epochs: 3}\noptim: {lr: 0.5}\n")
    third = recipe_file("third.yaml", "base: second.yaml\nteacher: null\nlosses: {ce: {}}\n")
    assert load_recipe(second) == check_config(
        parse_yaml(BASE, "") | {"name": "y", "train": {"epochs": 3, "batch_size": 8}, "optim": {"lr": 0.5}}, "x"
    )
    made = load_recipe(third, ["train.epochs=4"])
    assert made.teacher is None and list(made.losses) == ["ce"] and made.train.epochs == 4 and made.optim.lr == 0.5


def test_a_base_may_be_a_shipped_recipe(recipe_file):
    mine = load_recipe(recipe_file("mine.yaml", "base: demo\nname: mine\noptim: {lr: 0.01}\n"))
    assert mine == load_recipe("demo", ["name=mine", "optim.lr=0.01"])


def test_losses_and_models_are_replaced_as_a_whole():
    base = {"losses": {"ce": {}, "kd": {}}, "student": {"model": "a", "kwargs": {"depth": 4}}, "train": {"epochs": 1}}
    assert merged(base, {"losses": {"ce": {}}})["losses"] == {"ce": {}}
    assert merged(base, {"student": {"model": "b"}})["student"] == {"model": "b"}
    assert merged(base, {"student": {"kwargs": {"width": 2}}})["student"] == {"model": "a", "kwargs": {"width": 2}}
    assert base["student"]["kwargs"] == {"depth": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: here.yaml", "here.yaml has this recipe as its base"),
        ("base: other.yaml", "no recipe"),
        ("base: [demo]", "must be the name of a recipe or of a YAML file"),
        ("base: demmo", "Did you mean `demo`"),
        ("base: list.yaml", "list.yaml is not a recipe"),
    ],
)
def test_bad_bases(recipe_file, text, message):
    recipe_file("list.yaml", "[1]")
    here = recipe_file("here.yaml", text)
    with pytest.raises(UserError, match="base") as error:
        load_recipe(here)
    assert message in str(error.value)


def test_circular_bases_are_rejected(recipe_file):
    recipe_file("a.yaml", "base: b.yaml")
    with pytest.raises(UserError, match="has this recipe as its base"):
        load_recipe(recipe_file("b.yaml", "base: a.yaml"))
