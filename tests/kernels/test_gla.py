"""The kernels of a decay a key channel against the chunked form in float64, and the bugs that this must catch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DEVICE, DTYPES, VECTOR_FORMS, Case, check, check_drawn, draw
from scan_laws import Law, every_law
from seeding import Bug, assert_caught, in_the_interpreter

from linear_moe.kernels import blocks, gla, gla_walks, join

(FORM,) = VECTOR_FORMS
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_drawn_shapes_are_within_the_budget(dtype: torch.dtype) -> None:
    check_drawn(FORM, dtype)


@every_law
def test_it_holds(law: Law, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    law(FORM, dtype, monkeypatch)


def mixed_decays(case: Case) -> torch.Tensor:
    """`[S, H, K]`: by turns a chunk that hardly fades, one in which a single channel does, and one that forgets at once."""
    hardness = torch.tensor([1e-6, 0.05, 13.8]).to(DEVICE)
    rate = hardness[torch.arange(case.num_tokens, device=DEVICE) // 64 % 3][:, None, None].repeat(1, 1, case.K)
    rate[64:128, :, 1:] = 1e-6
    return -rate * torch.rand(case.num_tokens, case.heads, case.K).to(DEVICE)


@every_dtype
def test_mild_and_harsh_chunks_in_one_call(dtype: torch.dtype) -> None:
    """Each takes a way of its own, chunk by chunk or walk by walk."""
    case = Case(FORM, (195, 40), K=5, V=7, dtype=dtype)
    check(case, draw(case) | {"log_decay": mixed_decays(case)})


@every_dtype
def test_a_single_harsh_token(dtype: torch.dtype) -> None:
    """A sum that an earlier hard decay is in has lost a gentle one: differences of such sums would too."""
    case = Case(FORM, (50,), K=5, V=7, rate=1e-4, dtype=dtype)
    inputs = draw(case)
    inputs["log_decay"][10] = -1e4
    check(case, inputs)


HARSH = Case(FORM, (66, 3), K=10, V=6, spare=4)
MILD = replace(HARSH, lengths=(130, 3), rate=0.05)
CUT = replace(HARSH, lengths=(2, 198), rate=0.01)
# As many segments as heads: what swapped strides hit is allocated.
HEADS = replace(HARSH, lengths=(3, 2, 2, 3), heads=4, key_heads=2)
CLEAN = {"harsh": HARSH, "mild": MILD, "cut": CUT, "heads": HEADS}

BUGS = {
    "a mask dropped": (
        HARSH,
        Bug(gla_walks, "valid = rows < rows_left(size, chunk", "valid = rows < 2 + rows_left(size, chunk"),
    ),
    "a mask of pairs dropped": (
        HARSH,
        Bug(gla_walks, "valid = rows < rows_left(size, 0", "valid = rows < 2 + rows_left(size, 0", count=2),
    ),
    "a causal mask dropped": (MILD, Bug(gla_walks, "tl.where(rows[:, None] >= rows[None, :], met, 0.0)", "met")),
    "a causal mask of gradients dropped": (
        MILD,
        Bug(gla_walks, "tl.where(later, asked_of, 0.0)", "asked_of"),
    ),
    "a harsh chunk's causal mask dropped": (HARSH, Bug(gla_walks, " & (earlier % (2 * WIDTH) < WIDTH)", "")),
    "a level of halves forgotten": (
        HARSH,
        Bug(gla_walks, "tl.static_range(LEVELS)", "tl.static_range(LEVELS - 1)", count=2),
    ),
    "key heads taken in turn": (HEADS, Bug(gla_walks, "head // (HEADS // K_HEADS)", "head % K_HEADS", count=2)),
    "a token's strides swapped": (HEADS, Bug(blocks, "(first * HEADS + head)", "(first + head * HEADS)", count=3)),
    "a state's strides swapped": (HEADS, Bug(blocks, "(piece * HEADS + head)", "(piece + head * HEADS)")),
    "decay off by one position": (
        HARSH,
        Bug(gla_walks, "return tl.cumsum(each, 0),", "return tl.cumsum(each, 0) - each,"),
    ),
    "gradients decay as outputs do": (MILD, Bug(gla_walks, "dq *= kept", "dk *= kept")),
    "the state does not fade": (HARSH, Bug(gla_walks, "state *= decay_of(total)[:, None]", "state *= 1.0")),
    "what reads a state does not fade": (MILD, Bug(gla_walks, "dq *= kept", "pass")),
    "what reads a state does not fade harshly": (HARSH, Bug(gla_walks, "dq *= _fade(summed)", "pass")),
    "what is written to a state does not fade": (
        MILD,
        Bug(gla_walks, "dk *= decay_of(total)", "dk = dk * 0 + decay_of(total)"),
    ),
    "what is written to a state does not fade harshly": (
        HARSH,
        Bug(gla_walks, "dk *= _fade(exact", "dk *= _fade(0 * exact"),
    ),
    "pairs of a chunk fade twice": (MILD, Bug(gla_walks, "dq += undone * ", "dq += ")),
    "gradients from another chunk's state": (
        HARSH,
        Bug(gla_walks, "state_offsets(first_chunk + chunk,", "state_offsets(chunk,"),
    ),
    "the state is not added to": (HARSH, Bug(gla_walks, "(tl.trans(writes), v, acc=state,", "(tl.trans(writes), v,")),
    "the state's scale forgotten": (HARSH, Bug(gla, "d_final / scale", "d_final")),
    "backwards as forwards": (HARSH, Bug(gla_walks, "num_chunks - 1 - step if REVERSE else step", "step")),
    "a split's carry lost": (CUT, Bug(join, "state = tl.exp(total) * state + ", "state = ")),
    "a split's carry fades by another channel": (CUT, Bug(join, "* K + numbers // V,", "* K + numbers % K,")),
    "every split begins with its segment's first chunk": (
        CUT,
        Bug(gla, "        splits.begins,", "        prepared.chunks.first[:-1][splits.owner],"),
    ),
    "the decay's gradient one token late": (
        HARSH,
        Bug(gla_walks, "tl.cumsum(wide, 0) - wide", "tl.cumsum(wide, 0)"),
    ),
    "the decay's gradient without the state": (
        HARSH,
        Bug(gla_walks, "crossing = decay_of(total) * ", "crossing = 0.0 * "),
    ),
    "the decay's gradient without what a chunk reads": (
        HARSH,
        Bug(gla_walks, "crossing += tl.sum(q * dq, 0)", "pass"),
    ),
    "the decay's gradient without what a mild chunk reads": (
        MILD,
        Bug(gla_walks, "crossing += tl.sum(reads.to(tl.float32) * dq, 0)", "pass"),
    ),
    "the decay's gradient without its tokens": (HARSH, Bug(gla_walks, "tl.cumsum(wide, 0) - wide", "0.0 * wide")),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(gla, seeded, case, tmp_path, monkeypatch)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(gla, None, case, tmp_path, monkeypatch)
