"""Reads the columns of a CSV, TSV or Parquet file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, first_line
from scalekd.common.text import printable, shortened

from .problems import Problems
from .text import TableText

PARQUET_MISSING = "Parquet needs the package pyarrow; run pip install 'scalekd[hf]'"


class Columns(NamedTuple):
    """A table by columns. A cell is text, or in a Parquet file a list of texts."""

    values: dict[str, list[Any]]
    rows: Sequence[int]  # the number of each row as a spreadsheet shows it: the header of a CSV file is row 1


def read_columns(text: TableText, key: str, problems: Problems) -> Columns:
    """The columns of a file. Raises `UserError` if it cannot be read as a table; rows of another length are problems."""
    columns = _parquet(text, key) if text.kind == "parquet" else _csv(text, key, problems)
    if not columns.rows:
        raise UserError(f"{key}: {text.name} has no rows" + " below its header" * (text.kind != "parquet"))
    return columns


def _csv(text: TableText, key: str, problems: Problems) -> Columns:
    lines: list[list[str]] = []
    rows: list[int] = []
    try:
        with open(text.file, encoding="utf-8-sig", newline="") as file:
            start = file.readline()
            # spreadsheets write semicolons where a comma is the decimal point
            delimiter = "\t" if text.kind == "tsv" else max(",;\t", key=start.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for row, line in enumerate(reader, 2):
                if len(line) == len(header):
                    lines.append(line)
                    rows.append(row)
                elif line:
                    problems.add(
                        f"rows with another number of columns than the header's {len(header)}", row, str(len(line))
                    )
    except UnicodeDecodeError:
        raise UserError(f"{key}: {text.name} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{key}: {text.name} is not a table: {first_line(error)} in line {reader.line_num}") from None
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(
            f"{key}: {text.name} has two columns named `{shortened(twice)}`; the first row must name each once"
        )
    values = zip(*lines) if lines else [()] * len(header)
    return Columns({name: [cell.strip() for cell in column] for name, column in zip(header, values)}, rows)


def _parquet(text: TableText, key: str) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{key}: {PARQUET_MISSING}") from None
    try:
        table = pyarrow.parquet.read_table(text.file)
        values = {name: list(map(plain, table[name].to_pylist())) for name in table.column_names}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{key}: {text.name} is not a Parquet file: {printable(first_line(error))}") from None
    return Columns(values, range(1, table.num_rows + 1))


def plain(cell: Any) -> Any:
    """Text, a list of texts, or something else that is neither a path nor a label."""
    if cell is None or cell != cell:  # NaN
        return ""
    if isinstance(cell, list):
        return [plain(each) for each in cell]
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, float) and cell.is_integer():  # pandas stores whole numbers so if any cell is empty
        return str(int(cell))
    return cell.strip() if isinstance(cell, str) else str(cell) if isinstance(cell, int | float) else cell
