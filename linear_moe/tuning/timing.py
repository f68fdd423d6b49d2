"""Milliseconds of launches on a GPU, of several taken in turns, so that what drifts hits all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from linear_moe.kernels.launch import Launched

ROUNDS = 60
WARM_ROUNDS = 5
CACHE_BYTES = 256 << 20
"""More than any GPU's cache holds: written before each measurement, so that launches read from memory, as in a model."""


def time_in_turns(passes: Sequence[Sequence[Launched]], device: torch.device) -> list[float]:
    """The median milliseconds of each pass: all of its launches, one after the other, with nothing in the caches."""
    with torch.cuda.device(device):
        scratch = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in passes]
        for turn in range(WARM_ROUNDS + ROUNDS):
            for launches, taken in zip(passes, events, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The host gets ahead while this is written: its own time is not measured.
                scratch.zero_()
                begin.record()
                for launched in launches:
                    launched.again()
                end.record()
                if turn >= WARM_ROUNDS:
                    taken.append((begin, end))
        torch.cuda.synchronize()
        return [statistics.median(begin.elapsed_time(end) for begin, end in taken) for taken in events]
