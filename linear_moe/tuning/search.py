"""One entry of a launch table: its candidates, compiled, held against the error budget, and timed beside the frozen entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from linear_moe.kernels.launch import Launched, recorded
from linear_moe.kernels.launch_tables import LaunchTable, frozen_tables, plain_arguments, trying
from linear_moe.testing.budget import error_budget
from linear_moe.tuning.compiling import Variant, compile_ahead

LEAST_GAIN = 0.03
"""Of the frozen entry's time. Less is within what two measurements of the same kernel differ by."""

Timer = Callable[[Sequence[Sequence[Launched]]], Sequence[float]]
"""Milliseconds of each of several passes' launches, taken in turns."""


class BrokenDeviceError(RuntimeError):
    """A candidate left the GPU in a state in which this process can do no more with it."""


class Entry(NamedTuple):
    """An entry of a launch table, and the launches that follow it."""

    table: LaunchTable[Any]
    arguments: tuple[Any, ...]
    kernel: Any
    """That it launches."""
    constants: Mapping[str, Any]
    """Of those launches: others of the kernel follow another entry."""

    @property
    def frozen(self) -> Any:
        """The frozen launch parameters."""
        return self.table.frozen(*self.arguments)

    @property
    def candidates(self) -> list[Any]:
        """What else is tried, in this order."""
        return self.table.candidates(*self.arguments)

    def __str__(self) -> str:
        return " ".join((self.table.name, *map(str, plain_arguments(self.arguments))))


class Work(Protocol):
    """What kernels are tuned at: a pass through all that some entries launch."""

    tokens: int
    heads: int
    device: torch.device
    dtype: torch.dtype

    def entries(self) -> list[Entry]:
        """What can be tuned at it."""

    def run(self) -> None:
        """The pass that is timed."""

    def check(self) -> dict[str, Tensor]:
        """Results of a pass, smaller and less regular, that a candidate must get right."""

    def exact(self) -> dict[str, Tensor]:
        """The same in float64 by other means."""


class Outcome(NamedTuple):
    """What came of an entry."""

    entry: Entry
    found: Any | None
    """The launch parameters that are faster, if any are."""
    ms_before: float | None
    """Of the frozen entry. None where the work launches nothing by this entry."""
    ms_after: float | None
    """Of what was found."""
    dropped: dict[Any, str]
    """Candidates that do not compile, do not fit, or give wrong numbers, and why."""
    timed: int
    """How many candidates were timed."""


def search(work: Work, entry: Entry, timer: Timer, on_candidate: Callable[[int], None] = lambda done: None) -> Outcome:
    """The fastest right candidate for an entry, if it takes at least `LEAST_GAIN` less time than the frozen one.

    Args:
        work: what launches it.
        entry: of `work.entries()`.
        timer: what measures.
        on_candidate: called after each candidate, with their number.

    Raises:
        BrokenDeviceError: if a candidate broke the GPU's context.
    """
    with frozen_tables():
        exact = work.exact()
        reference = _results(work, entry, entry.frozen)
        baseline = _launches(work, entry, entry.frozen)
        if not baseline:
            return Outcome(entry, None, None, None, {}, 0)
        if hasattr(entry.kernel, "params"):
            # The interpreter compiles nothing.
            compile_ahead(_to_compile(work, entry), work.device)
        seen, dropped = [_shape(baseline)], dict[Any, str]()
        best, best_ratio, timed = None, 1.0, 0
        for done, candidate in enumerate(entry.candidates, 1):
            try:
                launches = _launches(work, entry, candidate, dry=True)
                if _shape(launches) not in seen:
                    seen.append(_shape(launches))
                    wrong = _wrong(_results(work, entry, candidate), reference, exact, work.dtype)
                    if wrong:
                        dropped[candidate] = wrong
                    else:
                        before, after = timer((baseline, _launches(work, entry, candidate)))
                        timed += 1
                        if after / before < best_ratio:
                            best, best_ratio = candidate, after / before
            except Exception as problem:
                # A compiler, a driver, and what is between them fail in many ways.
                dropped[candidate] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
                _still_works(work, entry, candidate, problem)
            on_candidate(done)
        if best is not None and best_ratio <= 1 - LEAST_GAIN:
            # The fastest of several is partly the luckiest: it must be as fast again.
            before, after = timer((baseline, _launches(work, entry, best)))
            if after <= (1 - LEAST_GAIN) * before:
                return Outcome(entry, best, before, after, dropped, timed)
        (before,) = timer((baseline,))
        return Outcome(entry, None, before, None, dropped, timed)


def _results(work: Work, entry: Entry, launch: Any) -> dict[str, Tensor]:
    with trying(entry.table, entry.arguments, launch):
        return work.check()


def _launches(work: Work, entry: Entry, launch: Any, *, dry: bool = False) -> list[Launched]:
    """The launches of a pass that follow the entry."""
    with trying(entry.table, entry.arguments, launch), recorded(entry.kernel, dry=dry) as launches:
        work.run()
    return [
        launched
        for launched in launches
        if all(launched.options.get(name) == value for name, value in entry.constants.items())
    ]


def _to_compile(work: Work, entry: Entry) -> list[Variant]:
    """What the candidates launch, in both passes."""
    wanted: list[Variant] = []
    for candidate in entry.candidates:
        with trying(entry.table, entry.arguments, candidate):
            for run in (work.run, work.check):
                with recorded(entry.kernel, dry=True) as launches:
                    run()
                wanted += [Variant.of(launched) for launched in launches]
    return wanted


def _shape(launches: Sequence[Launched]) -> list[dict[str, Any]]:
    """What tells launches by one candidate from those by another, which may be the same on narrow inputs."""
    return [launched.options for launched in launches]


def _wrong(
    results: Mapping[str, Tensor], reference: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> str | None:
    """What of the results is not within the budget that the frozen entry's own error gives."""
    over = [budget for budget in error_budget(results, reference, exact, dtype) if not budget.holds]
    return f"wrong numbers: {over[0]}" if over else None


def _still_works(work: Work, entry: Entry, candidate: Any, problem: Exception) -> None:
    if work.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(work.device)
        torch.zeros(1, device=work.device).item()
    except RuntimeError as error:
        raise BrokenDeviceError(
            f"{entry} with {candidate} left the GPU unusable for this process ({problem}); what was found before is kept"
        ) from error
