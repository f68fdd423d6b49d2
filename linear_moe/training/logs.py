"""Where a run's numbers go beside its JSON lines: TensorBoard and trackio."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from linear_moe.models.extras import require

LOGS = ("tensorboard", "trackio")
TENSORBOARD_FOLDER = "tensorboard"
TRACKIO_PROJECT = "linear-moe"


class Log(Protocol):
    """Takes a step's numbers by name."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoardLog:
    """Event files in RUN/tensorboard; what an earlier attempt wrote of later steps is hidden."""

    def __init__(self, run: Path, start: int) -> None:
        require("tensorboard", extra="tensorboard")
        tensorboard = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer: Any = tensorboard.SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class TrackioLog:
    """A run named after the folder in trackio's project linear-moe, on this machine."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self._trackio: Any = require("trackio", extra="trackio")
        # A run that is gone on with goes on there too.
        self._trackio.init(project=TRACKIO_PROJECT, name=run.name, config=dict(config), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One entry."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is written."""
        self._trackio.finish()


@contextlib.contextmanager
def open_logs(names: tuple[str, ...], run: Path, *, start: int, config: Mapping[str, Any]) -> Iterator[list[Log]]:
    """The logs of these names, closed at the end.

    Args:
        names: of `LOGS`.
        run: the run's folder.
        start: steps that have been done.
        config: what is told of the run, as plain data.

    Raises:
        MissingExtraError: if a log's package is not installed.
    """
    with contextlib.ExitStack() as stack:
        logs: list[Log] = []
        for name in names:
            log: Log = TensorBoardLog(run, start) if name == "tensorboard" else TrackioLog(run, config)
            stack.callback(log.close)
            logs.append(log)
        yield logs


def require_logs(names: tuple[str, ...]) -> None:
    """Raises MissingExtraError if the package of one of the logs is not installed."""
    for name in names:
        require(name, extra=name)


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a line of metrics, by their path: `routing/0/load/2`. A layer's entries go by the layer's number."""
    found: dict[str, float] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, (int, float)):
            found[path] = value
        elif isinstance(value, Mapping):
            found.update(scalars(value, f"{path}/"))
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                if isinstance(part, Mapping):
                    rest = {key: inner for key, inner in part.items() if key != "layer"}
                    found.update(scalars(rest, f"{path}/{part.get('layer', index)}/"))
                else:
                    found.update(scalars({str(index): part}, f"{path}/"))
    return found
