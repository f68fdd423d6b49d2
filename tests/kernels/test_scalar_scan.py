"""The scalar scan's kernels against the chunked form in float64, and the bugs that this must catch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DTYPES, SCALAR_FORMS, Case, check, check_drawn, draw, errors_beside_reference, kernels, results
from scan_laws import Law, every_law
from seeding import Bug, assert_caught, in_the_interpreter

from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import blocks, decay_gradient, join, scalar_scan, scalar_walks
from linear_moe.kernels.launch import recorded

every_form = pytest.mark.parametrize("form", SCALAR_FORMS, ids=str)


@pytest.fixture(autouse=True)
def _pieces_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a launch for mild decays, in the dtypes that have one."""
    monkeypatch.setattr(scalar_scan, "MILD_CHUNKS", 0)


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype)


@every_form
@every_law
def test_it_holds(law: Law, dtype: torch.dtype, form: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    law(form, dtype, monkeypatch)


def test_float32_is_summed_in_float64() -> None:
    """In float32 errors would be 0.84 to 1.01 of the reference's."""
    errors = errors_beside_reference(Case(Recurrence(Decay.SCALAR), (63,), V=64, rate=0.0), 10)
    assert all(error < 0.6 for error in errors.values()), errors


@pytest.mark.parametrize("K", [8, 80, 130])
def test_decays_are_summed_once_for_both_passes(K: int) -> None:
    case = Case(Recurrence(Decay.SCALAR), (70, 3), K=K, V=K, dtype=torch.float16)
    inputs = draw(case)
    # What a first pass has compiled ahead of it sums too.
    results(kernels, case, inputs)
    with recorded(blocks._by_head_kernel) as launches:
        results(kernels, case, inputs)
    assert len(launches) == 1


@every_form
@pytest.mark.parametrize(("lengths", "ways"), [((100, 156), (True, False)), ((100, 155), (False,)), ((0,), (False,))])
def test_mild_decays_of_long_pieces_have_a_launch_of_their_own(
    form: Recurrence, lengths: tuple[int, ...], ways: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    # Every segment is a piece.
    monkeypatch.setattr(scalar_scan, "piece_length", lambda *_: None)
    case = Case(form, lengths, K=8, V=8, initial=False, final=False)
    inputs = draw(case)
    results(kernels, case, inputs)
    with recorded(scalar_walks.writes_kernel) as launches:
        check(case, inputs)
    expected = (True,) if form.decay is Decay.NONE else ways
    assert tuple(launch.options["MILD"] for launch in launches) == expected
    assert all(launch.options["ALONE"] == (len(expected) == 1) for launch in launches)


@pytest.mark.parametrize("decay", [Decay.NONE, Decay.HEAD, Decay.SCALAR])
def test_float16_has_no_room_for_mild_decays(decay: Decay) -> None:
    kind = blocks.DECAY_KINDS[decay]
    assert scalar_scan.writes_ways(kind, torch.float16, 1e6) == (decay is Decay.NONE,)


@pytest.mark.parametrize("place", [0, 100, 199])
def test_one_strong_chunk_among_mild_ones(place: int) -> None:
    """Its walk is of any decays, and those beside it are of mild ones."""
    case = Case(Recurrence(Decay.SCALAR), (200, 30), heads=2, rate=0.01)
    inputs = draw(case)
    with torch.no_grad():
        inputs["log_decay"][place, 1] = -200.0
    check(case, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (300, 0, 700, 1), (5000,)], ids=["in full", "ragged", "cut"])
@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
@every_form
def test_heads_of_64_in_bfloat16(form: Recurrence, rate: float, lengths: tuple[int, ...]) -> None:
    check(Case(form, lengths, heads=4, key_heads=2, K=64, V=64, rate=rate, dtype=torch.bfloat16))


WHOLE = Case(Recurrence(Decay.SCALAR), (34, 3), K=10, V=6, spare=4)
CUT = replace(WHOLE, lengths=(2, 105), rate=0.1)
# Pieces of two chunks.
LONG = replace(WHOLE, lengths=(2, 790), rate=0.02)
CONSTANT = replace(WHOLE, form=Recurrence(Decay.HEAD))
# As many segments as heads: what swapped strides hit is allocated.
HEADS = replace(WHOLE, lengths=(3, 2, 2, 3), heads=4, key_heads=2)
# The gradients of keys and values in a walk each.
WIDE = replace(WHOLE, K=20, V=18)
STRONG = replace(CONSTANT, rate=400.0)
# What mild decays do in the other way, which float16 takes always.
PAIRS = replace(CONSTANT, dtype=torch.float16)
CLEAN = {
    "strong": STRONG,
    "pairs": PAIRS,
    "whole": WHOLE,
    "wide": WIDE,
    "cut": CUT,
    "long": LONG,
    "constant": CONSTANT,
    "heads": HEADS,
}

ROW = "tl.minimum(rows, num_rows - 1)"
SCANNED = "valid = rows < num_rows\n        k ="
WRITTEN = "valid = rows < num_rows\n        q ="
CHUNKS = "ragged.cut_twice(v.shape[0], chunk"
BUGS = {
    "a mask dropped": (WHOLE, Bug(scalar_walks, SCANNED, SCANNED.replace("num_rows", "num_rows + 2"))),
    "a mask of writes dropped": (WHOLE, Bug(scalar_walks, WRITTEN, WRITTEN.replace("num_rows", "num_rows + 2"))),
    "a causal mask dropped": (
        WHOLE,
        Bug(scalar_walks, "decay_where(seen, summed[:, None]", "decay_between(summed[:, None]"),
    ),
    "a causal mask without a decay dropped": (
        replace(WHOLE, form=Recurrence()),
        Bug(scalar_walks, "tl.where(seen, products, 0.0)", "products"),
    ),
    "key heads taken in turn": (HEADS, Bug(scalar_walks, "head // (HEADS // K_HEADS)", "head % K_HEADS", count=2)),
    "query heads taken in turn": (HEADS, Bug(scalar_walks, "head // (HEADS // Q_HEADS)", "head % Q_HEADS")),
    "a token's strides swapped": (HEADS, Bug(blocks, "(first * HEADS + head)", "(first + head * HEADS)", count=3)),
    "a state's strides swapped": (HEADS, Bug(blocks, "(piece * HEADS + head)", "(piece + head * HEADS)")),
    "a state transposed": (WHOLE, Bug(blocks, "if TRANSPOSED:", "if False:")),
    "decay off by one position": (WHOLE, Bug(blocks, ROW, f"tl.maximum({ROW} - 1, 0)")),
    "a constant decay off by one position": (CONSTANT, Bug(blocks, "rate * (rows + 1)", "rate * rows")),
    "a chunk's decays summed over two": (CUT, Bug(scalar_scan, CHUNKS, CHUNKS.replace("chunk", "2 * chunk"))),
    "the state does not fade": (WHOLE, Bug(scalar_walks, "state *= decay_of(total)", "state *= 1.0", count=3)),
    "the state not transposed for a key's gradient": (WHOLE, Bug(scalar_walks, "tl.trans(rounded)", "rounded")),
    "a causal mask of writes dropped": (CONSTANT, Bug(scalar_walks, "asked = tl.where(seen, asked, 0.0)", "pass")),
    "a causal mask of a key's gradient dropped": (
        CONSTANT,
        Bug(scalar_walks, "wanted = tl.where(seen, wanted, 0.0)", "pass"),
    ),
    "what is asked does not fade": (
        CONSTANT,
        Bug(scalar_walks, "do = (do.to(tl.float32) * after).to(dtype)\n                made", "made"),
    ),
    "what a value's gradient is made of does not fade": (
        CONSTANT,
        Bug(scalar_walks, "dv *= (scale * made)[:, None]", "dv *= scale"),
    ),
    "what a key's gradient is made of does not fade": (
        CONSTANT,
        Bug(scalar_walks, "dk *= (scale * made)[:, None]", "dk *= scale"),
    ),
    "strong decays of writes taken for mild ones": (STRONG, Bug(blocks, ">= -LIMIT", ">= -1e9")),
    "nobody walks what is strong": (STRONG, Bug(scalar_scan, "(True, False) if wants", "(True,) if wants")),
    "nobody walks what is mild": (WHOLE, Bug(scalar_walks, "DECAY) != MILD:", "DECAY) != False:")),
    "what a token wrote does not fade": (WHOLE, Bug(scalar_walks, "written *= made", "pass")),
    "float16 given no room for writes": (
        replace(PAIRS, lengths=(64, 3), rate=40.0, initial=False),
        Bug(blocks, "dtype != torch.float16", "True"),
    ),
    "a causal mask of pairs of writes dropped": (
        PAIRS,
        Bug(
            scalar_walks,
            "pairs = decay_where(seen, summed[None, :], summed[:, None])",
            "pairs = decay_between(summed[None, :], summed[:, None])",
        ),
    ),
    "pairs of a key's gradient do not fade": (PAIRS, Bug(scalar_walks, "wanted *= pairs", "wanted *= 1.0")),
    "the state is not added to": (WHOLE, Bug(scalar_walks, "(tl.trans(k), v, state,", "(tl.trans(k), v, 0 * state,")),
    "the state's scale forgotten": (WIDE, Bug(scalar_walks, "state_scale * state, mask", "state, mask")),
    "backwards as forwards": (WIDE, Bug(scalar_walks, "num_chunks - 1 - step if BACKWARDS else step", "step")),
    "writes backwards as forwards": (WHOLE, Bug(scalar_walks, "(num_chunks - 1 - step)", "step")),
    "a piece's writes fade by their chunk alone": (LONG, Bug(scalar_walks, "decay_of(left + reach)", "decay_of(left)")),
    "a split's carry lost": (CUT, Bug(join, "state = tl.exp(total) * state + ", "state = ")),
    "a split's start forgotten": (CUT, Bug(blocks, "(piece != outermost) & (piece <= last)", "piece < 0")),
    "a segment's start forgotten where it is cut": (
        CUT,
        Bug(blocks, "piece == outermost", "piece < 0"),
    ),
    "the outermost piece backwards as forwards": (CUT, Bug(blocks, "last if REVERSE else tl.load", "tl.load")),
    "a split's carry does not fade": (CUT, Bug(join, "tl.exp(total) * state", "state")),
    "splits joined backwards as forwards": (
        CUT,
        Bug(join, "piece = first + (count - 1 - step if REVERSE else step)", "piece = first + step"),
    ),
    "the decay's gradient one token late": (
        WHOLE,
        Bug(decay_gradient, "tl.cumsum(amount, 0) - amount", "tl.cumsum(amount, 0)"),
    ),
    "the decay's gradient without the start": (
        WHOLE,
        Bug(decay_gradient, "carry += tl.where(each == place", "tl.where(each == place"),
    ),
    "a token's own pair in what it reads": (
        WHOLE,
        Bug(scalar_walks, "tl.where(rows[:, None] != rows[None, :], products * met, 0.0)", "products * met"),
    ),
    "a token's own pair in what it writes": (
        WHOLE,
        Bug(scalar_walks, "tl.where(rows[:, None] != rows[None, :], asked * wanted, 0.0)", "asked * wanted"),
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(scalar_scan, seeded, case, tmp_path, monkeypatch, MILD_CHUNKS=0)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(scalar_scan, None, case, tmp_path, monkeypatch, MILD_CHUNKS=0)
