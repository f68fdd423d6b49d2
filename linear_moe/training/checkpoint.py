"""Checkpoints: folders that are whole or not there, and that say so when a byte of them has changed.

    RUN/checkpoints/step-00000200/   model.safetensors   config.yaml   state.pt   manifest.json

A checkpoint is written beside its place, flushed to the disk, and renamed. Whatever stops a run, the newest `step-*` folder
can be loaded; if one of its files was cut short or altered since, it is refused by name and the one before it is taken.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.models.extras import require
from linear_moe.models.library import load_config
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.training.files import full_disk_named, remove_folder
from linear_moe.training.manifest import MANIFEST_FILE, find_damage, write_manifest
from linear_moe.whole_files import flush

CHECKPOINTS = "checkpoints"
MODEL_FILE, CONFIG_FILE, STATE_FILE = "model.safetensors", "config.yaml", "state.pt"
STATE_FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpointError(ValueError):
    """A checkpoint's files are not what was written."""


class DamagedCheckpointWarning(UserWarning):
    """A run's newest checkpoint is damaged, and an older one was taken."""


class TrainerState(NamedTuple):
    """What a run needs beside the model to go on: tensors and plain data."""

    step: int
    optimizer: dict[str, Any]
    """By the names of the parameters: see `linear_moe.training.optimizer.optimizer_state`."""
    run: dict[str, Any]
    """The run's own options, as plain data."""
    data: dict[str, Any]
    """Where the task is in its data; empty if that follows from the step."""
    random: dict[str, Any]
    """Of `linear_moe.training.randomness.random_state`; empty to leave the sources as they are."""
    environment: dict[str, Any]
    """What the numbers depend on to the last bit, for a word when it has changed."""


def save_checkpoint(
    run: Path,
    model: LanguageModel,
    state: TrainerState,
    *,
    keep: int = 2,
    tensors: dict[str, Tensor] | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the checkpoint of a step, and remove all but the newest `keep` (0 for all kept).

    Args:
        run: the run's folder.
        model: whose configuration, and unless `tensors` are given, numbers are written.
        state: the rest.
        keep: checkpoints to keep, this one counted.
        tensors: whole tensors by name, for a model whose own are parts.
        attachments: further files by name (a tokeniser's).

    Returns:
        Its folder.

    Raises:
        DiskFullError: if there is no room; what was there before is untouched.
    """
    safetensors = require("safetensors.torch", extra="train")
    folder = run / CHECKPOINTS
    target = checkpoint_folder(run, state.step)
    aside = folder / f".step-{state.step:08d}.{os.getpid()}.tmp"
    before = checkpoints_of(run)
    remedy = f"Make room, then go on from {before[-1].name}" if before else "Make room, then start again"
    whole = model.state_dict() if tensors is None else tensors
    try:
        with full_disk_named(f"the checkpoint of step {state.step}", folder, remedy):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            contiguous = {name: tensor.contiguous() for name, tensor in whole.items()}
            safetensors.save_file(contiguous, str(aside / MODEL_FILE), metadata={"format": "pt"})
            (aside / CONFIG_FILE).write_text(model.config.to_yaml(), encoding="utf-8")
            # Through a file of Python's: torch's own writer keeps to itself why it could not write.
            with (aside / STATE_FILE).open("wb") as file:
                torch.save({"format": STATE_FORMAT, **state._asdict()}, file)
            for name, content in (attachments or {}).items():
                (aside / name).write_bytes(content)
            write_manifest(aside)
            if target.exists():
                # A folder can't be replaced in one step; this one is damaged, or holds the same step of the same run.
                remove_folder(target)
            os.replace(aside, target)
            flush(folder)
            flush(run)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if keep:
        for old in checkpoints_of(run)[:-keep]:
            remove_folder(old)
    return target


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest good one of the run that it is.

    Of a run whose newest is damaged an older one is taken, with a `DamagedCheckpointWarning` that names the file.

    Raises:
        DamagedCheckpointError: if `path` is a checkpoint that is damaged, or every one of the run is.
        ValueError: if it is neither a checkpoint nor a run that has one.
    """
    if (path / MODEL_FILE).is_file() or (path / MANIFEST_FILE).is_file():
        damage = _damage(path)
        if damage is not None:
            raise DamagedCheckpointError(f"the checkpoint {str(path)!r} is damaged: {damage}{_instead(path)}")
        return path
    found = checkpoints_of(path)
    if not found:
        raise ValueError(
            f"{str(path)!r} is neither a checkpoint (a folder with {MODEL_FILE} and {CONFIG_FILE}) nor a run that has one"
        )
    damages: list[str] = []
    for folder in reversed(found):
        damage = find_damage(folder)
        if damage is None:
            if damages:
                warnings.warn(
                    f"{'; '.join(damages)}. {folder.name} is taken instead", DamagedCheckpointWarning, stacklevel=2
                )
            return folder
        damages.append(f"the checkpoint {str(folder)!r} is damaged: {damage}")
    raise DamagedCheckpointError(f"no checkpoint of the run {str(path)!r} is good: {'; '.join(damages)}")


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones among them."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    # An empty folder is what somebody has taken the files out of, or a crash of an older version: nothing to look at.
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and any(entry.iterdir())]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def set_damaged_aside(run: Path, after: Path) -> None:
    """Rename the checkpoints that are newer than `after` to `*.damaged`, so that none is found, counted or replaced."""
    found = checkpoints_of(run)
    for folder in found[found.index(after) + 1 :]:
        target = folder.with_name(folder.name + ".damaged")
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)


