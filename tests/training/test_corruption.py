"""A byte that changed and a file cut short, anywhere in a checkpoint: refused by name, and the one before is taken."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from small_models import small_config
from test_run import Watcher
from typer.testing import CliRunner

from linear_moe.cli import app
from linear_moe.training.checkpoint import (
    DamagedCheckpointError,
    DamagedCheckpointWarning,
    checkpoints_of,
    find_checkpoint,
    load_model,
    load_trainer_state,
)
from linear_moe.training.metrics import read_metrics
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.run import resume_run, start_run
from linear_moe.training.settings import TrainSettings

DAMAGES = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    plan = RunPlan(
        TaskOptions(task="mqar", problems=("16:3",), batch_size=2), TrainSettings(steps=3), 1, checkpoint_every=1
    )
    start_run(small_config(), plan, folder).train(Watcher())
    assert [checkpoint.name for checkpoint in checkpoints_of(folder)] == ["step-00000002", "step-00000003"]
    return folder


def _damage(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if draw.random() < 0.7:
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    else:
        del content[draw.randrange(len(content)) :]
    file.write_bytes(content)


def test_no_damage_is_loaded_silently_and_each_is_named(run: Path) -> None:
    newest = checkpoints_of(run)[-1]
    files = sorted(file.name for file in newest.iterdir())
    assert files == ["config.yaml", "manifest.json", "model.safetensors", "state.pt"]
    good = load_model(newest.with_name("step-00000002")).state_dict()
    draw = random.Random(7)
    for index in range(DAMAGES):
        name = files[index % len(files)]
        whole = (newest / name).read_bytes()
        _damage(newest / name, draw)
        for load in (load_model, load_trainer_state):
            with pytest.raises(DamagedCheckpointError, match=rf"step-00000003' is damaged: {name} .*step-00000002'"):
                load(newest)
        with pytest.warns(DamagedCheckpointWarning, match=rf"damaged: {name} .*step-00000002 is taken instead"):
            resumed = resume_run(run)
        assert resumed.step == 2
        state = resumed.model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in good.items())
        (newest / name).write_bytes(whole)
    assert find_checkpoint(run) == newest


def test_a_file_that_is_gone_is_damage_too(run: Path, tmp_path: Path) -> None:
    newest = checkpoints_of(run)[-1]
    for file in list(newest.iterdir()):
        hidden = file.rename(tmp_path / file.name)
        with pytest.warns(DamagedCheckpointWarning, match=rf"{file.name} is missing"):
            assert find_checkpoint(run).name == "step-00000002"
        hidden.rename(file)


def test_going_on_puts_the_damaged_one_aside_and_does_its_steps_again(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = read_metrics(folder / "metrics.jsonl")
    newest = checkpoints_of(folder)[-1]
    whole = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(whole[:-1])
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: ")
    assert "model.safetensors has" in result.stderr
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003", "step-00000003.damaged"]
    assert (newest / "model.safetensors").read_bytes() == whole
    for lines in (before, after := read_metrics(folder / "metrics.jsonl")):
        for line in lines:
            line.pop("tokens_per_second", None)
    assert after == before


def test_a_run_with_no_good_checkpoint_says_what_is_wrong_with_each(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for checkpoint, name in zip(checkpoints_of(folder), ("state.pt", "config.yaml"), strict=True):
        (checkpoint / name).write_bytes(b"")
    for command in (["train", "--resume"], ["generate"]):
        result = CliRunner().invoke(app, [*command, str(folder)])
        assert result.exit_code == 1
        assert "no checkpoint of the run" in result.stderr
        assert "state.pt has 0 bytes" in result.stderr
        assert "config.yaml has 0 bytes" in result.stderr
        assert "Traceback" not in result.stderr
