"""The search, with a kernel and a clock that a test makes up; and that its works launch what their entries say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import (
    decode_projections,
    delta_forward,
    launch_findings,
    piece_reads,
    scalar_scan,
    scalar_walks,
)
from linear_moe.kernels.launch import Launched, launch_kernel, recorded
from linear_moe.kernels.launch_findings import Machine
from linear_moe.kernels.launch_tables import LaunchTable, trying
from linear_moe.tuning import Entry, Outcome, search, tune
from linear_moe.tuning.compiling import Variant, compile_ahead
from linear_moe.tuning.decode_works import DecodeWork, ProjectionWork
from linear_moe.tuning.scan_work import ScanWork

MACHINE = Machine("Some GPU", (9, 0), "3.6.0")
CPU = torch.device("cpu")
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="launches kernels on a CPU")


class Launch(NamedTuple):
    tile: int
    num_warps: int


FROZEN = Launch(32, 4)
TABLE = LaunchTable("some", lambda name: FROZEN, lambda name: {"tile": (16, 32, 64), "num_warps": (2, 4, 8)})


class Doubling:
    """A kernel: tiles of 64 get it wrong, tiles of 16 do not take 8 warps."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, x: Tensor, y: Tensor, TILE: int, num_warps: int) -> None:
        if (TILE, num_warps) == (16, 8):
            raise RuntimeError("out of resource: shared memory\nmore lines")
        y.copy_(2 * x)
        if TILE == 64:
            y[-1] = float("nan") if num_warps == 2 else 0.0


class Work:
    tokens, heads, device, dtype = 128, 2, CPU, torch.float32

    def __init__(self, *names: str) -> None:
        self.names, self.kernel = names or ("a",), Doubling()
        self.x = torch.arange(1.0, 5.0)

    def entries(self) -> list[Entry]:
        return [Entry(TABLE, (name,), self.kernel, {}) for name in self.names]

    def run(self) -> None:
        self.check()

    def check(self) -> dict[str, Tensor]:
        made = {}
        for name in self.names:
            launch = TABLE.pick(CPU, name)
            made[name] = torch.empty_like(self.x)
            launch_kernel(self.kernel, 1, self.x, made[name], TILE=launch.tile, num_warps=launch.num_warps)
        return made

    def exact(self) -> dict[str, Tensor]:
        return {name: 2 * self.x.double() for name in self.names}


class Clock:
    """Milliseconds of each launch by its parameters, 1 unless given."""

    def __init__(self, ms: dict[tuple[int, int], float]) -> None:
        self.ms, self.seen = ms, list[tuple[int, int]]()

    def __call__(self, passes: Sequence[Sequence[Launched]]) -> list[float]:
        keys = [[(each.options["TILE"], each.options["num_warps"]) for each in launches] for launches in passes]
        self.seen += [launches[0] for launches in keys[1:]]
        return [sum(self.ms.get(key, 1.0) for key in launches) for launches in keys]


def search_one(ms: dict[tuple[int, int], float]) -> tuple[Outcome, Clock]:
    work, clock = Work(), Clock(ms)
    return search(work, work.entries()[0], clock), clock


def test_the_fastest_right_candidate_is_found() -> None:
    # Wrong numbers and what does not run are not timed, however fast.
    outcome, clock = search_one({(16, 4): 0.9, (16, 2): 0.8, (32, 2): 0.85, (64, 4): 0.1, (64, 2): 0.1, (16, 8): 0.1})
    assert (outcome.found, outcome.ms_before, outcome.ms_after) == (Launch(16, 2), 1.0, 0.8)
    assert clock.seen == [(16, 4), (32, 2), (32, 8), (16, 2), (16, 2)]
    assert outcome.timed == 4
    assert outcome.dropped.keys() == {Launch(64, 2), Launch(64, 4), Launch(64, 8), Launch(16, 8)}
    assert "wrong numbers: a: error" in outcome.dropped[Launch(64, 4)]
    assert outcome.dropped[Launch(16, 8)] == "RuntimeError: out of resource: shared memory"
    again, same_clock = search_one({(16, 2): 0.8})
    assert again.found == outcome.found and same_clock.seen == clock.seen


def test_too_small_a_gain_is_none() -> None:
    outcome, _ = search_one({(16, 4): 0.98, (32, 2): 0.971})
    assert (outcome.found, outcome.ms_before, outcome.ms_after) == (None, 1.0, None)
    assert search_one({(32, 2): 0.969})[0].found == Launch(32, 2)


