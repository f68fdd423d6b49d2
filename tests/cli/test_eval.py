"""`linear-moe eval` and `linear-moe inspect` as a user types them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from checkpoints import ATTENTION, saved, small_model
from typer.testing import CliRunner, Result

from linear_moe.cli import app
from linear_moe.data.vocabulary import ByteVocabulary
from linear_moe.evaluation import EvaluationOptions, run_suite

TEXT = "".join(f"line {i * i} of some text\n" for i in range(60))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("text"), small_model())


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("numbers"), small_model(16))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT)
    return file


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--device", "cpu")])


def refused(*arguments: str | Path | int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    assert says in re.sub(r"\s+", " ", result.stderr)


def test_what_fits_a_model_of_text_is_measured(text_model: Path, data: Path, tmp_path: Path) -> None:
    sizes = (
        "--lengths",
        "150,300",
        "--samples",
        2,
        "--depths",
        "0,1",
        "--tokens",
        5,
        "--twin",
        "--trained-length",
        100,
    )
    result = run("eval", text_model, "--data", data, *sizes, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for words in ("perplexity by position", "needle in a haystack", "small-attention", "whose state grows", "beyond"):
        assert words in result.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(f"{s}.{e}" for s in ("perplexity", "needle", "decode-speed") for e in ("csv", "json", "png"))
    wanted = run_suite(
        "perplexity",
        small_model(),
        ByteVocabulary(),
        EvaluationOptions(lengths=(300,), samples=2, data=data, trained_length=100),
    )
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == wanted.as_dict()
    needles = json.loads((tmp_path / "out" / "needle.json").read_text())["rows"]
    assert [(row["length"], row["depth"], row["trials"]) for row in needles] == [
        (150, 0, 2), (150, 1, 2), (300, 0, 2), (300, 1, 2)
    ]  # fmt: skip


def test_recall_is_json_for_programs(numbers: Path) -> None:
    result = run("eval", numbers, "--suite", "mqar", "--problem", "16:3", "--problem", "32:7", "--samples", 9, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert [(row["length"], row["num_pairs"], row["asked"]) for row in found["rows"]] == [(16, 3, 27), (32, 7, 63)]


def test_the_speed_of_a_configuration_needs_no_weights() -> None:
    result = run("eval", "recall-mom", "--suite", "decode-speed", "--lengths", "8,16", "--tokens", 5, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)[0]["rows"]
    assert [(row["model"], row["context"]) for row in rows] == [("recall-mom", 8), ("recall-mom", 16)]
    refused("eval", "recall-mom", says="only --suite decode-speed says something of it")
    refused("eval", "recall-mo", says="neither a checkpoint")


def test_tables_and_files_need_no_plots(numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("eval", numbers, "--suite", "mqar", "--problem", "16:3", "--samples", 2, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "recall of pairs" in result.stdout
    assert "no plot of mqar: matplotlib is needed" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mqar.csv", "mqar.json"]


def test_mistakes_of_eval_are_explained(text_model: Path, numbers: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    refused(
        "eval", text_model, "--suite", "chess", says="suite must be one of perplexity, mqar, needle, decode-speed, got"
    )
    refused(
        "eval", numbers, "--suite", "needle", says="this model's tokens are numbers; it can take mqar, decode-speed"
    )
    refused("eval", text_model, "--lengths", "many", says="--lengths must be numbers with commas")
    refused("eval", text_model, "--lengths", "", says="lengths must name at least one")
    refused("eval", text_model, "--samples", 0, says="samples must be at least 1, got 0")
    refused("eval", text_model, "--segment", 0, says="segment must be at least 1, got 0")
    refused("eval", text_model, "--suite", "perplexity", "--problem", "16:3", says="--problem would be ignored")
    refused("eval", text_model, "--suite", "perplexity", "--twin", says="it belongs to decode-speed, not perplexity")
    refused("eval", text_model, "--suite", "perplexity", "--data", tmp_path / "bad.txt", says="byte 0xff at offset 2")
    refused(
        "eval", text_model, "--suite", "perplexity", "--data", data, says="length = 4,096 needs a document of that many"
    )
    refused("eval", numbers, "--suite", "mqar", "--problem", "9", says="a problem is LENGTH:PAIRS")
    refused("eval", tmp_path, says="neither a checkpoint")


def test_inspect_writes_a_page(text_model: Path, numbers: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "t.bin", tmp_path / "page.html"
    text.write_bytes(b"</script>\xff" * 9)
    result = run("inspect", text_model, "--text", text, "--output", page, "--tokens", 12)
    assert result.exit_code == 0, result.output
    content = page.read_text(encoding="utf-8")
    assert content.count("<b class=") == 12
    assert "The text goes on for 79 more, which are not shown." in content
    assert "</script>" not in content and "\\xff" in content
    text.write_text("1 2 3, 15")
    result = run("inspect", numbers, "--text", text, "--output", page)
    assert result.exit_code == 0, result.output
    assert re.findall(r">(\d+)</b>", page.read_text()) == ["1", "2", "3", "15"]
    assert "goes on" not in page.read_text()
    plain = saved(tmp_path / "plain", small_model(16, ATTENTION))
    result = run("inspect", plain, "--text", text, "--output", page)
    assert result.exit_code == 0 and "has no mixture of memories" in result.stderr
    assert "This model has no mixture of memories" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "plain", "t.bin"]


def test_mistakes_of_inspect_are_explained(text_model: Path, numbers: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "words").write_text("some words")
    (tmp_path / "far").write_text("1 16")
    page = ("--output", tmp_path / "page.html")
    refused("inspect", text_model, "--text", tmp_path / "empty", *page, says="empty' is empty")
    refused("inspect", text_model, "--text", tmp_path / "none", *page, says="--text: there is no file")
    refused(
        "inspect", text_model, "--text", tmp_path / "words", "--output", tmp_path / "a" / "b", says="there is no folder"
    )
    refused(
        "inspect", text_model, "--text", tmp_path / "words", *page, "--tokens", 0, says="--tokens must be at least 1"
    )
    refused("inspect", numbers, "--text", tmp_path / "words", *page, says="'some' in the prompt is none")
    refused(
        "inspect", numbers, "--text", tmp_path / "far", *page, says="tokens must be in [0, vocab_size = 16), got 16"
    )
    assert not (tmp_path / "page.html").exists()
