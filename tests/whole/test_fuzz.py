"""Readers of untrusted files return what was written or raise `UserError`, also after random damage."""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from archives import PNG, write_tar
from bad_files import Payload, write_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whole_runs import TINY

from scalekd.common.errors import UserError
from scalekd.common.sections import MOST_PROBLEMS, to_yaml
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.recipe import check_config, load_recipe
from scalekd.config.recipe_files import override, recipe_names, recipe_text
from scalekd.data.sources.open import open_source
from scalekd.train import checkpoint


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings with the same examples in every run, so that failures are reproducible."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # fixtures are shared by all examples on purpose
    )


# ---------------------------------------------------------------- recipes

WORDS = st.sampled_from(
    ["name", "data", "train", "student", "model", "kwargs", "losses", "ce", "kd", "optim", "lr", "seed", "cuts", "weights"]
)  # fmt: skip
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**20, max_value=10**30),
    st.floats(),
    st.text(max_size=20),
    st.text(alphabet="\ud800\udcff\x1b\n\x00'\"{}[]&*!?%@", max_size=5),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(
        ["test_resnet", "resnet18", "random", "adamw", "rand-m7", "!!set {a}", "x" * 3000, "9" * 400, "1e400"]
    ),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(WORDS, st.text(max_size=5), st.integers(), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)


@functools.cache
def recipes() -> list[dict[str, Any]]:
    """Not read before a test asks for them: every process that collects tests would wait for it."""
    return [TINY, *(yaml.safe_load(recipe_text(name)) for name in recipe_names())]


def is_accepted(text: str, overrides: tuple[str, ...] = ()) -> bool:
    """True if the recipe is valid, and then equal after a round trip; False for a `UserError` that is fit to print."""
    try:
        config = check(text, overrides)
    except UserError as error:
        lines = str(error).split("\n")
        assert len(lines) <= MOST_PROBLEMS + 2, len(lines)
        assert all(line.isprintable() and len(line) < 1000 for line in lines), lines
        return False
    again = check(to_yaml(config), ())
    assert to_yaml(again) == to_yaml(config) and again.model_copy(update={"losses": config.losses}) == config
    return True


def check(recipe: str, overrides: tuple[str, ...]) -> Any:
    values = parse_yaml(recipe, "here")
    if not isinstance(values, dict):
        raise UserError("here is not a recipe")
    for text in overrides:
        override(values, text)
    return check_config(values, "here")


@fuzz(150)
@given(st.text(max_size=200))
def test_any_text(text):
    is_accepted(text)


@fuzz(200)
@given(st.lists(st.sampled_from([*"{}[]:,-?&*!|>%@`'\"#\n\t ", "a", "1", "1e3", "<<", "&a", "*a", "!!set", "!!int", "---",
                                 "!!binary", "!!omap", "!!timestamp", "null", "~", "0x", "1:1", "\\x", "=", "."]), max_size=30))  # fmt: skip
def test_text_that_is_nearly_yaml(parts):
    is_accepted("".join(parts))
    is_accepted(yaml.safe_dump(TINY) + "x: " + "".join(parts))


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key and index, at any depth."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def spoiled(draw: st.DrawFn) -> dict[str, Any]:
    """A real recipe with some keys or values deleted, replaced, renamed, nested or copied."""
    recipe = copy.deepcopy(draw(st.deferred(lambda: st.sampled_from(recipes()))))
    for _ in range(draw(st.integers(0, 3))):
        all_places = list(places(recipe))
        if not all_places:
            break
        *above, last = draw(st.sampled_from(all_places))
        inside = recipe
        for key in above:
            inside = inside[key]
        what = draw(st.sampled_from(["delete", "replace", "rename", "nest", "copy"]))
        if what == "delete":
            del inside[last]
        elif what == "replace":
            inside[last] = draw(VALUES)
        elif what == "rename" and isinstance(inside, dict):
            inside[draw(st.one_of(WORDS, st.text(max_size=5)))] = inside.pop(last)
        elif what == "nest":
            inside[last] = draw(st.sampled_from([[inside[last]], {"x": inside[last]}]))
        elif what == "copy" and isinstance(inside, dict):
            inside[draw(WORDS)] = copy.deepcopy(inside[last])
    return recipe


def record(accepted: list[bool], text: str, overrides: tuple[str, ...] = ()) -> None:
    accepted.append(is_accepted(text, overrides))


def test_values_of_any_shape():
    accepted: list[bool] = []

    @fuzz(200)
    @given(spoiled())
    def each(recipe):
        record(accepted, yaml.dump(recipe, sort_keys=False))

    each()
    assert {True, False} == set(accepted)  # both outcomes occurred


