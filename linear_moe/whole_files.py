"""Files that are whole or not there: written aside, flushed, and renamed. A leaf, that kernels and training import."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Force a file, or on POSIX a folder's entries, to the disk: a rename may survive a crash that the data does not."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it: what stands at `path` is always whole."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    os.replace(aside, path)
