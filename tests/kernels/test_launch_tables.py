"""Findings are taken where they hold, ignored where they do not, and change no size that outlives a pass."""

from __future__ import annotations

import contextlib
import json
import operator
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DELTA_FORMS, FORMS, SCALAR_FORMS, VECTOR_FORMS, Case, draw, kernels, piece_length, results
from scan_laws import use_processors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import (
    decode,
    delta_forward,
    gated_deltanet,
    gla,
    launch_findings,
    launch_tables,
    library,
    parallel_scan,
    piece_gradients,
    piece_reads,
    scalar_scan,
    wide_scan,
)
from linear_moe.kernels.launch_findings import Finding, LaunchFindingsWarning, Machine
from linear_moe.kernels.launch_tables import LaunchTable, trying

GPU = torch.device("cuda", 0)
MACHINE = Machine("Some GPU 80GB", (9, 0), "3.6.0")
BF16 = torch.bfloat16


class Launch(NamedTuple):
    chunk: int
    tile: int
    num_warps: int


def frozen(key_dim: int, dtype: torch.dtype) -> Launch:
    return Launch(chunk=64, tile=key_dim, num_warps=4)


TABLE = LaunchTable("some", frozen, lambda key_dim, dtype: {"tile": (64, 128), "num_warps": (4, 8)})
FINDING = Finding("some", (64, "bfloat16"), frozen(64, BF16)._asdict(), {"num_warps": 8}, 1.0, 0.5, 128, 2)


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is not there, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_findings.SWITCH, raising=False)
    monkeypatch.setattr(launch_tables, "machine_of", lambda device: MACHINE)
    launch_tables.forget_findings()
    yield
    launch_tables.forget_findings()


def write(*findings: Finding, machine: Machine = MACHINE) -> Path:
    return launch_findings.write_findings(machine, findings)


def test_a_finding_is_taken_where_it_holds(tmp_path: Path) -> None:
    path = write(FINDING)
    assert path == tmp_path / "linear_moe" / "launch" / "Some-GPU-80GB-sm90-triton-3.6.0.json"
    assert [*path.parent.iterdir()] == [path]
    assert launch_findings.read_findings(MACHINE) == [FINDING]
    assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 8)
    assert TABLE.pick(GPU, 64, torch.float16) == Launch(64, 64, 4)
    assert TABLE.pick(GPU, 128, BF16) == Launch(64, 128, 4)
    assert TABLE.pick(torch.device("cpu"), 64, BF16) == Launch(64, 64, 4)
    with launch_tables.frozen_tables():
        assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 4)
    assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 8)
    assert launch_tables.findings_in_use(GPU) == [FINDING]
    assert launch_tables.describe_tables(GPU).startswith("1 findings (")
    assert launch_tables.describe_tables(torch.device("cpu")) == "frozen"


def test_without_a_file_nothing_is_said_and_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, choices = [], []
    monkeypatch.setattr(launch_tables, "read_findings", lambda machine: looks.append(machine) or [])
    monkeypatch.setattr(TABLE, "frozen", lambda *arguments: choices.append(arguments) or frozen(*arguments))
    for _ in range(5):
        assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 4)
        assert TABLE.pick(GPU, 128, BF16) == Launch(64, 128, 4)
    assert looks == [MACHINE]
    assert choices == [(64, BF16), (128, BF16)]
    assert launch_tables.describe_tables(GPU) == "frozen"


