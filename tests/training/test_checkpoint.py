"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_models import recall_task, small_model

from linear_moe.models.extras import MissingExtraError
from linear_moe.training.checkpoint import (
    DamagedCheckpointError,
    TrainerState,
    find_checkpoint,
    load_model,
    load_trainer_state,
    save_checkpoint,
)
from linear_moe.training.files import DiskFullError
from linear_moe.training.manifest import MANIFEST_FILE, write_manifest
from linear_moe.training.metrics import MetricsFile
from linear_moe.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
from linear_moe.training.randomness import random_state, restore_random_state
from linear_moe.training.settings import TrainSettings


def _state(step: int) -> TrainerState:
    return TrainerState(step, {}, {"any": [1, "plain", None]}, {}, {}, {})


def test_a_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = small_model(rule="mamba2", balance_bias_rate=0.1)
    optimizer = build_optimizer(model, TrainSettings())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, model, TrainerState(3, optimizer_state(model, optimizer), {"a": 1}, {}, {}, {}))
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "state.pt",
    ]
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    tokens = recall_task().batch(0).tokens
    assert torch.equal(loaded(tokens), model(tokens))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    state = load_trainer_state(folder)
    assert (state.step, state.run) == (3, {"a": 1})
    other = build_optimizer(loaded, TrainSettings())
    load_optimizer_state(loaded, other, state.optimizer)
    for name, values in optimizer_state(model, optimizer).items():
        again = optimizer_state(loaded, other)[name]
        assert all(torch.equal(again[key], tensor) for key, tensor in values.items())
    with pytest.raises(ValueError, match="names 'more', which the model does not have"):
        load_optimizer_state(loaded, other, {"more": {}})


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


def _full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_in_native_code(*arguments: object, **options: object) -> None:
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")


def _full_and_hidden(*arguments: object, **options: object) -> None:
    try:
        _full()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0") from None


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [
        (os, "replace", _full),
        (os, "fsync", _full),
        (torch, "save", _full),
        (torch, "save", _full_and_hidden),
        (safetensors.torch, "save_file", _full_in_native_code),
        (Path, "write_text", _full),
        (Path, "write_bytes", _full),
        (Path, "mkdir", _full),
    ],
)
def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, fails: object
) -> None:
    model = small_model()
    save_checkpoint(tmp_path, model, _state(1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(
            DiskFullError,
            match=r"disk of .* is full .* left\): the checkpoint of step 2 could not be written.*go on from step-00000001",
        ):
            save_checkpoint(tmp_path, model, _state(2))
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_trainer_state(tmp_path).step == 1
    save_checkpoint(tmp_path, model, _state(2))
    assert load_trainer_state(tmp_path).step == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_disk_that_is_full_for_torch_itself_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    save_checkpoint(tmp_path, model, _state(1))
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda path, *a, **k: opened(Path("/dev/full") if path.name == "state.pt" else path, *a, **k),
        )
        with pytest.raises(DiskFullError, match="the checkpoint of step 2 could not be written"):
            save_checkpoint(tmp_path, model, _state(2))
    assert load_trainer_state(tmp_path).step == 1


def test_another_error_in_between_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, small_model(), _state(1))

    def denied(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", denied)
        with pytest.raises(PermissionError, match="not yours"):
            save_checkpoint(tmp_path, small_model(), _state(2))
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_under_the_metrics_is_named(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(1, loss=1.0)
        metrics._file.close()
        metrics._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 (closed with the metrics)
        with pytest.raises(
            DiskFullError, match=r"full .*: metrics\.jsonl could not be written\. Make room, then go on"
        ):
            metrics.write(2, loss=1.0)


def test_every_source_of_random_numbers_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> tuple[object, ...]:
        return torch.rand(2).tolist(), np.random.standard_normal(), random.gauss(0, 1), random.random()

    draw()
    model = small_model()
    state = _state(1)._replace(random=random_state(torch.device("cpu")))
    save_checkpoint(tmp_path, model, state)
    wanted = draw(), draw()
    restore_random_state(load_trainer_state(tmp_path).random, torch.device("cpu"))
    assert (draw(), draw()) == wanted


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(), _state(1))
    (tmp_path / "checkpoints" / ".step-00000002.99.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a checkpoint .* nor a run that has one"):
        find_checkpoint(tmp_path)
    folder = save_checkpoint(tmp_path, small_model(), _state(1))
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("model.safetensors", "config.yaml"):
        shutil.copy(folder / name, weights)
    # Weights that no run wrote have no manifest.
    load_model(weights)
    with pytest.raises(ValueError, match="training can't go on from it"):
        load_trainer_state(weights)
    other = save_checkpoint(tmp_path / "other", small_model(head_dim=8), _state(1))
    shutil.copy(other / "model.safetensors", weights)
    with pytest.raises(ValueError, match=r"does not fit its config\.yaml"):
        load_model(weights)
    (weights / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged"):
        load_model(weights)
    shutil.copy(folder / "state.pt", weights)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        load_model(weights)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"format": 1}, r"holds trainer state of format 1; this version reads format 2"),
        ({"other": 1}, r"holds no trainer state; this version reads format 2"),
        ([1], r"holds no trainer state"),
    ],
)
def test_a_state_of_another_version_is_refused(tmp_path: Path, content: object, named: str) -> None:
    folder = save_checkpoint(tmp_path, small_model(), _state(1))
    torch.save(content, folder / "state.pt")
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match=named):
        load_trainer_state(folder)


def test_without_safetensors_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"safetensors is needed .* pip install 'linear-moe\[train\]'"):
        save_checkpoint(tmp_path, small_model(), _state(1))
