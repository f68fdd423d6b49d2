"""What is timed, with events that are made up: in turns, from memory, and by the median."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.kernels.launch import Launched
from linear_moe.tuning import timing


def test_passes_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    class Kernel:
        """Takes the milliseconds it is told, and much longer once in a while."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.launch

        def launch(self, name: str, ms: float) -> None:
            order.append(name)
            now[0] += 100 * ms if len(order) % 9 == 0 else ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "CACHE_BYTES", 16)
    kernel = Kernel()
    one = [Launched(kernel, 1, (), {"name": "one", "ms": 3.0})]
    two = [Launched(kernel, 1, (), {"name": name, "ms": 2.5}) for name in ("two", "too")]
    assert timing.time_in_turns((one, two), torch.device("cpu")) == [3.0, 5.0]
    assert order == ["one", "two", "too"] * (timing.WARM_ROUNDS + timing.ROUNDS)
