"""Scans that store states and read from them in parallel, at sizes that the interpreter takes: as walks that read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DELTA_FORMS, DEVICE, DTYPES, SCALAR_FORMS, Case, check, check_drawn
from scan_laws import (
    Law,
    a_nan_stays_in_its_segment,
    chunks_in_full_change_nothing,
    every_law,
    memory_is_written_before_it_is_read,
    spare_tokens_are_not_read,
    splits_change_nothing,
)
from seeding import Bug, assert_caught, in_the_interpreter

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import blocks, delta_walks, gated_deltanet, parallel_scan, piece_gradients, piece_reads

every_form = pytest.mark.parametrize("form", SCALAR_FORMS + DELTA_FORMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES[1:], ids=str)
OF_THE_DELTA_RULE = [
    splits_change_nothing,
    chunks_in_full_change_nothing,
    spare_tokens_are_not_read,
    memory_is_written_before_it_is_read,
    a_nan_stays_in_its_segment,
]
"""What is about masks and how its kernels follow each other. The others hold of each: its walk in test_gated_deltanet.py, the
reads here, and the gradients in test_delta_wide.py.
"""


def always(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """In place of `piece_reads.takes`."""
    return True


@pytest.fixture(autouse=True)
def _stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size."""
    monkeypatch.setattr(piece_reads, "takes", always)


def test_wide_states_are_stored_and_read_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert piece_reads.takes(256, 64, torch.bfloat16)
    assert piece_reads.takes(64, 129, torch.float16)
    assert not piece_reads.takes(128, 128, torch.bfloat16)
    # Exact products fill no tensor cores: there is nothing to wait for.
    assert not piece_reads.takes(256, 256, torch.float32)


@every_form
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cpu" else DTYPES[1:], ids=str)
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype)


