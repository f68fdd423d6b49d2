"""Files of rows, one document each: JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linear_moe.models.extras import require

ROW_PATTERNS = ("*.jsonl", "*.parquet")
TEXT_KEY = "text"


def has_rows(path: str | Path) -> bool:
    """Whether a file's name says that it is one of rows."""
    return Path(path).suffix in (".jsonl", ".parquet")


def read_rows(path: Path, key: str = TEXT_KEY) -> Iterator[tuple[int, bytes]]:
    """The rows of a file with their numbers, from 1: in JSON lines those of the lines. Empty texts are passed over.

    Raises:
        ValueError: naming the file and the row that has no text under `key`, or can't be read.
        MissingExtraError: for Parquet, if `pyarrow` is not installed.
    """
    rows = _parquet(path, key) if path.suffix == ".parquet" else _json_lines(path)
    for number, row in rows:
        text = text_of(row, key, f"row {number:,} of {str(path)!r}")
        if text:
            yield number, text


def text_of(row: Any, key: str, where: str) -> bytes:
    """The text of a row as UTF-8.

    Raises:
        ValueError: beginning with `where`, if there is none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} has no text: it is no object but {_kind(row)}")
    if key not in row:
        keys = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"{where} has no text: it has no {key!r}, only {keys} (the text key can be chosen)")
    if not isinstance(row[key], str):
        raise ValueError(f"{where} has no text: its {key!r} is {_kind(row[key])}")
    try:
        return row[key].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} has no valid text: half of a character stands in its {key!r}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"row {number:,} of {str(path)!r} is no JSON: {error}") from None


def _parquet(path: Path, key: str) -> Iterator[tuple[int, Any]]:
    parquet = require("pyarrow.parquet", extra="data")
    arrow = require("pyarrow", extra="data")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                text_of(dict.fromkeys(names), key, f"row 1 of {str(path)!r}")
            for batch in file.iter_batches(columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, {key: value}
    except arrow.ArrowException as error:
        raise ValueError(f"{str(path)!r} is no Parquet file or is damaged after row {number:,}: {error}") from error


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
