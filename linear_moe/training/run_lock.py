"""One process trains a run: a second one on the same folder would overwrite what the first leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"


class RunLock:
    """Holds a run's folder while the context lasts; the operating system lets go of it when the process ends, however.

    Raises:
        ValueError: on entry, if another process holds it. Where locks are unknown (Windows, some network disks) none is held.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        if sys.platform != "win32":
            file = (self._run / LOCK_FILE).open("w", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ValueError(f"another process is training the run {str(self._run)!r}") from None
            except OSError:
                file.close()
            else:
                self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