def test_a_candidate_that_was_fast_once_is_none() -> None:
    work, turns = Work(), []

    def lucky(passes: Sequence[Sequence[Launched]]) -> list[float]:
        turns.append(len(passes))
        return [1.0, 0.5 if len(turns) == 1 else 1.0][: len(passes)]

    assert search(work, work.entries()[0], lucky).found is None


def test_candidates_that_launch_the_same_are_timed_once() -> None:
    work, clock = Work(), Clock({})
    everything = LaunchTable("some", lambda name: FROZEN, lambda name: {"tile": (32,), "num_warps": (2, 4, 8)})
    launch = functools.partial(launch_kernel, work.kernel, 1, work.x)
    work.check = lambda: launch(y := torch.empty(4), TILE=32, num_warps=4) or {"a": y}  # type: ignore[method-assign]
    assert search(work, Entry(everything, ("a",), work.kernel, {}), clock).timed == 0


def test_an_entry_that_nothing_asks_for_is_none() -> None:
    work = Work()
    assert search(work, Entry(TABLE, ("a",), Doubling(), {}), Clock({})).ms_before is None
    assert search(work, Entry(TABLE, ("a",), work.kernel, {"TILE": 5}), Clock({})).ms_before is None


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def stored() -> dict[str, dict[str, int]]:
    return {str(finding.arguments[0]): finding.found for finding in launch_findings.read_findings(MACHINE)}


@pytest.mark.usefixtures("_cache")
def test_what_is_found_is_kept_when_the_rest_is_interrupted() -> None:
    clock = Clock({(32, 2): 0.5})
    entries: list[tuple[str, int]] = []

    def watch(entry: Entry, done: int) -> None:
        entries.append((str(entry), done))
        if entry.arguments == ("b",) and done == 3:
            raise KeyboardInterrupt

    outcomes = tune([Work("a", "b")], MACHINE, clock, watch)
    assert next(outcomes).found is not None
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert stored() == {"a": {"num_warps": 2}}
    assert entries == [*(("some a", done) for done in range(9)), *(("some b", done) for done in range(4))]
    (finding,) = launch_findings.read_findings(MACHINE)
    # Both of the pass's launches: nothing says which is the entry's.
    assert (finding.ms_before, finding.ms_after, finding.tokens, finding.heads) == (2.0, 1.5, 128, 2)
    assert finding.frozen == FROZEN._asdict()


@pytest.mark.usefixtures("_cache")
def test_a_later_search_has_the_last_word() -> None:
    list(tune([Work("a", "b")], MACHINE, Clock({(32, 2): 0.5})))
    assert stored() == {"a": {"num_warps": 2}, "b": {"num_warps": 2}}
    # What two works share is searched at the first.
    list(tune([Work("a"), Work("a")], MACHINE, clock := Clock({(16, 4): 0.5})))
    assert len(clock.seen) == 5
    assert stored() == {"a": {"tile": 16}, "b": {"num_warps": 2}}
    list(tune([Work("b")], MACHINE, Clock({})))
    assert stored() == {"a": {"tile": 16}}
    launch_findings.path_of(MACHINE).write_text("{")
    list(tune([Work("b")], MACHINE, Clock({(16, 4): 0.5})))
    assert stored() == {"b": {"tile": 16}}


def test_variants_are_compiled_once_each_and_may_fail() -> None:
    compiled: list[Any] = []

    class Kernel:
        def warmup(self, *arguments: object, grid: tuple[int], **options: object) -> None:
            compiled.append((arguments, options))
            if options["num_warps"] == 4:
                raise RuntimeError("does not compile")

    kernel = Kernel()
    x = torch.zeros(3, dtype=torch.bfloat16)
    launches = [Launched(kernel, 7, (x, None, 3), {"num_warps": warps}) for warps in (2, 4, 8, 2)]
    compile_ahead([Variant.of(each) for each in launches], CPU)
    assert sorted(options["num_warps"] for _, options in compiled) == [2, 4, 8]
    assert all(arguments == (torch.bfloat16, None, 3) for arguments, _ in compiled)


def test_a_dry_recording_launches_nothing_of_its_kernel_and_all_of_others() -> None:
    work, other, y = Work(), Doubling(), torch.zeros(4)
    with recorded(work.kernel, dry=True) as launches:
        launch_kernel(work.kernel, 1, work.x, y, TILE=16, num_warps=8)
        launch_kernel(other, 1, work.x, z := torch.zeros(4), TILE=32, num_warps=8)
    assert not y.any() and z.all()
    launch_kernel(work.kernel, 1, work.x, y, TILE=32, num_warps=8)
    assert [each.options["TILE"] for each in launches] == [16]


