"""All entries of some works, one after the other, each stored before the next is begun."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from linear_moe.kernels.launch_findings import Machine
from linear_moe.tuning.search import Entry, Outcome, Timer, Work, search
from linear_moe.tuning.store import store_outcome


def tune(
    works: Iterable[Work],
    machine: Machine,
    timer: Timer,
    watch: Callable[[Entry, int], None] = lambda entry, done: None,
) -> Iterator[Outcome]:
    """Search every entry of the works, in order and once, and store what is found: whatever ends this, that stays.

    Args:
        works: what is tuned at.
        machine: whose findings they are.
        timer: what measures.
        watch: called before an entry, with 0, and after each of its candidates, with their number.

    Raises:
        BrokenDeviceError: if a candidate broke the GPU's context.
    """
    searched = set()
    for work in works:
        for entry in work.entries():
            if str(entry) in searched:
                # What rules share.
                continue
            searched.add(str(entry))
            watch(entry, 0)
            outcome = search(work, entry, timer, functools.partial(watch, entry))
            store_outcome(machine, work, outcome)
            yield outcome
