"""What every test process shares: one torch thread, hypothesis profiles, and GPU tests that are skipped in sight."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# The interpreter multiplies with numpy, whose library picks kernels for the CPU that it runs on: results would be another
# machine's in their last bits, and kernels of AVX2 add a row's products in another order where it lies elsewhere in a tile.
# This one every x86 CPU has; it is read when numpy is imported, which torch does.
os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: it decides then whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # torch.manual_seed keeps a traceback for each kind of device that may still come: milliseconds, at every call.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None

# What was found on this machine's GPU is no part of what is tested.
os.environ.setdefault("LINEAR_MOE_LAUNCH_TABLES", "off")

# Two test processes share two cores; more threads each only wait for one another.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("ci"), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        import quick_interpreter

        quick_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # What is imported stays, and the collector need not look through it again and again. It took 4% of the tests' time.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure() -> None:
    # Or Triton's bindings say that they leak.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run code in a fresh interpreter, warnings as errors, away from the tree; returns what it printed."""

    def run(code: str, *search_path: Path) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, search_path))}
        command = [sys.executable, "-W", "error", "-c", code]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    return run
