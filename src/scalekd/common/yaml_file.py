"""Reads YAML from untrusted files: no Python objects, no duplicate keys, no oversized documents."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Hashable
from typing import Any

import yaml

from .errors import UserError
from .text import printable, shortened

MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with 1e-3 as a number and an error for a duplicate key.

    It also limits the number of values, aliases expanded: a few lines of nested aliases can expand to billions.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _values_in(node, {}) > MOST_VALUES:
            raise _rejected(f"it has more than {MOST_VALUES:,} values", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # rejected below
            if key in keys:
                raise _rejected(f"`{key}` is given twice", node)
            if not str(key).isprintable():
                raise _rejected(f"the key {printable(repr(key))} has characters that cannot be shown", key_node)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise _rejected("a number has more than 64 bits", node)
        return value


def _rejected(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below `node` with all aliases expanded.

    known: counts of the nodes visited so far, by id; 0 for a node that is still being counted.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        raise _rejected("an alias contains itself", node)
    if id(node) not in known:
        known[id(node)] = 0
        inside = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        known[id(node)] = 1 + sum(_values_in(n, known) for n in inside)
    return known[id(node)]


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@functools.lru_cache(maxsize=512)  # the bases of recipes are read again for each of them
def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def parse_yaml(text: str, where: str) -> Any:
    """The values in a YAML text. Raises `UserError` that starts with `where`, the name of the file."""
    try:
        return copy.deepcopy(_loaded(text))
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{where} is not valid YAML: {shortened(str(error.problem))}{line}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from None
    # raised inside PyYAML, for example by an invalid !!bool
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not valid YAML: {shortened(' '.join(str(error).split()))}") from None
