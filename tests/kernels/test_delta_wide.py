"""The delta rule of wide heads, whose forward walk reads, and leaves what a backward pass needs.

At sizes that the interpreter takes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scan_laws
import torch
from cases import (
    DELTA_FORMS,
    DEVICE,
    DTYPES,
    Case,
    check_drawn,
    check_telescoping,
    described,
    draw,
    kernels,
    nearly_parallel,
    new_heads,
    results,
)
from scan_laws import LAWS, Law, widened, widths_of_three_tiles_are_within_the_budget
from seeding import Bug, assert_caught, in_the_interpreter
from torch import Tensor

from linear_moe.forms import Recurrence
from linear_moe.kernels import delta_forward, delta_walks, descriptors, gated_deltanet, piece_reads
from linear_moe.kernels.splits import Ragged

every_form = pytest.mark.parametrize("form", DELTA_FORMS, ids=str)
HALF = torch.float16
every_half = pytest.mark.parametrize("dtype", [HALF] if DEVICE == "cpu" else DTYPES[1:], ids=str)
"""Exact products take other kernels."""
SCALAR = DELTA_FORMS[-1]


def learning(case: Case) -> Case:
    """The same with gradients, with rows of whole 16 bytes."""
    return replace(described(case), learns=True)


def always(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """In place of `piece_reads.takes`."""
    return True


def all_in_16_bits(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> bool:
    """In place of `delta_forward.takes`. In the interpreter float32 too, whose pieces are short."""
    return DEVICE == "cpu" or k.dtype != torch.float32


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads are, whatever their width."""
    monkeypatch.setattr(piece_reads, "takes", always)
    monkeypatch.setattr(delta_forward, "takes", all_in_16_bits)
    monkeypatch.setattr(scan_laws, "widened", lambda case: learning(widened(case)))


def test_wide_heads_in_16_bits_that_can_be_described_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: True)
    wide, narrow, odd = (new_heads(width, torch.bfloat16) for width in (256, 128, 250))
    takes = delta_forward.takes
    assert takes(wide, wide, wide, keep=True)
    assert takes(wide, wide, narrow, keep=True)
    assert takes(narrow, narrow, wide, keep=True)
    assert not takes(narrow, narrow, narrow, keep=True)
    assert not takes(odd, odd, odd, keep=True)
    assert not takes(*(new_heads(256, torch.float32),) * 3, keep=True)


def test_it_runs_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing here would test it."""
    calls, forward = [], delta_forward.forward

    def counted(*given: object, keep: bool, **named: object) -> object:
        calls.append(keep)
        return forward(*given, keep=keep, **named)

    monkeypatch.setattr(delta_forward, "forward", counted)
    case = learning(Case(SCALAR, (5,), dtype=HALF))
    results(kernels, case, draw(case))
    assert calls and all(calls)


@every_form
@every_half
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype, learning)


@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES[1:], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_holds(law: Law, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    law(SCALAR, dtype, monkeypatch)


def test_widths_of_three_tiles_without_a_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose queries' gradient is put right along the key where it is made."""
    widths_of_three_tiles_are_within_the_budget(DELTA_FORMS[0], HALF, monkeypatch)


@every_form
@every_half
@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_keys_nearly_parallel(form: Recurrence, dtype: torch.dtype, apart: float) -> None:
    case = Case(form, (70, 5), K=136, V=8, rate=0.05, dtype=dtype)
    check_telescoping(case, nearly_parallel(case, apart), roundings=1)


def chunks(case: Case, inputs: dict[str, Tensor], length: int) -> Tensor:
    """-E diag(b) and scale R diag(b) of chunks of some tokens, from a solve of their own."""
    ragged = Ragged(case.cu_seqlens, case.max_length, False)
    cuts = ragged.pieces(case.num_tokens, length)
    gates = gated_deltanet.gates_by_head(inputs.get("log_decay"), inputs["beta"], cuts.borders, length, exact=False)
    heads = case.heads
    made = inputs["k"].new_zeros(2, case.num_tokens, heads, length)
    delta_forward.launch_kernel(
        delta_walks.solve_kernel, cuts.num_pieces * heads, inputs["q"], inputs["k"], gates.sums, gates.beta, made, None, None,
        None, cuts.borders, 2, case.num_tokens, 0.5, HEADS=heads, K_HEADS=case.key_heads, K=case.K, PIECE=length, CHUNK=length,
        SHORT=length, LEVELS=length.bit_length() - 1, K_BLOCK=16, DECAY=delta_forward.DECAY_KINDS[case.form.decay],
        IN_FULL=False, PACKED=False, WEIGHTED=True, PRECISION=delta_forward.inverse_precision_of(HALF), num_warps=4,
        num_stages=1,
    )  # fmt: skip
    return made


