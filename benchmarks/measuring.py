"""What the benchmarks on a GPU have in common: graphs, and figures with what they were measured on."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import triton

WARM_UP_RUNS = 3


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What a function launches, after it has run on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


def median_ms(function: Callable[[], object], *, warmup: int = 25, rep: int = 100) -> float:
    """Milliseconds of a call, the median of those of `rep` ms after `warmup` ms; before each the L2 cache is overwritten."""
    value: float = triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")
    return value


def provenance() -> dict[str, str]:
    """The GPU, the releases, the day and the commit (COMMIT in the environment, where there is no repository)."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or commit.stdout.strip() or "unknown",
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file, its folder made if need be. A row may lack what another has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, object]]:
    """What `write_rows` wrote, as text; what a row lacks it lacks again."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]


def updated(
    old: Sequence[dict[str, object]], new: Sequence[dict[str, object]], names: Sequence[str]
) -> list[dict[str, object]]:
    """The old rows, each replaced by a new one of the same `names` if there is one; then the other new ones."""
    by_name = {tuple(row[name] for name in names): row for row in old}
    by_name |= {tuple(row[name] for name in names): row for row in new}
    return list(by_name.values())
