"""Ctrl-C, as a shell sends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.training.checkpoint import load_model, load_trainer_state


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_leaves_a_loadable_checkpoint_and_exits_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linear_moe", "train", "recall-single", "--task", "mqar", "--steps", "100000"]
    command += ["--problem", "16:3", "--batch-size", "2", "--output", str(tmp_path / "run"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted after step" in output
    assert "linear-moe train --resume" in output
    assert "Traceback" not in errors
    load_model(tmp_path / "run")
    assert load_trainer_state(tmp_path / "run").step >= 1
