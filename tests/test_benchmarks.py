"""The benchmark scripts run, and write what they measured with what they measured it on."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import linear_moe

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "chunked_vs_recurrent.py"


def test_chunked_vs_recurrent(tmp_path: Path) -> None:
    options = ["--tokens", "70", "--repeats", "1", "--output", tmp_path / "results"]
    command = [sys.executable, "-W", "error", SCRIPT, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "results" / "chunked_vs_recurrent.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["rule"] for row in rows} <= set(linear_moe.rule_names())
    assert {row["rule"] for row in rows} == set(linear_moe.ops.__all__) - {"RuleOutput"}
    assert all(row["cpu"] and row["torch"] and row["date"] and row["commit"] for row in rows)
    assert all(f"{row['speed_up']}x" in result.stdout for row in rows)


@pytest.mark.parametrize("name", ["conv_part.py", "decoding.py"])
def test_a_script_says_that_it_needs_a_gpu(name: str) -> None:
    """All that it imports is there."""
    command = [sys.executable, "-W", "error", SCRIPT.parent / name]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr == f"{name} times kernels on a GPU: it needs a CUDA device\n"
