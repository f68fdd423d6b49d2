"""Carried states on disk, of a layer or a model: written whole or not at all, read without running what is in them.

    torch.save's bytes   8 bytes that say what file this is   32 bytes: the SHA-256 of torch.save's

A file that was cut short lacks its end, one that was altered does not match it: neither is ever loaded.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from linear_moe.whole_files import flush

STATE_FORMAT = 2
_MARK = b"LMSTATE%d" % STATE_FORMAT
_END = len(_MARK) + hashlib.sha256().digest_size
_BLOCK = 1 << 20


def write_state_file(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` to a file, aside first, flushed, and then renamed: what stands at `path` is always whole."""
    target = Path(path)
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w+b") as file:
            torch.save({"format": STATE_FORMAT, **content}, file)
            size = file.seek(0, os.SEEK_END)
            file.write(_MARK + _digest(file, size))
        flush(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    flush(target.parent)


def read_state_file(path: str | Path, kind: str, key: str, device: torch.device | str | None) -> dict[str, Any]:
    """What `write_state_file` wrote.

    Args:
        path: of the file.
        kind: what it should hold, for the message.
        key: what its content must have.
        device: to put its tensors on; where they were unless given.

    Raises:
        ValueError: if the file holds nothing of that kind and format, was cut short, or altered.
    """
    wrong = f"{path} holds no {kind} state of format {STATE_FORMAT}"
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _END
        file.seek(max(size, 0))
        end = file.read()
        if size < 0 or not end.startswith(_MARK):
            raise ValueError(f"{wrong}: it is another file, or was cut short")
        if end[len(_MARK) :] != _digest(file, size):
            raise ValueError(f"{path} is damaged: it does not match its own checksum")
        file.seek(0)
        try:
            content: Any = torch.load(file, map_location=device, weights_only=True)
        except OSError:
            raise
        except Exception as error:
            # What torch raises for a content of another kind depends on that kind.
            raise ValueError(f"{wrong}: {type(error).__name__}") from error
    if not isinstance(content, dict) or content.get("format") != STATE_FORMAT or key not in content:
        raise ValueError(wrong)
    return content


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first `size` bytes. Leaves the file where they end."""
    file.seek(0)
    digest = hashlib.sha256()
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.digest()