def remove_leftovers(run: Path) -> None:
    """Remove what processes that were killed had begun to write. Only for the one process that trains the run."""
    for entry in (run / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(entry, ignore_errors=True)


def load_model(path: Path, *, device: torch.device | str = "cpu", impl: str = "auto") -> LanguageModel:
    """The model of a checkpoint, or of a run's newest.

    Raises:
        ValueError: if there is none, or its files do not belong together or are damaged.
    """
    return read_model(find_checkpoint(path), device=device, impl=impl)


def read_model(folder: Path, *, device: torch.device | str = "cpu", impl: str = "auto") -> LanguageModel:
    """`load_model` of a checkpoint that `find_checkpoint` has found good."""
    model = build_model(read_config(folder), device=device, impl=impl)
    try:
        model.load_state_dict(read_tensors(folder, device=device))
    except RuntimeError as error:
        raise ValueError(f"{str(folder / MODEL_FILE)!r} does not fit its {CONFIG_FILE}: {error}") from error
    return model


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint."""
    return load_config(folder / CONFIG_FILE)


def read_tensors(folder: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The model's tensors of a checkpoint.

    Raises:
        ValueError: if the file is none of safetensors.
    """
    safetensors = require("safetensors.torch", extra="train")
    file = folder / MODEL_FILE
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(str(file), device=str(device))
    except require("safetensors", extra="train").SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return tensors


def load_trainer_state(path: Path) -> TrainerState:
    """What a run needs to go on from a checkpoint, or from a run's newest.

    Raises:
        ValueError: if it has none of this format.
    """
    return read_trainer_state(find_checkpoint(path))


def read_trainer_state(folder: Path) -> TrainerState:
    """`load_trainer_state` of a checkpoint that `find_checkpoint` has found good."""
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has no {STATE_FILE}: it can be used, but training can't go on from it")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # What torch raises for a file of another kind depends on that kind.
        raise ValueError(f"{str(file)!r} holds no trainer state: {type(error).__name__}") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != STATE_FORMAT:
        what = "no trainer state" if found is None else f"trainer state of format {found}"
        raise ValueError(f"{str(file)!r} holds {what}; this version reads format {STATE_FORMAT}")
    return TrainerState(**content)


def _damage(folder: Path) -> str | None:
    # Weights that no run has written come without a manifest, and can only be taken as they are.
    of_a_run = _NAME.fullmatch(folder.name) or any((folder / name).exists() for name in (MANIFEST_FILE, STATE_FILE))
    return find_damage(folder) if of_a_run else None


def _instead(checkpoint: Path) -> str:
    """What to say of the others of the run of a damaged checkpoint."""
    run = checkpoint.parent.parent
    others = [other for other in checkpoints_of(run) if other.name != checkpoint.name and find_damage(other) is None]
    return f". The newest good one of its run is {str(others[-1])!r}" if others else ""
