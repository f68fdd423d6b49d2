"""The chunked PyTorch form of every rule against the token loop, forward, on this machine's CPU.

    python benchmarks/chunked_vs_recurrent.py

Prints a table and writes it, with what it was measured on, to benchmarks/results/chunked_vs_recurrent.csv. The figures are
those of the best calls: other work on the machine can only add, and delays a call of two threads more than one of one. The
speed-up by the medians stands beside them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from linear_moe import ops

HERE = Path(__file__).resolve().parent
Run = Callable[[str], ops.RuleOutput]
CHUNKED_CALLS = 8
"""A round: they are short, so that more of them cost little."""


def cases(tokens: int, heads: int = 4, width: int = 64) -> dict[str, Run]:
    """Each rule's op on drawn inputs B 1, T `tokens`, H `heads`, K = V = `width`, as a function of `impl`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*last: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, *last, generator=generator)

    q, k, v = normal(width), F.normalize(normal(width), dim=-1), normal(width)
    beta = torch.sigmoid(normal())
    # As trained models start: a few per cent a token for scalar gates, GLA's sigmoid^(1/16) for channels.
    scalar, vector = -0.05 * F.softplus(normal()), F.logsigmoid(normal(width)) / 16
    dt, A, D = 0.01 + 0.09 * torch.sigmoid(normal()), -torch.linspace(1, 16, heads), torch.ones(heads)
    return {
        "linear_attention": lambda impl: ops.linear_attention(q, k, v, impl=impl),
        "retnet": lambda impl: ops.retnet(q, k, v, impl=impl),
        "gla": lambda impl: ops.gla(q, k, v, vector, impl=impl),
        "mamba2": lambda impl: ops.mamba2(q, k, v, dt, A, D, impl=impl),
        "deltanet": lambda impl: ops.deltanet(q, k, v, beta, impl=impl),
        "gated_deltanet": lambda impl: ops.gated_deltanet(q, k, v, scalar, beta, impl=impl),
    }


class Times(NamedTuple):
    """Milliseconds of every call."""

    recurrent: list[float]
    chunked: list[float]

    def speed_up(self, of: Callable[[list[float]], float]) -> float:
        """By the best calls (`of=min`), or the median ones."""
        return of(self.recurrent) / of(self.chunked)


def measure(runs: dict[str, Run], rounds: int) -> dict[str, Times]:
    """Loop and chunked form of every rule in turn, round by round: a slow minute of the machine is one of all of them."""
    times = {rule: Times([], []) for rule in runs}
    for rule, run in runs.items():
        # The time of a wrong result is no figure. These calls warm up, too.
        torch.testing.assert_close(
            run("chunked").output,
            run("recurrent").output,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda words, rule=rule: f"{rule}: {words}",
        )
    for _, (rule, run) in itertools.product(range(rounds), runs.items()):
        for impl in ("recurrent", *["chunked"] * CHUNKED_CALLS):
            start = time.perf_counter()
            run(impl)
            getattr(times[rule], impl).append(1e3 * (time.perf_counter() - start))
    return times


def provenance() -> dict[str, str]:
    """What a figure needs beside it to mean something."""
    return {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        # Anything but near 0 says that the machine had other work, and the figures are not to be trusted.
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "gflops": f"{product_speed():.0f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def product_speed() -> float:
    """GFLOP/s of a batched product as large as those of the chunked form.

    On a machine shared with others it may be half in one minute of what it was in the last. The loop, which waits for calls and
    not for arithmetic, then hardly gets slower: compare speed-ups only where this is alike.
    """
    a, b, times = torch.randn(256, 32, 64), torch.randn(256, 64, 64), []
    for _ in range(60):
        start = time.perf_counter()
        torch.bmm(a, b)
        times.append(time.perf_counter() - start)
    return 2e-9 * 256 * 32 * 64 * 64 / statistics.median(times)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048, help="T, the length of the sequence")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds: one loop, several chunked calls each")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the CSV")
    options = parser.parse_args()

    about = provenance()
    print(
        f"B1 T{options.tokens} H4 K=V=64 float32 forward, best of {options.rounds} rounds;",
        ", ".join(f"{name} {about[name]}" for name in about),
    )
    print(f"{'rule':<18}{'loop ms':>10}{'chunked ms':>12}{'speed-up':>10}{'of medians':>12}")
    rows = []
    with torch.no_grad():
        measured = measure(cases(options.tokens), options.rounds)
    for rule, times in measured.items():
        loop, chunked = map(min, times)
        best, middle = times.speed_up(min), times.speed_up(statistics.median)
        print(f"{rule:<18}{loop:>10.1f}{chunked:>12.2f}{best:>9.1f}x{middle:>11.1f}x")
        figures = {
            "loop_ms": f"{loop:.2f}",
            "chunked_ms": f"{chunked:.3f}",
            "speed_up": f"{best:.1f}",
            "speed_up_of_medians": f"{middle:.1f}",
        }
        rows.append({"rule": rule, "tokens": options.tokens, **figures, **about})
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "chunked_vs_recurrent.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"the least is {min(float(row['speed_up']) for row in rows):.1f}x; written to {path}")


if __name__ == "__main__":
    main()
