"""Metrics as JSON lines: one object a line, whole and on disk as soon as it is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from linear_moe.models.model import LanguageModel
from linear_moe.training.files import full_disk_named
from linear_moe.whole_files import replace_text


class MetricsFile:
    """Appends objects to `path`. Lines of steps after `keep_to_step` are dropped first: a resumed run does those again."""

    def __init__(self, path: Path, *, keep_to_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= keep_to_step] if path.exists() else []
        self._path = path
        with self._full_disk_named():
            replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """One line: `{"step": step, ...}`. Numbers that are no numbers become null: JSON has none."""
        with self._full_disk_named():
            self._file.write(json.dumps(_finite({"step": step, **values}), allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What a full disk kept from being written was said when it happened; closing tries it once more.
        with contextlib.suppress(OSError):
            self._file.close()

    def _full_disk_named(self) -> contextlib.AbstractContextManager[None]:
        remedy = "Make room, then go on from the newest checkpoint"
        return full_disk_named(self._path.name, self._path.parent, remedy)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file. A last line that a crash cut short is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def routing_summary(model: LanguageModel) -> list[dict[str, Any]]:
    """How evenly each mixture of memories routed its last batch."""
    return [
        {
            "layer": index,
            "load": [round(share, 4) for share in layer.routing.load.tolist()],
            "entropy": round(float(layer.routing.entropy), 4),
            "balance_loss": round(float(layer.routing.balance_loss), 4),
        }
        for index, layer in model.memory_layers()
        if layer.routing is not None
    ]


def loads_in_words(model: LanguageModel) -> str:
    """How the memories of the last batch were loaded, on average over the layers with as many; empty without mixtures."""
    by_number: dict[int, list[list[float]]] = {}
    for _, layer in model.memory_layers():
        if layer.routing is not None:
            by_number.setdefault(layer.num_memories, []).append(sorted(layer.routing.load.tolist(), reverse=True))
    # Sorted first: memory 0 of one layer has nothing to do with memory 0 of another.
    means = ([sum(ranked) / len(loads) for ranked in zip(*loads, strict=True)] for loads in by_number.values())
    shown = (" ".join(f"{share:.0%}" for share in mean) for mean in means)
    return f"memory loads {', '.join(shown)}" if by_number else ""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        # NaN and the infinities are the values whose difference with themselves is no 0.
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
