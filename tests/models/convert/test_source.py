"""The files of a checkpoint: shards, and what is missing, damaged or of another kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linear_moe.models.convert import read_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(peer: Any, saved: dict[str, Path], tmp_path: Path) -> Path:
    """The same model as `saved["retnet"]`, in shards of the peer's writer."""
    folder = tmp_path / "sharded"
    model = peer.model("retnet")
    model.load_state_dict(load_file(saved["retnet"] / "model.safetensors"))
    peer.save(model, folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def refused(folder: Path, *messages: str) -> None:
    with pytest.raises(ValueError, match=re.escape(messages[0])) as caught:
        read_checkpoint(folder)
    for message in messages:
        assert message in str(caught.value)


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_shards_are_one_checkpoint(saved: dict[str, Path], sharded: Path) -> None:
    whole, parts = read_checkpoint(saved["retnet"]).tensors, read_checkpoint(sharded).tensors
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = shard(sharded)
    gone.unlink()
    refused(sharded, f"the shard {str(gone)!r} is missing: it holds ")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    cut = shard(sharded)
    cut.write_bytes(cut.read_bytes()[:keep])
    refused(sharded, f"{str(cut)!r} is damaged or cut short: ")


def test_a_truncated_file_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(saved["gla"], folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(folder, f"{str(file)!r} is damaged or cut short: ")


def test_a_shard_without_what_the_index_promises_is_named(sharded: Path) -> None:
    poor = shard(sharded)
    tensors = load_file(poor)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors or {"other": torch.ones(1)}, poor)
    refused(sharded, str(poor), f"lacks {name}", INDEX)


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "the file of a must be one of its own folder, got '../elsewhere"),
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(sharded: Path, index: Any, message: str) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, message)


def test_folders_that_are_no_checkpoint_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere' is no folder")
    refused(tmp_path, "has no config.json")
    for text, message in (("{", "is no JSON"), ("[1]", "must hold a mapping, got list"), ("[" * 99999, "is no JSON")):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, message)
    shutil.copy(saved["gla"] / "config.json", tmp_path)
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "pytorch_model.bin is a pickle, which is not read: save it again as safetensors")


def test_tensors_of_another_kind_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["gla"] / "model.safetensors")
    name = "model.layers.0.attn.q_proj.weight"
    for changed, message in (
        (tensors[name].to(torch.int8), f"{name} is torch.int8; only float32, bfloat16"),
        (tensors[name][:-1].clone(), f"{name} must be [16, 32] by its config.json, got [15, 32]"),
    ):
        folder = tmp_path / str(changed.dtype)
        shutil.copytree(saved["gla"], folder)
        save_file(tensors | {name: changed}, folder / "model.safetensors")
        refused(folder, message)
    extra = tmp_path / "extra"
    shutil.copytree(saved["gla"], extra)
    save_file(tensors | {"model.layers.0.attn.q_proj.bias": torch.ones(16)}, extra / "model.safetensors")
    refused(extra, "holds model.layers.0.attn.q_proj.bias, which a gla of its config.json does not have")
