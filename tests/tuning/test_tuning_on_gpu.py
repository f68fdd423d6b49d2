"""One kernel tuned for one size, and the numbers under what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")

from cases import Case, check

from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import launch_findings, launch_tables, scalar_scan
from linear_moe.tuning import search, store_outcome
from linear_moe.tuning.scan_work import ScanWork
from linear_moe.tuning.timing import time_in_turns

pytestmark = pytest.mark.gpu


def test_a_kernel_is_tuned_and_stays_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_findings.SWITCH, raising=False)
    launch_tables.forget_findings()
    device = torch.device("cuda", torch.cuda.current_device())
    work = ScanWork(Recurrence(Decay.SCALAR), 64, 64, torch.bfloat16, device, tokens=8192, heads=4)
    entry = work.entries()[0]
    outcome = search(work, entry, lambda passes: time_in_turns(passes, device))
    assert outcome.ms_before is not None and outcome.ms_before > 0
    assert outcome.timed + len(outcome.dropped) == len(entry.candidates)
    assert outcome.timed > 0, outcome.dropped
    if outcome.found is None:
        # Whatever was right is as good here: what matters is that it is taken, and right.
        right = next(each for each in entry.candidates if each not in outcome.dropped)
        outcome = outcome._replace(found=right, ms_after=outcome.ms_before)
    store_outcome(launch_findings.machine_of(device), work, outcome)
    try:
        assert scalar_scan.TABLE.pick(device, *entry.arguments) == outcome.found
        check(
            Case(Recurrence(Decay.SCALAR), (3000, 0, 70, 1), 4, 4, K=64, V=64, rate=0.1, spare=3, dtype=torch.bfloat16)
        )
    finally:
        monkeypatch.undo()
        launch_tables.forget_findings()
