"""Kernels compile for a Hopper GPU with the Triton that is installed, and fit its shared memory, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.kernels import (
    delta_along_keys,
    delta_forward,
    delta_walks,
    gla_walks,
    parallel_scan,
    piece_reads,
    scalar_walks,
    wide_scan,
)

SCRIPT = Path(__file__).with_name("compiled.py")
FAMILIES: dict[str, tuple[tuple[ModuleType, ...], tuple[int, ...]]] = {
    "mamba2": ((scalar_walks, parallel_scan, piece_reads, wide_scan), (64, 256)),
    "gated_deltanet": ((delta_walks, delta_along_keys, delta_forward), (128, 256)),
    "gla": ((gla_walks,), (64,)),
}
"""A rule of each, the modules that have its kernels, and widths of all ways that they go. Narrower ones take less memory."""


@pytest.mark.parametrize("rule", FAMILIES)
def test_every_kernel_of_a_scan_compiles_for_hopper(rule: str, tmp_path: Path) -> None:
    modules, dims = FAMILIES[rule]
    expected = {
        name
        for module in modules
        for name, x in vars(module).items()
        if name.endswith("_kernel") and hasattr(x, "fn") and x.fn.__module__ == module.__name__
    }
    # Another process: here kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Of whole chunks a kernel is the same without its masks.
    how = ["--rules", rule, "--shapes", "cut", "--threads", "1", "--head-dims", *map(str, dims)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *how], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert expected, modules
    assert expected <= made, sorted(expected - made)
