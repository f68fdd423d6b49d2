"""Rows of JSON lines and Parquet as documents; a row without text is named by its number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from linear_moe.data.rows import read_rows
from linear_moe.data.text import read_text
from linear_moe.models.extras import MissingExtraError


def _json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_row_with_text_is_a_document(tmp_path: Path) -> None:
    texts = ["one", "", "zwö\n", "three"]
    lines = _json_lines(tmp_path / "a.jsonl", [{"text": text, "n": 1} for text in texts])
    table = _parquet(tmp_path / "a.parquet", text=texts, n=[1] * 4)
    for path in (lines, table):
        assert list(read_rows(path)) == [(1, b"one"), (3, "zwö\n".encode()), (4, b"three")]
    lines.write_text('\n{"body": "x"}\n\n')
    assert list(read_rows(lines, "body")) == [(2, b"x")]


def test_rows_are_split_by_where_they_stand(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(300)]
    _json_lines(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    _parquet(tmp_path / "b.parquet", text=[row.upper() for row in rows])
    (tmp_path / "c.txt").write_text("plain")
    corpus = read_text(tmp_path, held_out=0.3)
    assert sorted(corpus.train + corpus.held_out) == sorted(
        [b"plain", *(row.encode() for row in rows), *(row.upper().encode() for row in rows)]
    )
    assert 120 < len(corpus.held_out) < 240
    alone = read_text(tmp_path / "a.jsonl", held_out=0.3)
    assert set(alone.train) <= set(corpus.train)
    assert set(alone.held_out) <= set(corpus.held_out)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"body": "x", "n": 1}, r"row 2 of .*a\.jsonl' has no text: it has no 'text', only 'body', 'n'"),
        ({"text": None}, "row 2 of .* has no text: its 'text' is null"),
        ({"text": 7}, "row 2 of .* has no text: its 'text' is a int"),
        ({}, "it has no 'text', only nothing"),
        (["text"], "row 2 of .* it is no object but a list"),
        ({"text": "\ud800"}, "row 2 of .* half of a character"),
    ],
)
def test_a_row_of_json_without_text_is_named(row: Any, named: str, tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "a.jsonl", [{"text": "good"}, row])
    with pytest.raises(ValueError, match=named):
        read_text(path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\n')
    with pytest.raises(ValueError, match=r"row 2 of .*a\.jsonl' is no JSON"):
        read_text(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="row 1 of .* is no JSON"):
        read_text(tmp_path)


def test_a_row_of_parquet_without_text_is_named(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", text=["x", "y", None])
    with pytest.raises(ValueError, match=r"row 3 of .*a\.parquet' has no text: its 'text' is null"):
        read_text(path)
    with pytest.raises(ValueError, match="row 1 of .* it has no 'body', only 'text'"):
        read_text(path, text_key="body")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"a\.parquet' is no Parquet file or is damaged"):
        read_text(path)


def test_files_without_a_row_and_keys_without_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no row with text"):
        read_text(_json_lines(tmp_path / "a.jsonl", [{"text": ""}]))
    (tmp_path / "b.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"text_key would be ignored: .*b\.txt' has no rows"):
        read_text(tmp_path / "b.txt", text_key="body")
    path = _parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'linear-moe\[data\]'"):
        read_text(path)