@every_form
def test_short_chunks_are_the_blocks_on_the_long_ones_diagonals(form: Recurrence) -> None:
    case = Case(form, (70, 0, 33, 5), heads=2, K=16, V=16, rate=0.1, spare=3, dtype=HALF)
    inputs = draw(case)
    walk = gated_deltanet.walk_of(
        inputs["k"], inputs["v"], inputs.get("log_decay"), inputs["beta"], Ragged(case.cu_seqlens, case.max_length, False),
        form.decay,
    )  # fmt: skip
    short = torch.zeros(2, case.num_tokens, case.heads, 32, dtype=HALF, device=DEVICE)
    gated_deltanet.solve(inputs["q"], inputs["k"], inputs["v"], walk, scale=0.5, short=short)
    alone = chunks(case, inputs, 32)
    assert alone.abs().max() > 0.1
    assert (short - alone).abs().max() <= torch.finfo(HALF).eps * alone.abs().max()


# Keys in one part of a state, and in two.
ONE_PART = learning(Case(SCALAR, (46, 290), K=24, V=24, rate=0.02, spare=4, dtype=HALF))
IN_TWO = replace(ONE_PART, lengths=(3, 290), K=136, V=8)
NO_DECAY = replace(IN_TWO, form=DELTA_FORMS[0])
HEADS = replace(ONE_PART, lengths=(3, 20, 2, 3), heads=4, key_heads=2)
CUT = replace(ONE_PART, lengths=(2, 800), rate=0.01)
CLEAN = {"one part": ONE_PART, "in two": IN_TWO, "no decay": NO_DECAY, "heads": HEADS, "cut": CUT}


def walk(case: Case, right: str, wrong: str) -> tuple[Case, Bug]:
    return case, Bug(delta_forward, right, wrong)


def solve(case: Case, right: str, wrong: str) -> tuple[Case, Bug]:
    return case, Bug(delta_walks, right, wrong)


BUGS = {
    "a piece walked to its segment's end": walk(ONE_PART, "tl.minimum(size - begin, PIECE)", "(size - begin)"),
    "a piece's last chunk left out": walk(
        ONE_PART, "tl.minimum(size - begin, PIECE)", "tl.minimum(size - begin, PIECE - CHUNK)"
    ),
    "all states in one place": walk(ONE_PART, "(first_place + begin // PIECE) * HEADS", "first_place * HEADS"),
    "all heads' states in one place": walk(
        HEADS, "(first_place + begin // PIECE) * HEADS + head", "(first_place + begin // PIECE) * HEADS"
    ),
    "all segments' states in one place": walk(
        ONE_PART, "first_place = tl.load(first_piece_ptr + piece)", "first_place = 0 * tl.load(first_piece_ptr)"
    ),
    "a state's parts exchanged": walk(
        IN_TWO, "tl.join(low.to(dtype), high.to(dtype))", "tl.join(high.to(dtype), low.to(dtype))"
    ),
    "a state's two parts the first": walk(
        NO_DECAY, "tl.join(low.to(dtype), high.to(dtype))", "tl.join(low.to(dtype), low.to(dtype))"
    ),
    "what is wrong kept before the erases": walk(
        ONE_PART, "store_rows(wrong_ptr, tl.trans(wrong)", "store_rows(wrong_ptr, tl.trans(crossing)"
    ),
    "what is wrong kept in one head's place": walk(
        HEADS, "tl.trans(wrong), first, head, HEADS", "tl.trans(wrong), first, 0 * head, HEADS"
    ),
    "decays of a piece taken for a chunk's": walk(
        ONE_PART, "chunk=chunk, exact=exact).inner", "chunk=chunk, exact=exact).sums"
    ),
    "transitions that only go on forwards": walk(
        CUT, "splits.of_cut_segments if keep else", "splits.handing_on() if keep else"
    ),
    "transitions not kept": walk(CUT, "_replace(transitions=transitions)", "_replace(transitions=0 * transitions)"),
    "a start lost": walk(ONE_PART, "Starts(initial_state, joined, splits)", "Starts(None, joined, splits)"),
    "the first block taken for all": solve(
        ONE_PART, "(rows[:, None] // SHORT == rows[None, :] // SHORT)", "(rows[None, :] < SHORT)"
    ),
    "beta forgotten in short erases": solve(
        ONE_PART, "_rounded_erases(writes, writes", "_rounded_erases(solved, writes"
    ),
    "beta forgotten in short reads": solve(ONE_PART, "(scale * reads * beta[None, :])", "(scale * reads)"),
    "a scale forgotten in short reads": solve(ONE_PART, "(scale * reads * beta", "(reads * beta"),
    "short reads in the erases' place": solve(ONE_PART, "short, num_tokens + start", "short, start"),
    "another head's short chunks": solve(
        HEADS, "((first + rows) * HEADS + head)[:, None] * SHORT", "((first + rows) * HEADS)[:, None] * SHORT"
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    if case is CUT:
        scan_laws.use_processors(monkeypatch, case.form, 8)
    assert_caught(delta_forward, seeded, case, tmp_path, monkeypatch, takes=all_in_16_bits)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case is CUT:
        scan_laws.use_processors(monkeypatch, case.form, 8)
    assert_caught(delta_forward, None, case, tmp_path, monkeypatch, takes=all_in_16_bits)
