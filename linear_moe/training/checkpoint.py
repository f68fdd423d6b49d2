"""Checkpoints: folders that are whole or not there.

    RUN/checkpoints/step-00000200/   model.safetensors   config.yaml   state.pt (optimiser, step, settings)

A checkpoint is written beside its place, flushed to the disk, and renamed. Whatever stops a run, the newest `step-*` folder
can be loaded.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linear_moe.models.library import load_config
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.training.extras import require

CHECKPOINTS = "checkpoints"
MODEL_FILE, CONFIG_FILE, STATE_FILE = "model.safetensors", "config.yaml", "state.pt"
STATE_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class TrainerState(NamedTuple):
    """What a run needs beside the model to go on."""

    step: int
    optimizer: dict[str, Any]
    run: dict[str, Any]
    """The run's own options, as plain data."""


def save_checkpoint(run: Path, model: LanguageModel, state: TrainerState, *, keep: int = 2) -> Path:
    """Write the checkpoint of a step, and remove all but the newest `keep` (0 for all kept).

    Returns:
        Its folder.
    """
    safetensors = require("safetensors.torch", extra="train")
    folder = run / CHECKPOINTS
    target = folder / f"step-{state.step:08d}"
    aside = folder / f".step-{state.step:08d}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.save_file(tensors, str(aside / MODEL_FILE), metadata={"format": "pt"})
        (aside / CONFIG_FILE).write_text(model.config.to_yaml(), encoding="utf-8")
        torch.save({"format": STATE_FORMAT, **state._asdict()}, aside / STATE_FILE)
        for file in aside.iterdir():
            _flush(file)
        if target.exists():
            # A folder can't be replaced in one step; this one holds the same step of the same run.
            shutil.rmtree(target)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if os.name == "posix":
        _flush(folder)
    if keep:
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run that it is.

    Raises:
        ValueError: if it is neither.
    """
    if (path / MODEL_FILE).is_file():
        return path
    found = _checkpoints(path / CHECKPOINTS)
    if not found:
        raise ValueError(
            f"{str(path)!r} is neither a checkpoint (a folder with {MODEL_FILE} and {CONFIG_FILE}) nor a run that has one"
        )
    return found[-1]


def load_model(path: Path, *, device: torch.device | str = "cpu", impl: str = "auto") -> LanguageModel:
    """The model of a checkpoint, or of a run's newest.

    Raises:
        ValueError: if there is none, or its files do not belong together.
    """
    safetensors = require("safetensors.torch", extra="train")
    folder = find_checkpoint(path)
    model = build_model(load_config(folder / CONFIG_FILE), device=device, impl=impl)
    try:
        tensors = safetensors.load_file(str(folder / MODEL_FILE), device=str(device))
        model.load_state_dict(tensors)
    except (RuntimeError, require("safetensors", extra="train").SafetensorError) as error:
        raise ValueError(
            f"{str(folder / MODEL_FILE)!r} does not fit its {CONFIG_FILE} or is damaged: {error}"
        ) from error
    return model


def load_trainer_state(path: Path) -> TrainerState:
    """What a run needs to go on from a checkpoint, or from a run's newest.

    Raises:
        ValueError: if it has none of this format.
    """
    file = find_checkpoint(path) / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{str(file.parent)!r} has no {STATE_FILE}: it can be used, but training can't go on from it")
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.pop("format", None) != STATE_FORMAT:
        raise ValueError(f"{str(file)!r} holds no trainer state of format {STATE_FORMAT}")
    return TrainerState(**content)


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and (entry / MODEL_FILE).is_file()]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def _flush(path: Path) -> None:
    """Force a file (or, on POSIX, a folder's entries) to the disk: a rename may survive a crash that the data does not."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
