"""The delta rule where nothing is left for a backward pass, at sizes that the interpreter takes."""

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
    check,
    check_compiled,
    check_drawn,
    check_telescoping,
    described,
    draw,
    kernels,
    nearly_parallel,
    new_heads,
    results,
)
from scan_laws import LAWS, Law, either_result_alone, long_enough_to_split, widened
from seeding import Bug, assert_caught, in_the_interpreter
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import delta_forward, delta_walks, descriptors, library

every_form = pytest.mark.parametrize("form", DELTA_FORMS, ids=str)
GPU_DTYPES = DTYPES if DEVICE == "cpu" else DTYPES[1:]
"""On a GPU float32 never comes here."""
every_dtype = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
SCALAR = DELTA_FORMS[-1]


def always(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> bool:
    """In place of `delta_forward.takes`. Narrow keys come in float32."""
    return not keep and (DEVICE == "cpu" or k.dtype != torch.float32)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the dtype and the sizes."""
    monkeypatch.setattr(delta_forward, "takes", always)
    monkeypatch.setattr(scan_laws, "widened", lambda case: described(widened(case)))


def test_what_descriptors_describe_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: True)
    takes = delta_forward.takes
    for width in (8, 64, 128, 136, 256):
        whole = new_heads(width, torch.bfloat16)
        assert takes(whole, whole, new_heads(128, torch.bfloat16))
        assert takes(*(new_heads(128, torch.bfloat16),) * 2, whole)
    whole = new_heads(128, torch.bfloat16)
    assert not takes(*(new_heads(128, torch.float32),) * 3)
    # Rows that begin between 16 bytes, and tensors that do.
    odd, moved = new_heads(100, torch.bfloat16), new_heads(128, torch.bfloat16, offset=4)
    assert not takes(whole, whole, odd)
    assert not takes(odd, odd, whole)
    for place in range(3):
        assert not takes(*(moved if place == each else whole for each in range(3)))
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: False)
    assert not takes(whole, whole, whole)


def test_it_runs_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing here would test it; and where it can."""
    calls, forward = [], delta_forward.forward
    monkeypatch.setattr(delta_forward, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named))
    case = described(Case(SCALAR, (5,), dtype=GPU_DTYPES[0]))
    for given, taken, ran in (
        (case, True, True),
        (replace(case, learns=True), True, False),
        (case, False, False),
        (case, True, True),
    ):
        calls.clear()
        monkeypatch.setattr(delta_forward, "takes", lambda q, k, v, keep, taken=taken: taken and not keep)
        results(kernels, given, draw(given))
        # Of its kind the first compiles what it will launch by a pass of its own.
        assert bool(calls) == ran


@every_form
@every_dtype
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype, described)


