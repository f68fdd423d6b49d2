"""A model in a folder: whole or not there, and what is no such folder is told from one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linear_moe.models import LanguageModel, ModelConfig, build_model
from linear_moe.models.model_folder import read_model_folder, write_model_folder

CONFIG = ModelConfig.from_yaml("""\
hidden_size: 8
vocab_size: 11
blocks:
  memory: {mixer: {type: mom, num_heads: 1, head_dim: 4, balance_bias_rate: 0.1}, ffn: {type: swiglu, width: 8}}
layers: memory
""")


def make(dtype: torch.dtype = torch.float32) -> LanguageModel:
    return build_model(CONFIG, dtype=dtype)


def write(folder: Path, model: LanguageModel | None = None) -> LanguageModel:
    model = model or make()
    write_model_folder(folder, model.config, model.state_dict())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write(tmp_path / "deep" / "er" / "model", make(dtype))
    loaded = read_model_folder(tmp_path / "deep" / "er" / "model")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))


def test_another_dtype_is_read_from_what_is_stored(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    narrow = read_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        wanted = model.state_dict()[name]
        assert torch.equal(tensor, wanted if tensor.dtype == torch.float32 else wanted.bfloat16())
    assert narrow.embedding.weight.dtype == torch.bfloat16
    assert narrow.state_dict()["blocks.0.mixer.gate_parameters.A_log"].dtype == torch.float32


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"model' is already there; remove it, or choose another place"):
        write(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file' is already there"):
        write(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert read_model_folder(tmp_path / "empty").config == CONFIG


def _full(*arguments: object, **keywords: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_to_safetensors(*arguments: object, **keywords: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "owner, name, failure",
    [
        (os, "replace", _full),
        (os, "fsync", _full),
        (safetensors.torch, "save_file", _full_to_safetensors),
        (Path, "write_text", _full),
    ],
)
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, failure: Callable[..., None]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model")


def test_tensors_of_another_model_are_not_written(tmp_path: Path) -> None:
    tensors = make().state_dict()
    short = {name: tensor for name, tensor in tensors.items() if name != "head.weight"}
    with pytest.raises(ValueError, match=r"tensors lacks head.weight: it does not belong to its config.yaml"):
        write_model_folder(tmp_path / "model", CONFIG, short)
    with pytest.raises(ValueError, match="tensors has the unknown other"):
        write_model_folder(tmp_path / "model", CONFIG, tensors | {"other": torch.ones(1)})
    assert not (tmp_path / "model").exists()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no model's folder: it has no model.safetensors"):
        read_model_folder(tmp_path)
    write(tmp_path / "good")
    file = tmp_path / "good" / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"rubbish" * 9):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged: "):
            read_model_folder(tmp_path / "good")
    file.write_bytes(whole)
    tensors = load_file(file)
    for changed, message in (
        (
            {name: t for name, t in tensors.items() if "norm" not in name},
            r"lacks blocks.0.ffn_norm.weight, blocks.0.mixer",
        ),
        (tensors | {"norm.weight": torch.ones(9)}, r"norm.weight must be \[8\] by its config.yaml, got \[9\]"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            read_model_folder(tmp_path / "good")
    (tmp_path / "good" / "config.yaml").unlink()
    with pytest.raises(ValueError, match="no such file"):
        read_model_folder(tmp_path / "good")
