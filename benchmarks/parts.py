"""Small steps of a layer on one GPU: how each is timed, and the command line of what times them.

A step is timed twice: called as it is, where launching takes part and caches are cold, and as a captured graph, over and over,
which is the GPU's own time with warm caches. The floor is the time to move each input and output once at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

FLOOR_BYTES_PER_S = 3.0e12
Grid = tuple[str, Any, list[Any]]
"""A part's name, the module whose `LAUNCH` it takes, and what to try there."""


class Part(NamedTuple):
    """Something timed."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    nbytes: int
    """Of every input and output once."""


def called(function: Callable[[], object]) -> float:
    """Microseconds of a call, launching included."""
    value: float = triton.testing.do_bench(function, warmup=25, rep=200, return_mode="median")
    return 1e3 * value


def captured(function: Callable[[], object]) -> float | None:
    """Microseconds as a captured graph; None for what can't be captured."""
    try:
        value: float = triton.testing.do_bench_cudagraph(function, rep=50, return_mode="median")
    except RuntimeError as error:
        print(f"not captured: {error}", file=sys.stderr)
        return None
    return 1e3 * value


def table(rows: list[dict[str, object]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def measure(part: Part, shape: object) -> dict[str, object]:
    """One line of the table."""
    floor = 1e6 * part.nbytes / FLOOR_BYTES_PER_S
    graph = captured(part.ours)
    ours, theirs = called(part.ours), called(part.theirs)
    return {
        "shape": shape,
        "part": part.name,
        "MB moved": round(part.nbytes / 1e6, 2),
        "floor us": round(floor, 1),
        "graph us": "-" if graph is None else round(graph, 1),
        "over the floor": "-" if graph is None else round(graph / floor, 2),
        "call us": round(ours, 1),
        "PyTorch us": round(theirs, 1),
        "speed-up": f"{theirs / ours:.1f}x",
    }


def fastest(parts: Mapping[str, Part], grids: Iterable[Grid]) -> list[dict[str, object]]:
    """Every entry of the grids, fastest first within a part."""
    rows = []
    for name, module, values in grids:
        times: list[tuple[float, object]] = []
        for value in values:
            with mock.patch.object(module, "LAUNCH", value):
                time = captured(parts[name].ours)
            if time is not None:
                times.append((time, value))
        rows += [
            {"part": name, "us": round(time, 1), "launch": value} for time, value in sorted(times, key=lambda x: x[0])
        ]
    return rows


def main(
    description: str | None,
    timed: Callable[[], Iterable[tuple[Part, object]]],
    tuned: Callable[[], list[dict[str, object]]],
) -> None:
    """Time the parts of `timed` with their shapes, or with `--tune` print what `tuned` found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time a grid of launch parameters instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{parser.prog} times kernels on a GPU: it needs a CUDA device")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    if arguments.tune:
        print(table(tuned()))
        return
    rows = []
    for part, shape in timed():
        rows.append(measure(part, shape))
        print(*rows[-1].values(), sep="  ", flush=True)
    print("\n" + table(rows))