FORMS = [Recurrence(Decay.HEAD), Recurrence(Decay.SCALAR, Erase.DELTA), Recurrence(Decay.VECTOR)]


every_way = pytest.mark.parametrize("way", ["walked", "stored states", "described"])


def use_ways(patch: pytest.MonkeyPatch, way: str) -> None:
    """Of heads that are wide, or neither wide nor narrow, whatever their size."""
    stored, described = way != "walked", way != "stored states"
    patch.setattr(piece_reads, "takes", lambda key_dim, value_dim, dtype: stored)
    patch.setattr(delta_forward, "takes", lambda q, k, v, keep: described and (stored or not keep))


# The other kernels run on what a dry one left undone.
@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_way
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_works_launch_by_their_entries(form: Recurrence, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of other arguments than a kernel asks with would be tuned in vain."""
    use_ways(monkeypatch, way)
    sizes = (form, 32, 48, torch.float32, CPU)
    works = (
        ScanWork(*sizes, tokens=8, heads=1, checked=(9, 0)),
        DecodeWork(*sizes, slots=2, heads=1),
        *(ProjectionWork(most, *sizes[1:], heads=1) for most in decode_projections.LAUNCHES if way == "walked"),
    )
    for work in works:
        for entry in work.entries():
            made = []
            for launch in (entry.frozen, entry.frozen._replace(num_warps=8)):
                with trying(entry.table, entry.arguments, launch), recorded(entry.kernel, dry=True) as launches:
                    work.run()
                mine = [each.options for each in launches if entry.constants.items() <= each.options.items()]
                assert mine, f"{entry} launches nothing"
                made.append(mine)
            for one, other in zip(*made, strict=True):
                assert one != other, f"{entry} is not what was asked for"


@in_the_interpreter
def test_a_real_kernel_is_searched() -> None:
    work = ScanWork(FORMS[0], 16, 32, torch.float32, CPU, tokens=8, heads=1, checked=(9, 0, 3))
    entry, *_ = work.entries()
    outcome = search(work, entry, lambda passes: [0.5 if p[0].options["V_TILE"] == 16 else 1.0 for p in passes])
    assert not outcome.dropped
    assert outcome.found is not None and outcome.found.value_tile == 16


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("heads", "way"), [(16, "mild"), (1, "any")], ids=["long pieces", "short pieces"])
def test_gradients_of_narrow_heads_are_tuned_as_they_are_launched(heads: int, way: str) -> None:
    """Of few heads a sequence is cut into pieces too short for a launch for mild decays."""
    work = ScanWork(Recurrence(Decay.SCALAR), 16, 16, torch.float32, CPU, tokens=128, heads=heads, checked=(9, 0))
    entries = [entry for entry in work.entries() if entry.table is scalar_scan.WRITES_TABLE]
    assert [entry.arguments[0] for entry in entries] == ["mild", "any"]
    with recorded(scalar_walks.writes_kernel, dry=True) as launches:
        work.run()
    made = [entry.arguments[0] for entry in entries for x in launches if entry.constants.items() <= x.options.items()]
    assert made == [way]


@in_the_interpreter
@every_way
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_whole_chunks_are_checked_where_they_are_timed(
    form: Recurrence, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_ways(monkeypatch, way)
    work = ScanWork(form, 16, 16, torch.float32, CPU, tokens=512, heads=1, checked=(9, 0, 3))
    made, exact = work.check(), work.exact()
    assert made.keys() == exact.keys() and "output, in full" in made
    alone = {"walked": FORMS[1:2], "stored states": FORMS[:1], "described": FORMS[:2]}
    assert ("output, in full, alone" in made) == (form in alone[way])
    for name, x in exact.items():
        scale = float(x.abs().max()) + 1.0
        torch.testing.assert_close(made[name].double() / scale, x / scale, rtol=0, atol=1e-5)


@in_the_interpreter
@pytest.mark.parametrize(
    "work",
    [
        DecodeWork(FORMS[1], 16, 32, torch.float32, CPU, slots=3, heads=2),
        ProjectionWork(16, 16, 32, torch.float32, CPU, heads=2),
        ProjectionWork(32, 16, 16, torch.float32, CPU, heads=1),
    ],
    ids=["decode", "one token", "tokens"],
)
def test_a_decoded_tokens_kernels_are_right_and_measured_against_what_is_right(work: Any) -> None:
    (entry,) = work.entries()
    with trying(entry.table, entry.arguments, entry.frozen):
        made = work.check()
    assert made.keys() == work.exact().keys()
    for name, exact in work.exact().items():
        torch.testing.assert_close(made[name].double(), exact, rtol=1e-5, atol=1e-5)
