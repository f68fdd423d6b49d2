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
    turned_scan,
)

SCRIPT = Path(__file__).with_name("compiled.py")
UNFADED = "settle_tiles_kernel"
HEADS_FACTORS = "factors_of_heads_kernel"
FAMILIES: dict[str, tuple[tuple[ModuleType, ...], tuple[int, ...], set[str]]] = {
    "mamba2": ((scalar_walks, parallel_scan, piece_reads, turned_scan), (256, 64), {HEADS_FACTORS}),
    "gated_deltanet": ((delta_walks, delta_along_keys, delta_forward), (256, 128), {UNFADED}),
    "gla": ((gla_walks,), (64,), set()),
}
"""A rule of each, the modules that have its kernels, widths of all ways that they go, and what its rule does not launch.
Of each kernel the widest that has it is compiled: narrower ones take less memory.
"""


def compiled(cache: Path, rule: str, *how: str) -> set[str]:
    """The kernels of a rule that compiled, in another process: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rules", rule, "--threads", "1", *how],
        env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {line.partition(":")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("rule", FAMILIES)
def test_every_kernel_of_a_scan_compiles_for_hopper(rule: str, tmp_path: Path) -> None:
    modules, dims, absent = FAMILIES[rule]
    expected = {
        name
        for module in modules
        for name, x in vars(module).items()
        if name.endswith("_kernel") and hasattr(x, "fn") and x.fn.__module__ == module.__name__
    }
    # Of whole chunks a kernel is the same without its masks.
    made = compiled(tmp_path, rule, "--once", "--shapes", "cut", "--head-dims", *map(str, dims))
    assert expected, modules
    assert expected - absent <= made, sorted(expected - absent - made)


def test_what_a_delta_rule_without_a_decay_launches_besides_compiles_for_hopper(tmp_path: Path) -> None:
    assert compiled(tmp_path, "deltanet", "--shapes", "cut", "--head-dims", "128", "--kernels", UNFADED) == {UNFADED}
