"""Files that outlive whatever stops a run: flushed to the disk, taken away in one step, and a full disk said in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the writers of safetensors and torch.save say when their own code met the full disk.
_FULL_WORDS = ("No space left", "StorageFull", "os error 28", "code: 28", "Disk quota", "QuotaExceeded")


class DiskFullError(OSError):
    """There was no room for a file; says for which, and what is still good."""


@contextlib.contextmanager
def full_disk_named(what: str, folder: Path, remedy: str) -> Iterator[None]:
    """Inside, a full disk is a `DiskFullError` that says what could not be written, where, and what to do.

    Args:
        what: the thing being written, in words.
        folder: that it goes to.
        remedy: what is still good, and how to go on.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _is_full(error):
            raise
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        raise DiskFullError(
            f"the disk of {str(folder)!r} is full ({free:,} bytes left): {what} could not be written. {remedy}"
        ) from error


def remove_folder(path: Path) -> None:
    """Remove a folder whose name must never stand for half of it: renamed out of the way first."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: native writers wrap it, and torch.save hides it behind one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
