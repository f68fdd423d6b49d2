"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Precision = Annotated[str, typer.Option(help="Of parameters and arithmetic: float32 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice unless given.")]


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(precision: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: if it is none of those.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision must be one of {', '.join(_DTYPES)}, got {precision!r}")
    return _DTYPES[precision]


def choose_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: if it is unknown or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not on this machine: torch finds {torch.cuda.device_count()} CUDA devices"
        )
    return device


def set_threads(threads: int | None) -> None:
    """Limit torch's threads.

    Raises:
        ValueError: if the number is below 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