@every_law
def test_it_holds(law: Law, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU float32 never comes here")
    law(SCALAR_FORMS[-1], dtype, monkeypatch)


@every_dtype
@pytest.mark.parametrize("law", OF_THE_DELTA_RULE, ids=lambda law: law.__name__)
def test_it_holds_of_the_delta_rule(law: Law, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    law(DELTA_FORMS[-1], dtype, monkeypatch)


@every_form
def test_several_pieces_of_a_segment(form: Recurrence) -> None:
    """Rows in each block of a piece, and a piece that ends where the segment does."""
    length = piece_reads.choose_launch(torch.float32).piece
    check(Case(form, (length, 2 * length + 5, 1), 2, 1, K=20, V=18, rate=0.1, spare=2))


SCALAR = Case(Recurrence(Decay.SCALAR), (70, 3), K=18, V=6, spare=4)
CUT = replace(SCALAR, lengths=(2, 250), rate=0.05)
CONSTANT = replace(SCALAR, form=Recurrence(Decay.HEAD))
HEADS = replace(SCALAR, lengths=(3, 2, 2, 3), heads=4, key_heads=2)
DELTA = replace(SCALAR, form=Recurrence(Decay.SCALAR, Erase.DELTA), rate=0.2)
DELTA_HEADS = replace(DELTA, lengths=(3, 70, 2, 3), heads=4, key_heads=2)
CLEAN = {
    "scalar": SCALAR,
    "cut": CUT,
    "constant": CONSTANT,
    "heads": HEADS,
    "delta": DELTA,
    "heads of delta": DELTA_HEADS,
}


def kernels_of(case: Case) -> object:
    return gated_deltanet if case.form.erase is Erase.DELTA else parallel_scan


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("erase", Erase)
def test_what_is_read_from_stored_states(erase: Erase, rate: float) -> None:
    """Decays are mild: under strong ones a compiler may leave a state out unseen."""
    form = Recurrence(Decay.SCALAR if rate else Decay.NONE, erase)
    check(Case(form, (300, 700), heads=2, K=256, V=256, rate=rate, dtype=torch.bfloat16))


FIRST = "piece = first_piece + chunk * CHUNK // PIECE"
ERASED = "HEADS, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, SLICE, DECAY, IN_FULL, False, True, "
BUGS = {
    "the last row masked": (SCALAR, Bug(piece_reads, "valid = row < size", "valid = row < size - 1", count=2)),
    "a mask of columns dropped": (
        SCALAR,
        Bug(piece_reads, "there = each < rows_left(", "there = each < 2 + rows_left("),
    ),
    "a mask of writes dropped": (
        SCALAR,
        Bug(parallel_scan, "valid = rows < num_rows", "valid = rows < num_rows + 2"),
    ),
    "a causal mask dropped": (
        SCALAR,
        Bug(piece_reads, "decay_where(seen, summed[:, None]", "decay_between(summed[:, None]"),
    ),
    "a causal mask without a decay dropped": (
        replace(SCALAR, form=Recurrence()),
        Bug(piece_reads, "tl.where(seen, products, 0.0)", "products"),
    ),
    "heads taken in turn": (HEADS, Bug(piece_reads, "head // (HEADS // A_HEADS)", "head % A_HEADS", count=2)),
    "written heads taken in turn": (HEADS, Bug(parallel_scan, "head // (HEADS // K_HEADS)", "head % K_HEADS")),
    "a state that does not fade": (SCALAR, Bug(parallel_scan, "state *= decay_of(total)", "state *= 1.0")),
    "a write that does not fade": (SCALAR, Bug(parallel_scan, "v.to(tl.float32) * weights[:, None]", "v * 1.0")),
    "a read that does not fade": (SCALAR, Bug(piece_reads, "o *= decay_of(summed)[:, None]", "pass")),
    "a constant decay off by one position": (CONSTANT, Bug(blocks, "rate * num_rows", "rate * (num_rows + 1)")),
    "the state of the piece before": (SCALAR, Bug(parallel_scan, FIRST, FIRST + " - (chunk * CHUNK // PIECE > 0)")),
    "a state that is stored a chunk late": (SCALAR, Bug(parallel_scan, "else in_piece == 0", "else in_piece == CHUNK")),
    "a state transposed": (SCALAR, Bug(piece_reads, "V, TRANSPOSED_STATE)", "V, not TRANSPOSED_STATE)")),
    "a split's carry lost": (CUT, Bug(parallel_scan, "joined, _ = join(", "_, joined = join(")),
    "a walk begins with another's piece": (SCALAR, Bug(parallel_scan, "tl.load(first_piece_ptr + walk)", "walk")),
    "a token's own pair added twice": (
        SCALAR,
        Bug(piece_reads, "seen = seen & (row[:, None] != column[None, :])", "pass"),
    ),
    "a token's own pair forgotten": (
        SCALAR,
        Bug(piece_gradients, "_settled(own, read_ptr + at, valid)", "0 * _settled(own, read_ptr + at, valid)"),
    ),
    "two quarters of the columns exchanged": (
        SCALAR,
        Bug(piece_reads, "first, second = _halves(left)", "second, first = _halves(left)"),
    ),
    "beta forgotten in what is read": (DELTA, Bug(piece_reads, "products *= weights[None, :]", "pass")),
    "beta forgotten in what is written": (DELTA, Bug(piece_gradients, "dk *= beta[:, None]", "pass")),
    "beta forgotten in a token's own pair": (DELTA, Bug(piece_gradients, "_settled(own * beta,", "_settled(own,")),
    "the erase reads what its token writes": (
        DELTA,
        Bug(piece_gradients, f"minus, {ERASED}True", f"minus, {ERASED}False"),
    ),
    "the erase added": (DELTA, Bug(piece_gradients, f"minus, {ERASED}", f"1.0, {ERASED}")),
    "the erase put in place of the write": (
        DELTA,
        Bug(piece_gradients, "once = tl.full((ROWS,), 1.0,", "once = tl.full((ROWS,), 0.0,"),
    ),
    "what erases forgotten in the keys' gradient": (
        DELTA,
        Bug(piece_gradients, "num_tokens, minus,", "num_tokens, 0.0,"),
    ),
    "what an erase crosses forgotten": (
        DELTA,
        Bug(piece_gradients, "erased_ptr + at, erased", "erased_ptr + at, 0 * erased"),
    ),
    "a stored state of the delta rule after its chunk": (
        DELTA,
        Bug(delta_walks, "is_due = chunk * CHUNK % PIECE == 0", "is_due = chunk * CHUNK % PIECE == CHUNK"),
    ),
    "a stored gradient of the delta rule before its chunk": (
        DELTA,
        Bug(delta_walks, "is_due = (end % PIECE == 0) | (end >= size)", "is_due = chunk * CHUNK % PIECE == 0"),
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(kernels_of(case), seeded, case, tmp_path, monkeypatch)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(kernels_of(case), None, case, tmp_path, monkeypatch)
