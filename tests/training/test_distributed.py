"""Two processes on the CPU against one: the same losses, and checkpoints that do not know how many there were."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from linear_moe.cli import app
from linear_moe.training.checkpoint import load_model
from linear_moe.training.distributed import World, joined_world
from linear_moe.training.metrics import read_metrics

SCRIPT = Path(__file__).with_name("two_processes.py")
COMMAND = [
    "recall-single",
    "--task",
    "mqar",
    "--problem",
    "16:3",
    "--batch-size",
    "2",
    "--steps",
    "3",
    "--log-every",
    "1",
]


def _run(command: list[str], folder: Path) -> str:
    search = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    said = _run([sys.executable, "-W", "ignore::DeprecationWarning", str(SCRIPT), str(tmp_path / "runs")], tmp_path)
    assert said.splitlines() == [
        "the same losses",
        "gone on with in two, the same",
        "gone on with in one, the same",
        "divergence named",
    ]


@pytest.mark.skipif(os.name != "posix", reason="torchrun on Windows needs more than torch brings")
def test_torchrun_runs_the_same_command(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = ["-m", "linear_moe", "train", *COMMAND, "--device", "cpu", "--accumulate", "2"]
    command += ["--precision", "bfloat16", "--evaluate-every", "2", "--log-to", "tensorboard", "--output"]
    said = _run([sys.executable, *torchrun, *command, "two"], tmp_path)
    assert "2 processes" in said
    assert len(re.findall("held-out accuracy", said)) == 1
    assert len(re.findall("step 2  held out", said)) == 1
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    result = CliRunner().invoke(app, [*command[2:], str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    one, two = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        assert float((two[name] - tensor).abs().max()) < 1e-3, name


def test_batches_are_shared_evenly_or_not_at_all() -> None:
    shares = [list(World(rank, 3).batches(2, 6)) for rank in range(3)]
    assert shares == [[12, 15], [13, 16], [14, 17]]
    World(0, 3).check_accumulate(6)
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes, got 4"):
        World(0, 3).check_accumulate(4)


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined_world(torch.device("cpu")) as (world, device):
        assert (world.size, world.is_main, device.type) == (1, True, "cpu")
        assert world.gather(5) == [5]
        assert world.total(7, device) == 7
