"""Carried states on disk, of a layer or a model: written whole or not at all, read without running what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

STATE_FORMAT = 1


def write_state_file(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` to a file, aside first and then renamed: what stands at `path` is always whole."""
    target = Path(path)
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"format": STATE_FORMAT, **content}, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def read_state_file(path: str | Path, kind: str, key: str, device: torch.device | str | None) -> dict[str, Any]:
    """What `write_state_file` wrote.

    Args:
        path: of the file.
        kind: what it should hold, for the message.
        key: what its content must have.
        device: to put its tensors on; where they were unless given.

    Raises:
        ValueError: if the file holds nothing of that kind and format.
    """
    wrong = f"{path} holds no {kind} state of format {STATE_FORMAT}"
    try:
        content: Any = torch.load(Path(path), map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # What torch raises for a file of another kind depends on that kind.
        raise ValueError(f"{wrong}: {type(error).__name__}") from error
    if not isinstance(content, dict) or content.get("format") != STATE_FORMAT or key not in content:
        raise ValueError(wrong)
    return content
