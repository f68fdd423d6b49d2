"""Checkpoints: whole or not there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_models import recall_task, small_model

from linear_moe.training.checkpoint import (
    TrainerState,
    find_checkpoint,
    load_model,
    load_trainer_state,
    save_checkpoint,
)
from linear_moe.training.extras import MissingExtraError
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings


def _state(step: int) -> TrainerState:
    return TrainerState(step, {}, {"any": [1, "plain", None]})


def test_a_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small_model(rule="mamba2", balance_bias_rate=0.1)
    optimizer = build_optimizer(model, TrainSettings())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, model, TrainerState(3, optimizer.state_dict(), {"a": 1}))
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "model.safetensors", "state.pt"]
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    tokens = recall_task().batch(0).tokens
    assert torch.equal(loaded(tokens), model(tokens))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    state = load_trainer_state(folder)
    assert (state.step, state.run) == (3, {"a": 1})
    assert state.optimizer["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_tied_and_a_16_bit_model_are_saved(tmp_path: Path) -> None:
    model = small_model().bfloat16()
    save_checkpoint(tmp_path, model, _state(1))
    tensors = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensors[name].float(), tensor.float()) for name, tensor in model.state_dict().items())


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    model = small_model()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, model, _state(step), keep=2)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000010"]
    assert find_checkpoint(tmp_path).name == "step-00000010"
    save_checkpoint(tmp_path, model, _state(10))
    assert load_trainer_state(tmp_path).step == 10


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failure_in_between_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    model = small_model()
    save_checkpoint(tmp_path, model, _state(1))

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, model, _state(2))
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_trainer_state(tmp_path).step == 1


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(), _state(1))
    (tmp_path / "checkpoints" / ".step-00000002.99.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a checkpoint .* nor a run that has one"):
        find_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, small_model(), _state(1))
    shutil.copy(save_checkpoint(tmp_path / "other", small_model(head_dim=8), _state(1)) / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"does not fit its config\.yaml or is damaged"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"does not fit its config\.yaml or is damaged"):
        load_model(folder)
    torch.save({"format": 99}, folder / "state.pt")
    with pytest.raises(ValueError, match="holds no trainer state of format 1"):
        load_trainer_state(folder)
    (folder / "state.pt").unlink()
    with pytest.raises(ValueError, match="training can't go on from it"):
        load_trainer_state(folder)


def test_without_safetensors_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"safetensors is needed .* pip install 'linear-moe\[train\]'"):
        save_checkpoint(tmp_path, small_model(), _state(1))
