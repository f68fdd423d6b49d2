"""A result as a table, as files and as a picture."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from checkpoints import small_model
from rich.console import Console

from linear_moe.data.vocabulary import vocabulary_of
from linear_moe.evaluation import EvaluationOptions, Result, run_suite
from linear_moe.evaluation.plots import plot_result
from linear_moe.evaluation.result import Column
from linear_moe.models.extras import MissingExtraError

RESULT = Result(
    "x",
    "a title",
    (Column("a", "first", ","), Column("b", "second", ".2f"), Column("c", "third")),
    [{"a": 12345, "b": 0.126, "c": "yes"}, {"a": 1, "b": math.nan, "c": None}],
    ("a remark",),
)


def test_a_table_writes_values_as_columns_say() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(RESULT.table())
    rows = [line.strip("│ \n").split("│") for line in captured.get().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["12,345", "0.13", "yes"], ["1", "nan", "-"]]


def test_files_hold_every_row(tmp_path: Path) -> None:
    written = RESULT.write(tmp_path / "new")
    assert [path.name for path in written] == ["x.csv", "x.json"]
    with written[0].open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "12345", "b": "0.126", "c": "yes"}, {"a": "1", "b": "nan", "c": ""}]

    def no_constant(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads(written[1].read_text(), parse_constant=no_constant)
    assert data["rows"] == [{"a": 12345, "b": 0.126, "c": "yes"}, {"a": 1, "b": None, "c": None}]
    assert data["remarks"] == ["a remark"]


@pytest.mark.parametrize("suite", ["perplexity", "needle", "decode-speed", "mqar"])
def test_every_suite_has_a_picture(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("some words, and then some more of them\n" * 12)
    options = EvaluationOptions(
        lengths=(130, 260),
        samples=2,
        data=tmp_path / "t.txt",
        depths=(0, 1),
        num_tokens=5,
        trained_length=100,
        twin=True,
    )
    size = 20 if suite == "mqar" else 257
    result = run_suite(suite, small_model(size), vocabulary_of(size), options)
    plot_result(result, tmp_path / "a.png")
    image = sys.modules["matplotlib"].image.imread(tmp_path / "a.png")
    # Something is drawn on it.
    assert image.shape[0] > 100 and image.shape[1] > 200 and image[..., :3].std() > 0.05
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'linear-moe\[plot\]'"):
        plot_result(result, tmp_path / "b.png")
