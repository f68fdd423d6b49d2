"""All entries of some works, one after the other, each stored before the next is begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from linear_moe.kernels.launch_findings import Machine
from linear_moe.tuning.search import Entry, Outcome, Timer, Work, search
from linear_moe.tuning.store import store_outcome


def tune(
    works: Iterable[Work],
    machine: Machine,
    timer: Timer,
    on_candidate: Callable[[Entry], None] = lambda entry: None,
) -> Iterator[Outcome]:
    """Search every entry of every work, in order, and store what is found: whatever ends this, that stays.

    Args:
        works: what is tuned at.
        machine: whose findings they are.
        timer: what measures.
        on_candidate: called after each candidate of an entry.

    Raises:
        BrokenDeviceError: if a candidate broke the GPU's context.
    """
    for work in works:
        for entry in work.entries():
            outcome = search(work, entry, timer, lambda entry=entry: on_candidate(entry))  # type: ignore[misc]
            store_outcome(machine, work, outcome)
            yield outcome