DAMAGES = {
    "cut short": (lambda text: text[:-20], "is damaged"),
    "empty": (lambda text: "", "is damaged"),
    "not text": (lambda text: b"\xff\xfe", "is damaged"),
    "another kind": (lambda text: "[1, 2]", "is damaged"),
    "a field gone": (lambda text: text.replace('"ms_after"', '"ms"'), "is damaged"),
    "words for numbers": (lambda text: text.replace('"num_warps": 8', '"num_warps": "8"'), "is damaged"),
    "of other tables": (lambda text: text.replace('"table_version": 1', '"table_version": 0'), "another version"),
    "of another GPU": (lambda text: text.replace("Some GPU", "Other GPU"), "another machine"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(name: str) -> None:
    damage, says = DAMAGES[name]
    path = write(FINDING)
    damaged: Any = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.warns(LaunchFindingsWarning, match=says) as told:
        picked = [TABLE.pick(GPU, key_dim, BF16) for key_dim in (64, 128, 64)]
    assert picked == [frozen(key_dim, BF16) for key_dim in (64, 128, 64)]
    assert len(told) == 1
    assert str(path) in str(told[0].message)


@pytest.mark.parametrize(
    "finding",
    [
        FINDING._replace(frozen=frozen(64, BF16)._replace(chunk=32)._asdict()),
        FINDING._replace(found={"num_warps": 16}),
        FINDING._replace(found={"chunk": 128}),
    ],
    ids=["the frozen entry is another", "no candidate", "no parameter that may vary"],
)
def test_a_finding_that_is_no_candidate_is_ignored(finding: Finding) -> None:
    write(finding)
    with pytest.warns(LaunchFindingsWarning, match="of other launch tables"):
        assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 4)


def test_findings_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(FINDING)
    monkeypatch.setenv(launch_findings.SWITCH, "off")
    path.write_text("{")
    assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 4)
    monkeypatch.setenv(launch_findings.SWITCH, "of")
    launch_tables.forget_findings()
    with pytest.raises(ValueError, match="LINEAR_MOE_LAUNCH_TABLES must be on or off, got 'of'"):
        TABLE.pick(GPU, 64, BF16)


def test_the_home_folder_is_where_findings_are_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert launch_findings.folder() == Path("/home/somebody/.cache/linear_moe/launch")


def test_what_is_tried_is_undone() -> None:
    with trying(TABLE, (64, BF16), Launch(64, 128, 8)):
        with trying(TABLE, (128, BF16), Launch(64, 64, 8)):
            for device in (GPU, torch.device("cpu")):
                assert TABLE.pick(device, 64, BF16) == Launch(64, 128, 8)
                assert TABLE.pick(device, 128, BF16) == Launch(64, 64, 8)
        assert TABLE.pick(GPU, 128, BF16) == Launch(64, 128, 4)
    assert TABLE.pick(GPU, 64, BF16) == Launch(64, 64, 4)


def arguments_of(
    form: Recurrence, K: int, V: int, dtype: torch.dtype
) -> list[tuple[LaunchTable[Any], tuple[Any, ...]]]:
    """Every entry that kernels of a form may ask for."""
    decay, erase = form.decay.value, form.erase.value
    entries: list[tuple[LaunchTable[Any], tuple[Any, ...]]] = [(decode.TABLE, (decay, erase, K, V, dtype))]
    ways = [(K, V), (V, K)]
    if form.erase is Erase.DELTA:
        # The transitions of a split are walked with K columns.
        sizes = [(K, V), (K, K)]
        walks = ("forward", "values", "values in full", "gradients")
        entries += [(gated_deltanet.TABLE, (name, decay, *each, dtype)) for name in walks for each in sizes]
        entries += [
            (gated_deltanet.SOLVE_TABLE, (decay, K, dtype)),
            (delta_forward.SOLVE_TABLE, (decay, K, dtype)),
            (delta_forward.TABLE, (decay, K, V, dtype)),
        ]
        entries += [(piece_reads.TABLE, (decay, "weighted", K, V, dtype))]
    elif form.decay is Decay.VECTOR:
        entries += [(gla.TABLE, (name, K, V, dtype)) for name in ("prepare", "walk", "states", "gradients")]
    else:
        made = ("output", "output backwards", "overlap", "overlap backwards", "turned", "turned backwards", "states")
        entries += [(scalar_scan.TABLE, (name, decay, *way, dtype)) for name in made for way in ways]
        entries += [(scalar_scan.WRITES_TABLE, (which, decay, K, V, dtype)) for which in ("mild", "any")]
        entries += [(parallel_scan.TABLE, (decay, *way, dtype)) for way in ways]
        entries += [(piece_reads.TABLE, (decay, "plain", K, V, dtype)), (wide_scan.TABLE, (decay, K, V, dtype))]
    if form.decay is not Decay.VECTOR:
        kernels = ("scan",) if form.erase is Erase.NONE else ("writes", "reads")
        entries += [(piece_gradients.TABLE, (name, decay, K, V, dtype)) for name in kernels]
    return list({(table.name, arguments): (table, arguments) for table, arguments in entries}.values())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_candidates_are_few_and_change_no_shared_size(form: Recurrence) -> None:
    tables = set()
    for dtype in (torch.float32, torch.float16, BF16):
        for K, V in ((16, 16), (64, 64), (128, 128), (128, 64), (256, 256)):
            for table, arguments in arguments_of(form, K, V, dtype):
                entry, found = table.frozen(*arguments), table.candidates(*arguments)
                assert 2 <= len(found) <= launch_tables.MOST_CANDIDATES
                assert len({*found, entry}) == len(found) + 1
                assert found == table.candidates(*arguments)
                for launch in found:
                    for fixed in {"chunk", "piece"} & set(launch._fields):
                        assert getattr(launch, fixed) == getattr(entry, fixed)
                    if dtype != torch.float32 and table is not decode.TABLE:
                        # `blocks.tile_of` says why.
                        assert min(getattr(launch, name, 64) for name in ("tile", "key_tile", "value_tile")) >= 64
                changes = [sum(a != b for a, b in zip(launch, entry, strict=True)) for launch in found]
                assert changes == sorted(changes)
                assert entry._asdict() == json.loads(json.dumps(entry._asdict()))
                tables.add(table.name)
    assert len(tables) >= 2