@fuzz(150)
@given(spoiled(), st.randoms(use_true_random=False))
def test_damaged_text_of_a_recipe(recipe, random):
    lines = yaml.dump(recipe).split("\n")
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        line = lines[at]
        lines[at] = random.choice(
            ["", line + "\n" + line, " " + line, line[: len(line) // 2], line.replace(": ", ": !!str "), line.replace(": ", ": !x "),
             line.replace(": ", ": &a ", 1), line + " *a", line.replace(":", ""), line.replace(" ", "\t"), line[::-1]]
        )  # fmt: skip
    is_accepted("\n".join(lines))


def test_overrides():
    accepted: list[bool] = []
    keys = st.lists(st.one_of(WORDS, st.text(max_size=3)), max_size=3).map(".".join)
    known = st.sampled_from([".".join(map(str, path)) for path in places(TINY)])
    values = st.one_of(VALUES.map(lambda v: yaml.dump(v, default_flow_style=True)), st.text(max_size=10))

    @fuzz(200)
    @given(st.lists(st.tuples(st.one_of(keys, known), values), max_size=3))
    def each(overrides):
        record(accepted, yaml.safe_dump(TINY), tuple(f"{key}={value}" for key, value in overrides))

    each()
    assert {True, False} == set(accepted)


@fuzz(100)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_recipe(tmp_path, raw):
    (tmp_path / "x.yaml").write_bytes(raw)
    with pytest.raises(UserError):
        load_recipe(str(tmp_path / "x.yaml"))


# ---------------------------------------------------------------- bytes


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Damaged one to three times: bytes changed, deleted, inserted or repeated, or the end cut off."""
    raw = whole
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(raw))), draw(st.sampled_from([1, 1, 2, 8, 100, 512]))
        other = draw(st.integers(0, len(raw)))
        some = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([bytes(8), b"\xff" * 8, b"PK\1\2"])))
        bit = bytes([raw[at] ^ (1 << draw(st.integers(0, 7)))]) if at < len(raw) else b""
        raw = draw(
            st.sampled_from(
                [
                    raw[:at] + bit + raw[at + 1 :],
                    raw[:at] + some + raw[at + len(some) :],
                    raw[:at] + raw[at + length :],
                    raw[:at] + some + raw[at:],
                    raw[:at] + raw[other : other + length] + raw[at + length :],
                    raw[:at] + raw[other : other + length] + raw[at:],
                    raw[:at],
                ]
            )
        )
    return raw


STATE: dict[str, Any] = {
    "student": {"w": torch.arange(300.0), "b": torch.arange(7)},
    "progress": {"step": 3, "history": [{"top1": 50.0}]},
    "ema": None,
    "recipe": "name: x\n",
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    whole, expected, rejected = path.read_bytes(), checkpoint.load(path), 0

    @fuzz(400)
    @given(damaged(whole))
    def each(raw):
        nonlocal rejected
        path.write_bytes(raw)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            assert str(error).startswith(f"{path} is ") and len(str(error)) < 1000
            rejected += 1
        else:
            assert equal(loaded, expected)

    each()
    assert rejected > 200


def test_every_single_bit_of_a_checkpoint(tmp_path):
    """One bit in every non-zero byte, and in some of the others."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"w": torch.arange(3.0)})
    whole, expected = path.read_bytes(), checkpoint.load(path)
    for at in [i for i, byte in enumerate(whole) if byte or i % 16 == 0]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            assert equal(checkpoint.load(path), expected), at


def test_code_is_not_run_from_a_damaged_checkpoint(tmp_path):
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    torch.save({"format": checkpoint.FORMAT, "x": Payload(trace)}, path)

    @fuzz(100)
    @given(damaged(path.read_bytes()))
    def each(raw):
        path.write_bytes(raw)
        with pytest.raises(UserError):
            checkpoint.load(path)
        assert not trace.exists()

    each()


def with_checksum(raw: bytes) -> bytes:
    """Corrects the checksum of the first header, so that damage in it is not detected."""
    if len(raw) < tarfile.BLOCKSIZE:
        return raw
    total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    return raw[:148] + b"%06o\0 " % total + raw[156:]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("fix_checksum", [False, True])
def test_a_damaged_archive_is_refused_or_has_the_same_places(tmp_path, form, fix_checksum):
    """A tar has no checksums of names and images: these may have changed, but are read from within the archive."""
    long = f"cat/{'long' * 40}.png"
    path = write_tar(tmp_path / "t.tar", {long: PNG, "cat/1.png": PNG, "dog/2.png": PNG}, format=form)
    rejected = 0

    @fuzz(150)
    @given(damaged(path.read_bytes()))
    def each(raw):
        nonlocal rejected
        path.write_bytes(with_checksum(raw) if fix_checksum else raw)
        try:
            source = open_source(f"tar:{path}", "data.train")
        except UserError as error:
            assert str(error).startswith("data.train: ") and str(error).isprintable()
            rejected += 1
            return
        for place in source.places:
            assert place.offset >= 0 and place.offset + place.size <= len(path.read_bytes())
            assert len(place.read()) == place.size
        assert all(".." not in name.split("/") and not name.startswith("/") for name in source.names)

    each()
    assert rejected > 30


@pytest.mark.parametrize("part", ["images-idx3-ubyte", "labels-idx1-ubyte.gz"])
def test_damaged_idx_files_are_refused_or_have_the_same_shape(tmp_path, part):
    """IDX has no checksums, only gzip has: accepted files have a label per image, and gzipped labels are unchanged."""
    write_idx(tmp_path / "x", 30, 30)
    path = tmp_path / f"x-{part}"
    labels, rejected = [i % 3 for i in range(30)], 0
    assert gzip.decompress((tmp_path / "x-labels-idx1-ubyte.gz").read_bytes())[8:] == bytes(labels)

    @fuzz(200)
    @given(damaged(path.read_bytes()))
    def each(raw):
        nonlocal rejected
        path.write_bytes(raw)
        try:
            source = open_source(f"idx:{tmp_path / 'x'}", "data.train")
        except UserError as error:
            assert str(error).startswith("data.train: ") and str(error).isprintable()
            rejected += 1
            return
        assert source.targets == labels and source.images.size == 30 * 16 and len(source.images) == 30
        source[29]

    each()
    assert rejected > 30


def test_the_damage_is_real():
    """Most results of `damaged` differ from the input."""
    whole, same = Path(__file__).read_bytes(), []

    @fuzz(100)
    @given(damaged(whole))
    def each(raw):
        same.append(raw == whole)

    each()
    assert sum(same) < len(same) // 4
