"""Contents that a damaged file can have: cut off, emptied, retyped, huge or incomplete."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


def raw_mutations(data: bytes) -> Iterator[bytes]:
    yield from (
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"{",
        data[: len(data) // 2],
        data[:-3],
        b"[" * 9999,
    )
    yield data[: len(data) // 2] + bytes(8) + data[len(data) // 2 + 8 :]


def value_mutations(value: Any) -> Iterator[Any]:
    """`value` with any one of its parts, at any depth, removed or replaced."""
    yield from VALUES
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in value_mutations(inner))
    elif isinstance(value, list):
        for i, inner in list(enumerate(value))[:3]:
            yield from ([*value[:i], other, *value[i + 1 :]] for other in value_mutations(inner))


def mutations(folder: Path, files: Iterable[str]) -> dict[str, list[Callable[[], bytes | str]]]:
    """File -> functions that make contents that it could have; only a few of them are called."""
    found: dict[str, list[Callable[[], bytes | str]]] = {}
    for name in files:
        data = (folder / name).read_bytes()
        found[name] = [partial(bytes, raw) for raw in raw_mutations(data)]
        if name.endswith(".yaml"):
            found[name] += [partial(yaml.safe_dump, v) for v in value_mutations(yaml.safe_load(data))]
        elif name.endswith(".jsonl"):
            lines = data.decode().splitlines()
            for i, line in enumerate(lines):
                found[name] += [partial(_with_line, lines, i, v) for v in value_mutations(json.loads(line))]
        elif name.endswith(".json"):
            found[name] += [partial(json.dumps, v) for v in value_mutations(json.loads(data))]
    return found


def _with_line(lines: list[str], i: int, value: Any) -> str:
    return "\n".join([*lines[:i], json.dumps(value), *lines[i + 1 :]])


def some_of(folder: Path, files: Iterable[str], number: int) -> Iterator[tuple[str, bytes]]:
    """(file, content): `number` mutations of each file, always the same ones."""
    chosen = random.Random(0)
    for name, contents in mutations(folder, files).items():
        for made in chosen.sample(contents, min(number, len(contents))):
            content = made()
            yield name, content.encode() if isinstance(content, str) else content
