"""A model in a folder: `model.safetensors` and `config.yaml`, whole or not there.

It is written beside its place, flushed to the disk, and renamed. A training checkpoint is such a folder with one file more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_moe.models.extras import require
from linear_moe.models.library import load_config
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.whole_files import flush

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.yaml"

_NAMES_SHOWN = 3


def check_new_folder(folder: Path) -> None:
    """Raise ValueError unless nothing would be overwritten at `folder`: it is not there, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{str(folder)!r} is already there; remove it, or choose another place")


def write_model_folder(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model.

    Args:
        folder: where; it must not be there yet, or be empty. Folders above it are made.
        config: what the tensors belong to.
        tensors: the model's state by name.

    Raises:
        ValueError: if something is there already, or the tensors are not those of `config`.
        OSError: if it can't be written; then nothing is left.
    """
    check_new_folder(folder)
    _check_tensors(
        build_model(config, device="meta"), {name: tensor.shape for name, tensor in tensors.items()}, "tensors"
    )
    safetensors = require("safetensors.torch", extra="train")
    folder = folder.absolute()
    aside = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            safetensors.save_file(whole, str(aside / MODEL_FILE), metadata={"format": "pt"})
        except require("safetensors", extra="train").SafetensorError as error:
            # A full disk, most of all.
            raise OSError(f"{str(folder / MODEL_FILE)!r} can't be written: {error}") from error
        (aside / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        for file in aside.iterdir():
            flush(file)
        if folder.is_dir():
            # Empty, by the check above; where it no longer is, this fails and leaves it alone.
            folder.rmdir()
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush(folder.parent)


def read_model_folder(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    auxiliary: str = "attach",
) -> LanguageModel:
    """The model of a folder.

    Args:
        folder: what `write_model_folder` wrote, or a training checkpoint.
        device: of the parameters.
        dtype: of the parameters; as stored unless given. A rule's gate parameters stay float32 in a 16-bit model.
        impl: as in `LanguageModel`.
        auxiliary: as in `LanguageModel`.

    Raises:
        ValueError: if there is none, or its files are damaged or do not belong together.
    """
    file = folder / MODEL_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no model's folder: it has no {MODEL_FILE}")
    safetensors = require("safetensors", extra="train")
    config = load_config(folder / CONFIG_FILE)
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    if dtype is None and "embedding.weight" in tensors:
        dtype = tensors["embedding.weight"].dtype
    model = build_model(config, device, dtype, impl, auxiliary=auxiliary)
    _check_tensors(model, {name: tensor.shape for name, tensor in tensors.items()}, repr(str(file)))
    model.load_state_dict(tensors)
    return model


def _check_tensors(model: LanguageModel, came: Mapping[str, Any], what: str) -> None:
    """Raise unless the names and shapes that came are the model's."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for label, names in (("lacks", wanted.keys() - came.keys()), ("has the unknown", came.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{what} {label} {shown_names(names)}: it does not belong to its {CONFIG_FILE}")
    for name, shape in came.items():
        if tuple(shape) != tuple(wanted[name]):
            raise ValueError(f"{what}: {name} must be {list(wanted[name])} by its {CONFIG_FILE}, got {list(shape)}")


def shown_names(names: Any) -> str:
    """The first few of some names, sorted, and how many there are besides."""
    ordered = sorted(names)
    rest = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