@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES[1:], ids=str)
@every_form
@pytest.mark.parametrize("law", [law for law in LAWS if law is not either_result_alone], ids=lambda law: law.__name__)
def test_it_holds(law: Law, dtype: torch.dtype, form: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    law(form, dtype, monkeypatch)


@every_form
@pytest.mark.parametrize(("K", "V"), [(8, 40), (16, 24), (40, 8), (24, 56)])
def test_widths_that_are_no_powers_of_two(form: Recurrence, K: int, V: int) -> None:
    """Keys in one part and in two, some that hold nothing, and tiles of values that are not full."""
    check(widened(Case(form, (33, 1, 0, 20), 4, 2, K=K, V=V, rate=0.1, spare=2, learns=False, dtype=GPU_DTYPES[0])))


@every_form
@every_dtype
@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_keys_nearly_parallel(form: Recurrence, dtype: torch.dtype, apart: float) -> None:
    case = Case(form, (70, 5), K=16, V=8, rate=0.05, learns=False, dtype=dtype)
    check_telescoping(case, nearly_parallel(case, apart), roundings=1)


@every_form
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_strengths_that_write_nothing_or_reflect(form: Recurrence, strength: float) -> None:
    case = widened(Case(form, (40, 3), K=32, learns=False, dtype=GPU_DTYPES[0]))
    inputs = draw(case)
    check(case, inputs | {"beta": torch.full_like(inputs["beta"], strength)})


@every_form
@pytest.mark.parametrize("rate", [0.1, 100.0])
def test_cut_segments_of_mild_and_strong_decays(form: Recurrence, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(long_enough_to_split(form, GPU_DTYPES[0], monkeypatch), rate=rate)
    check(case)
    check(replace(case, initial=False, final=False))


@pytest.mark.parametrize("K", [16, 24])
def test_a_strong_head_beside_a_mild_one(K: int) -> None:
    case = widened(Case(SCALAR, (40, 17), heads=2, K=K, rate=0.1, learns=False, dtype=GPU_DTYPES[0]))
    inputs = draw(case)
    inputs["log_decay"][..., 0] *= 1000
    check(case, inputs)


@pytest.mark.parametrize("place", [0, 37, 69])
def test_one_token_that_forgets_all(place: int) -> None:
    """At a chunk's start, in its middle and at a segment's end."""
    case = widened(Case(SCALAR, (70, 30), rate=0.01, learns=False, dtype=GPU_DTYPES[0]))
    inputs = draw(case)
    inputs["log_decay"][place] = -200.0
    check(case, inputs)


@every_form
def test_what_torch_asks_of_an_operator_that_keeps_nothing(form: Recurrence) -> None:
    case = Case(form, (7, 0, 12), 2, 1, K=8, V=16, dtype=GPU_DTYPES[0])
    inputs = draw(case)
    given = (*(inputs.get(name) for name in ("q", "k", "v", "log_decay", "beta", "initial_state")), case.cu_seqlens)
    arguments = (*given, case.max_length, True, 0.5, True, form.decay.value, False)
    torch.library.opcheck(library._delta, arguments, test_utils=("test_schema", "test_faketensor"))
    _, _, *kept = library._delta(*arguments)
    assert not any(x.numel() for x in kept)


@every_form
def test_compiled_it_gives_the_same(form: Recurrence) -> None:
    check_compiled(Case(form, (7, 0, 12), 2, 1, K=16, V=8, learns=False, dtype=GPU_DTYPES[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (300, 0, 700, 1), (5000,)], ids=["in full", "ragged", "cut"])
@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
@every_form
def test_whole_heads_in_16_bits(
    form: Recurrence,
    width: int,
    dtype: torch.dtype,
    rate: float,
    lengths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strong decays or mild ones: under strong ones alone a state that is lost goes unseen."""
    monkeypatch.undo()
    dense = lengths == (512, 512)
    case = Case(
        form, lengths, 4, 2, K=width, V=width, rate=rate, spare=0 if dense else 3, dense=dense, tight=dense, learns=False,
        dtype=dtype,
    )  # fmt: skip
    check(case)
    for fewer in (48, 56):
        check(replace(case, K=width - fewer, V=width - 24))


# Keys in two parts, and P' made before the walk; in one, and made in it.
MILD = Case(Recurrence(Decay.SCALAR, Erase.DELTA), (46, 3), K=24, V=24, rate=0.2, spare=4, learns=False)
ONE_PART = replace(MILD, K=16)
NO_DECAY = replace(MILD, form=Recurrence(Decay.NONE, Erase.DELTA))
PLAIN = replace(NO_DECAY, K=16)
HEADS = replace(MILD, lengths=(3, 20, 2, 3), heads=4, key_heads=2)
CUT = replace(MILD, lengths=(2, 250), rate=0.05)
CUT_PLAIN = replace(CUT, K=16, form=NO_DECAY.form)
# So long together that they might be cut, and are walked the longest first.
ORDERED = replace(MILD, lengths=(3, 30, 25, 30, 28))
CLEAN = {
    "mild": MILD,
    "one part": ONE_PART,
    "none": NO_DECAY,
    "plain": PLAIN,
    "heads": HEADS,
    "cut": CUT,
    "cut, plain": CUT_PLAIN,
    "ordered": ORDERED,
}


def walk(case: Case, right: str, wrong: str, count: int = 1) -> tuple[Case, Bug]:
    return case, Bug(delta_forward, right, wrong, count)


def solve(case: Case, right: str, wrong: str) -> tuple[Case, Bug]:
    return case, Bug(delta_walks, right, wrong)


def of_both(name: str, right: str, wrong: str, count: int = 1) -> dict[str, tuple[Case, Bug]]:
    """A bug that is seen in a state of one part and in one of two."""
    return {
        f"{name}, in two parts": walk(MILD, right, wrong, count),
        f"{name}, in one": walk(ONE_PART, right, wrong, count),
    }


STORE = "outputs.store([done, tile * TILE]"
BUGS = {
    "a causal mask dropped": walk(PLAIN, "pairs = tl.where(seen, pairs, 0.0)", "pass"),
    "a causal mask of fading pairs dropped": walk(ONE_PART, "decay_where(seen, summed", "decay_between(summed"),
    "a causal mask dropped before": solve(NO_DECAY, "reads = tl.where(seen, reads, 0.0)", "pass"),
    "pairs that do not fade": walk(
        ONE_PART, "decay_where(seen, summed[None, :]", "decay_where(seen, 0 * summed[None, :]"
    ),
    "pairs that do not fade before": solve(MILD, "reads *= decay_where(seen,", "reads *= decay_where(seen, 0 *"),
    "erasures that do not fade": solve(
        MILD, "overlaps *= decay_where(earlier,", "overlaps *= decay_where(earlier, 0 *"
    ),
    **of_both("what is known does not fade", "known *= fades", "pass"),
    **of_both("what is read does not fade", "o *= fades", "pass"),
    **of_both("a write does not fade", "weights *= decay_between(total, summed)", "pass"),
    "the first part does not fade": walk(ONE_PART, "low *= to_end", "pass"),
    "the second part does not fade": walk(MILD, "high *= to_end", "pass"),
    "beta forgotten in what is erased": solve(MILD, "solved = writes", "pass"),
    "what is erased is added": solve(MILD, "solved = writes", "solved = -writes"),
    "beta forgotten in what is read": walk(ONE_PART, "beta[None, :] * wrong, pairs", "wrong, pairs"),
    "beta forgotten in what is read before": solve(MILD, "reads *= scale * beta[None, :]", "reads *= scale"),
    **of_both("beta forgotten in what is written", "weights = beta", "weights = 0 * beta + 1.0"),
    **of_both(
        "what is erased stays",
        "wrong = tl.dot(crossing, erasure, acc=crossing.to(tl.float32)",
        "wrong = crossing.to(tl.float32) + 0 * tl.dot(crossing, erasure",
    ),
    **of_both("erasures not transposed", "tl.trans(erasures.load([done, 0]))", "erasures.load([done, 0])"),
    **of_both("what is known is added", "to(tl.float32) - known", "to(tl.float32) + known"),
    "reads not transposed": walk(MILD, "tl.trans(reads.load([done, 0]))", "reads.load([done, 0])"),
    "queries and keys exchanged": walk(ONE_PART, "tl.dot(k_low, tl.trans(q_low)", "tl.dot(q_low, tl.trans(k_low)"),
    "what came before is not read, in two parts": walk(MILD, "acc=scale * o,", ""),
    "what came before is not read, in one": walk(ONE_PART, "wrong, pairs, o,", "wrong, pairs, 0 * o,"),
    "the second part of the keys not known": walk(
        MILD, "tl.trans(k_high), acc=known", "tl.trans(k_high), acc=0 * known"
    ),
    "the first part not read": walk(MILD, "tl.trans(q_high), acc=o", "tl.trans(q_high), acc=0 * o"),
    "a state that is not added to": walk(ONE_PART, "k_low, acc=low,", "k_low,"),
    "a second part that is not added to": walk(MILD, "k_high, acc=high,", "k_high,", 2),
    "both parts the first": walk(MILD, "ks.load([done, HALF])", "ks.load([done, 0])"),
    "a scale forgotten": walk(ONE_PART, "o = scale * _product", "o = _product"),
    "a scale forgotten before": solve(MILD, "scale * beta[None, :]", "beta[None, :]"),
    "a scale forgotten in what the state is read for": walk(MILD, "acc=scale * o,", "acc=o,"),
    "a start lost": walk(MILD, "Starts(initial_state, joined, splits)", "Starts(None, joined, splits)"),
    "what a cut piece starts from lost": walk(
        CUT, "Starts(initial_state, joined, splits)", "Starts(initial_state, 0 * joined, splits)"
    ),
    "a second part's start lost": walk(
        MILD, "values, HALF + keys, V, K, True, False", "values, keys, V, K, True, False"
    ),
    "a start not transposed": walk(ONE_PART, "values, keys, V, K, True, False)", "values, keys, V, K, False, False)"),
    "an end not transposed": walk(ONE_PART, "values, keys, V, K, True)", "values, keys, V, K, False)"),
    "a second part's end in the first's place": walk(MILD, "final_ptr + at + HALF * V", "final_ptr + at"),
    "a transition from zeros": walk(CUT_PLAIN, "low += (columns", "low += 0.0 * (columns"),
    "a transition's second part from zeros": walk(CUT, "high += (columns", "high += 0.0 * (columns"),
    "a transition's second part not kept": walk(CUT, "transitions_ptr + at + HALF * K", "transitions_ptr + at"),
    "a transition not transposed": walk(CUT, "columns, keys, K, K, True", "columns, keys, K, K, False"),
    "rows past the end stored": (ORDERED, Bug(descriptors, "tl.maximum(size, 1)", "size + 2")),
    "values past the last stored": walk(MILD, STORE, "outputs.store([done, tile * TILE + 8]"),
    "heads taken in turn": walk(HEADS, "head // (HEADS // K_HEADS)", "head % K_HEADS"),
    "another head's strengths": walk(HEADS, "beta_ptr + head.to(tl.int64)", "beta_ptr + 0 * head.to(tl.int64)"),
    "another head's strengths before": solve(
        HEADS, "beta_ptr + head.to(tl.int64) * num_tokens + start + rows", "beta_ptr + start + rows"
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(delta_forward, seeded, case, tmp_path, monkeypatch, takes=always)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(delta_forward, None, case, tmp_path, monkeypatch, takes=always)
