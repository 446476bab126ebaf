"""How a recipe names a table of labels: `labels.csv:path=file,label=tags,separator=semicolon`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from scalekd.common.errors import UserError, nearest
from scalekd.common.text import printable, shortened

from ..names import KINDS as SOURCES

KINDS = ("csv", "tsv", "parquet", "coco")
ENDINGS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".json": "coco"}
SEPARATORS = {"comma": ",", "semicolon": ";", "pipe": "|", "space": " ", "tab": "\t"}
OF_ALL = {"root": "", "labels": "one|several", "classes": "", "empty": "error|keep"}
OF_ROWS = {"path": "", "label": "", "separator": "", "suffix": "", "split": "", "splits": ""}


class TableText(NamedTuple):
    """The parts of the text that names a table."""

    kind: str  # one of KINDS
    file: Path
    options: dict[str, str]
    name: str  # the file as it was written, for messages

    @property
    def root(self) -> Path:
        """The folder that relative paths start from: `root`, or the folder of the file."""
        return Path(self.options["root"]).expanduser() if "root" in self.options else self.file.parent

    def with_option(self, name: str, value: str) -> str:
        """The text of this table with one more option."""
        options = ",".join(f"{k}={v}" for k, v in (self.options | {name: value}).items())
        return f"{self.kind}:{self.name}:{options}"


def is_table(text: str) -> bool:
    """Whether a text names a table: by its kind, or by the ending of the file."""
    return _parts(text) is not None


def _parts(text: str) -> tuple[str, str, str] | None:
    """(kind, file, options) or None."""
    found = re.fullmatch(rf"(?:({'|'.join(KINDS)}):)?(.+?)(?::(\w+=.*))?", text, re.DOTALL)
    if found is None:
        return None
    kind = found[1] or ENDINGS.get(Path(found[2]).suffix.lower(), "")
    is_class_folders = not found[1] and Path(found[2]).expanduser().is_dir()
    other = text.partition(":")[0] in SOURCES
    return None if not kind or is_class_folders or other else (kind, found[2], found[3] or "")


def table_of(text: str, key: str) -> TableText:
    """The parts of a text for which `is_table` is true. Raises `UserError` for a missing file and for wrong options."""
    parts = _parts(text)
    assert parts is not None
    kind, name, written = parts
    file = Path(name).expanduser()
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir() if p.suffix in ENDINGS] if file.parent.is_dir() else []
        raise UserError(f"{key}: no file {shortened(name)}.{printable(nearest(file.name, siblings))}")
    known = OF_ALL if kind == "coco" else OF_ALL | OF_ROWS
    options: dict[str, str] = {}
    problems = []
    for pair in re.split(r",(?=\w+=)", written) if written else []:
        option, _, value = pair.partition("=")
        choices = known.get(option, "").split("|") if known.get(option) else []
        if option not in known:
            problems.append(f"no option `{shortened(option)}` of a {kind} file.{nearest(option, known)}")
        elif option in options:
            problems.append(f"option `{option}` is written twice")
        elif not value or (choices and value not in choices):
            problems.append(f"{option}={shortened(value)}: write {' or '.join(choices) or 'a value'}")
        options[option] = value
    if "separator" in options:
        options["separator"] = SEPARATORS.get(options["separator"], options["separator"])
    if options.get("labels") == "one" and "separator" in options:
        problems.append("`labels=one` and `separator` contradict each other; remove one of them")
    if "root" in options and not Path(options["root"]).expanduser().is_dir():
        problems.append(f"root: no folder {shortened(options['root'])}")
    if problems:
        raise UserError("\n".join(f"{key}: {name}: {line}" for line in problems))
    return TableText(kind, file, options, name)
