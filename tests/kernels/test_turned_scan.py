"""The scan with its state turned, forwards and back in time, at sizes that the interpreter takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scan_laws
import torch
from cases import DEVICE, DTYPES, SCALAR_FORMS, Case, check, check_drawn, described, draw, new_heads
from scan_laws import Law, every_law, long_enough_to_split
from seeding import Bug, assert_caught, in_the_interpreter

from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import blocks, descriptors, scalar_scan, turned_scan
from linear_moe.kernels.blocks import DECAY_KINDS

every_form = pytest.mark.parametrize("form", SCALAR_FORMS, ids=str)
GPU_DTYPES = DTYPES if DEVICE == "cpu" else DTYPES[1:]
"""On a GPU float32 never comes here."""


def always(decay: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """In place of `scalar_scan.turns`."""
    return DEVICE == "cpu" or dtype != torch.float32


def never(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """In place of `scalar_scan.writes_together`: heads as wide as those that are turned have a walk for each gradient."""
    return False


def with_gradients(case: Case) -> Case:
    """The same with rows of whole 16 bytes."""
    return replace(described(case), learns=case.learns)


@pytest.fixture(autouse=True)
def _turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size and the dtype."""
    monkeypatch.setattr(scalar_scan, "turns", always)
    monkeypatch.setattr(scalar_scan, "writes_together", never)
    monkeypatch.setattr(scan_laws, "widened", with_gradients)


@pytest.mark.parametrize("decay", DECAY_KINDS)
def test_which_heads_are_turned(decay: Decay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kind = DECAY_KINDS[decay]
    for width in (72, 100, 128):
        assert scalar_scan.turns(kind, width, 128, torch.bfloat16)
        assert not scalar_scan.turns(kind, 64, width, torch.bfloat16)
        assert not scalar_scan.turns(kind, width, 136, torch.bfloat16)
        assert not scalar_scan.turns(kind, width, width, torch.float32)
        # Of what has no room for factors only what needs none.
        assert scalar_scan.turns(kind, width, width, torch.float16) == (decay is Decay.NONE)


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_scalar_decays_are_turned_where_their_factors_are_for(
    direction: blocks.Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: True)
    whole, odd = new_heads(128, torch.bfloat16), new_heads(100, torch.bfloat16)
    for decay in DECAY_KINDS:
        walk = scalar_scan._Walk(DECAY_KINDS[decay], None, 2, None, False, None, direction)  # type: ignore[arg-type]
        for reverse in (False, True):
            fits = decay is not Decay.SCALAR or reverse == (direction == "backwards")
            assert walk.turned(whole, whole, whole, reverse=reverse) == fits
            assert not walk.turned(whole, whole, odd, reverse=reverse)


@every_form
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype, with_gradients)


@every_form
@every_law
def test_it_holds(law: Law, dtype: torch.dtype, form: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    law(form, dtype, monkeypatch)


@every_form
@pytest.mark.parametrize("rate", [0.1, 100.0])
def test_cut_segments_of_mild_and_strong_decays(form: Recurrence, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(long_enough_to_split(form, GPU_DTYPES[0], monkeypatch), heads=2, rate=rate)
    check(case)
    check(replace(case, initial=False, final=False))


@pytest.mark.parametrize("place", [0, 100, 199])
def test_one_strong_chunk_among_mild_ones(place: int) -> None:
    case = Case(Recurrence(Decay.SCALAR), (200, 30), rate=0.01, dtype=GPU_DTYPES[0])
    inputs = draw(case)
    with torch.no_grad():
        inputs["log_decay"][place] = -200.0
    check(case, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (300, 0, 700, 1), (5000,)], ids=["in full", "ragged", "cut"])
@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
@every_form
def test_heads_of_128_in_bfloat16(
    form: Recurrence, rate: float, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    dense = lengths == (512, 512)
    case = Case(
        form, lengths, 4, 2, K=128, V=128, rate=rate, spare=0 if dense else 3, dense=dense, tight=dense, dtype=torch.bfloat16,
    )  # fmt: skip
    check(case)
    check(replace(case, K=72, V=104, learns=False))


MILD = Case(Recurrence(Decay.SCALAR), (70, 3), K=24, V=24, rate=0.2, spare=4)
CONSTANT = replace(MILD, form=Recurrence(Decay.HEAD), rate=0.1)
NO_DECAY = replace(MILD, form=Recurrence())
PAIRS = replace(MILD, dtype=torch.float16)
CONSTANT_PAIRS = replace(CONSTANT, dtype=torch.float16)
HEADS = replace(CONSTANT, lengths=(3, 20, 2, 3), heads=4, key_heads=2)
CLEAN = {
    "mild": MILD,
    "constant": CONSTANT,
    "none": NO_DECAY,
    "pairs": PAIRS,
    "constant pairs": CONSTANT_PAIRS,
    "heads": HEADS,
}
BACKWARDS = "tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step"
BUGS = {
    "a causal mask backwards dropped": (CONSTANT, Bug(turned_scan, "rows[:, None] >= rows", "rows[:, None] > -rows")),
    "backwards as forwards": (CONSTANT, Bug(turned_scan, BACKWARDS, "step")),
    "factors of heads backwards as forwards": (
        CONSTANT,
        Bug(turned_scan, "rate * (rows + 1 if REVERSE", "rate * (CHUNK - 1 - rows if REVERSE"),
    ),
    "factors backwards as forwards": (MILD, Bug(blocks, "if not REVERSE:", "if True:")),
    "a constant decay of a whole chunk backwards": (
        CONSTANT,
        Bug(turned_scan, "num_rows if REVERSE else CHUNK", "CHUNK"),
    ),
    "pairs backwards as forwards": (
        CONSTANT_PAIRS,
        Bug(
            turned_scan,
            "decay_where(seen, summed[:, None], summed[None, :])",
            "decay_where(seen, summed[None, :], summed[:, None])",
        ),
    ),
    "what is read before pairs backwards as forwards": (
        PAIRS,
        Bug(turned_scan, "before = decay_between(total, summed) if REVERSE else", "before ="),
    ),
    "what is written after pairs backwards as forwards": (
        CONSTANT_PAIRS,
        Bug(turned_scan, "after = decay_of(summed) if REVERSE else", "after ="),
    ),
    "the state's scale forgotten at the start": (MILD, Bug(turned_scan, "    low /= state_scale\n", "")),
    "the state transposed that is not": (
        MILD,
        Bug(turned_scan, "TURNED: tl.constexpr = not TRANSPOSED_STATE", "TURNED: tl.constexpr = True"),
    ),
    "value heads taken in turn": (HEADS, Bug(turned_scan, "head // (HEADS // V_HEADS)", "head % V_HEADS")),
    "the scale forgotten": (CONSTANT, Bug(turned_scan, "(scale * reads)[None, :]", "reads[None, :]")),
    "the scale forgotten without a decay": (
        NO_DECAY,
        Bug(turned_scan, "            o *= scale\n", "            pass\n"),
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(scalar_scan, seeded, case, tmp_path, monkeypatch, turns=always, writes_together=never)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(scalar_scan, None, case, tmp_path, monkeypatch, turns=always, writes_together=never)