@contextlib.contextmanager
def findings(form: Recurrence, K: int, V: int, dtype: torch.dtype) -> Iterator[None]:
    """For every entry a candidate: with narrower tiles, where it has tiles, and else the one that is farthest away."""
    with contextlib.ExitStack() as stack:
        for table, arguments in arguments_of(form, K, V, dtype):
            (tile,) = {"tile", "value_tile", "rows"} & set(table.choices(*arguments)) or {"num_warps"}
            launch = min(reversed(table.candidates(*arguments)), key=operator.attrgetter(tile))
            assert launch != table.frozen(*arguments)
            stack.enter_context(trying(table, arguments, launch))
        yield


FAMILIES = {"scalar_scan": SCALAR_FORMS[-1], "gated_deltanet": DELTA_FORMS[-1], "gla": VECTOR_FORMS[-1]}
OPERATORS = {"scalar_scan": library._scalar, "gated_deltanet": library._delta, "gla": library._vector}


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("scalar_scan", False),
        ("scalar_scan", True),
        ("gated_deltanet", False),
        ("gated_deltanet", True),
        ("gla", False),
    ],
)
def test_passes_and_fakes_agree_under_findings(name: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor need both passes have the same findings: a graph compiled elsewhere, or a resumed one, may not."""
    form = FAMILIES[name]
    if stored:
        monkeypatch.setattr(piece_reads, "takes", lambda key_dim, value_dim, dtype: True)
    # So long and wide that it is cut, and would not be if narrower tiles were counted.
    use_processors(monkeypatch, form, 6 if name == "gla" else 4)
    case = Case(form, (106,), K=20, V=68 if name == "gla" else 36, rate=0.1)
    assert stored or piece_length(case) == 32
    tensors = {x: y.requires_grad_() for x, y in draw(case).items()}
    last = (True,) if name == "gla" else (form.decay.value, True)
    order = [x for x in ("q", "k", "v", "log_decay", "beta", "initial_state") if x in tensors]

    def forward(mode: FakeTensorMode | None = None) -> Any:
        given = [*(tensors[x] for x in order), case.cu_seqlens]
        with mode or contextlib.nullcontext():
            given = [x if mode is None else mode.from_tensor(x) for x in given]
            return OPERATORS[name](*given, case.max_length, True, 0.5, True, *last)

    def gradients(made: Any) -> tuple[Tensor, ...]:
        seeds = [torch.ones_like(x) for x in made[:2]]
        return torch.autograd.grad(made[:2], [tensors[x] for x in order], seeds)

    plain = forward()
    wanted = (*plain[:2], *gradients(plain))
    with findings(form, case.K, case.V, case.dtype):
        found, faked = forward(), forward(FakeTensorMode())
    assert [x.shape for x in faked] == [x.shape for x in found] == [x.shape for x in plain]
    # By then the findings are gone.
    for one, other in zip((*found[:2], *gradients(found)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_interpreter_takes_what_is_tried() -> None:
    """Or the test above would say nothing: a finding that can't run is noticed."""
    case = replace(Case(SCALAR_FORMS[0], (9,), K=20, V=20), initial=False)
    arguments = ("output", "none", 20, 20, case.dtype)
    broken = scalar_scan.TABLE.frozen(*arguments)._replace(value_tile=3)
    with trying(scalar_scan.TABLE, arguments, broken), warnings.catch_warnings(), pytest.raises(Exception, match=r"."):
        results(kernels, case, draw(case))
