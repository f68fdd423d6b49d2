"""SIGKILL at random moments, and at every operation on a file: each time the run goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.training.run_lock import RunLock

SCRIPT = Path(__file__).with_name("killing.py")


@pytest.mark.skipif(os.name != "posix", reason="forks, and sends a POSIX signal")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(SCRIPT), "both", str(tmp_path), "--kills", "8"]
    search = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "8 kills in" in result.stdout
    operations = re.search(r"killed at (\d+) operations", result.stdout)
    assert operations is not None
    assert int(operations[1]) > 15


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_run_is_trained_by_one_process(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(ValueError, match="another process is training the run"),
        RunLock(tmp_path),
    ):
        pass
    with RunLock(tmp_path):
        pass
