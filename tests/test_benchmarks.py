"""The benchmark scripts run, and write what they measured with what they measured it on."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import linear_moe

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "chunked_vs_recurrent.py"


def test_chunked_vs_recurrent(tmp_path: Path) -> None:
    options = ["--tokens", "70", "--rounds", "1", "--output", tmp_path / "results"]
    command = [sys.executable, "-W", "error", SCRIPT, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "results" / "chunked_vs_recurrent.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["rule"] for row in rows} <= set(linear_moe.rule_names())
    assert {row["rule"] for row in rows} == set(linear_moe.ops.__all__) - {"RuleOutput"}
    assert all(row["cpu"] and row["torch"] and row["date"] and row["commit"] for row in rows)
    assert all(f"{row['speed_up']}x" in result.stdout for row in rows)


def test_text_curve(tmp_path: Path) -> None:
    """Of a run's metrics as `linear-moe train` writes them."""
    scores = {"bits_per_byte": 3.5, "perplexity": 11.0, "unigram_bits_per_byte": 4.4}
    lines = [{"step": step, "loss": 5.0 / step} for step in (1, 2, 3)] + [{"step": 3, "held_out": scores}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    outputs = {"--output": tmp_path / "curve.csv", "--plot": tmp_path / "curve.png"}
    command = [
        sys.executable,
        SCRIPT.parent / "text_curve.py",
        tmp_path,
        *(x for pair in outputs.items() for x in pair),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    with outputs["--output"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["bits_per_byte"]) for row in rows] == pytest.approx(
        [5 / step / math.log(2) for step in (1, 2, 3)], abs=1e-4
    )
    assert [row["held_out_bits_per_byte"] for row in rows] == ["", "", "3.5"]
    assert outputs["--plot"].read_bytes().startswith(b"\x89PNG")
    assert "held out 3.500 at step 3, where the bytes' entropy is 4.400" in result.stdout


def test_rows_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes the place of the old one of its names, the others stay as they were, and a new one comes last."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    measuring = importlib.import_module("measuring")
    path, names = tmp_path / "rows.csv", ("shape", "rule")
    old = [{"shape": "B8", "rule": "gla", "ms": "0.70"}, {"shape": "B8", "rule": "retnet"}]
    measuring.write_rows(path, old)
    assert measuring.read_rows(path) == old
    new = [{"shape": "B1", "rule": "gla", "ms": 0.9}, {"shape": "B8", "rule": "gla", "ms": 0.5}]
    assert measuring.updated(old, new, names) == [new[1], old[1], new[0]]
    assert measuring.updated([], new, names) == new


def test_the_scans_figures_drawn_again(tmp_path: Path) -> None:
    """Of the file that is published: its table is the one in the docs."""
    plot = tmp_path / "kernels.png"
    command = [sys.executable, "-W", "error", SCRIPT.parent / "kernels.py", "--update", "--rules", "--plot", plot]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result.stdout in (SCRIPT.parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")


NEEDS_A_GPU = {
    "kernels.py": "times kernels",
    "conv_part.py": "times kernels",
    "block_parts.py": "times kernels",
    "mom_parts.py": "times kernels",
    "decoding.py": "times kernels",
    "experts.py": "times a layer",
    "layers.py": "times layers",
    "training.py": "times training",
}
RUN_EACH = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_what_needs_a_gpu_says_so() -> None:
    """All that it imports is there. One process runs them all: what takes seconds is to import torch."""
    scripts = [str(SCRIPT.parent / script) for script in NEEDS_A_GPU]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_EACH, *scripts], capture_output=True, text=True, timeout=120, check=False,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [f"{script} {what} on a GPU: it needs a CUDA device" for script, what in NEEDS_A_GPU.items()]
    assert result.stdout.splitlines() == said
