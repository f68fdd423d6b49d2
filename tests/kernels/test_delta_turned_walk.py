"""The delta rule's walk that leaves nothing for a backward pass, at sizes that the interpreter takes."""

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
from scan_laws import LAWS, Law, either_result_alone, long_enough_to_split, use_processors, widened
from seeding import Bug, assert_caught, in_the_interpreter
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import delta_turned_walk, descriptors, gated_deltanet, library, mild_decays

every_form = pytest.mark.parametrize("form", DELTA_FORMS, ids=str)
GPU_DTYPES = DTYPES if DEVICE == "cpu" else DTYPES[1:]
"""On a GPU float32 never comes here."""
every_dtype = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
SCALAR = DELTA_FORMS[-1]


def always(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """In place of `walks_turned`."""
    return True


@pytest.fixture(autouse=True)
def _turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size."""
    monkeypatch.setattr(gated_deltanet, "walks_turned", always)
    monkeypatch.setattr(scan_laws, "widened", lambda case: described(widened(case)))


def test_heads_that_are_neither_narrow_nor_wide_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: True)
    takes = gated_deltanet.walks_turned
    narrow, whole, wide = (new_heads(width, torch.bfloat16) for width in (64, 128, 136))
    assert takes(whole, whole, whole)
    assert takes(narrow, narrow, whole)
    assert takes(whole, whole, narrow)
    assert not takes(narrow, narrow, narrow)
    assert not takes(wide, wide, whole)
    assert not takes(whole, whole, wide)
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
    """Or nothing here would test it; and where sizes say so."""
    calls, run = [], gated_deltanet._run_turned
    monkeypatch.setattr(gated_deltanet, "_run_turned", lambda *given, **named: calls.append(1) or run(*given, **named))
    case = described(Case(SCALAR, (5,), dtype=GPU_DTYPES[0]))
    for given, taken, ran in (
        (case, True, True),
        (replace(case, learns=True), True, False),
        (case, False, False),
        (case, True, True),
    ):
        calls.clear()
        monkeypatch.setattr(gated_deltanet, "walks_turned", lambda q, k, v, taken=taken: taken)
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
@pytest.mark.parametrize(("K", "V"), [(16, 40), (40, 8), (24, 56)])
def test_widths_that_are_no_powers_of_two(form: Recurrence, K: int, V: int) -> None:
    """Keys that hold nothing, and tiles of values that are not full."""
    check(widened(Case(form, (33, 1, 0, 20), 4, 2, K=K, V=V, rate=0.1, spare=2, learns=False, dtype=GPU_DTYPES[0])))


@every_form
@every_dtype
@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_keys_nearly_parallel(form: Recurrence, dtype: torch.dtype, apart: float) -> None:
    case = Case(form, (70, 5), K=16, V=8, rate=0.05, learns=False, dtype=dtype)
    check_telescoping(case, nearly_parallel(case, apart))


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


def test_a_strong_head_beside_a_mild_one() -> None:
    case = widened(Case(SCALAR, (40, 17), heads=2, rate=0.1, learns=False, dtype=GPU_DTYPES[0]))
    inputs = draw(case)
    inputs["log_decay"][..., 0] *= 1000
    check(case, inputs)


@pytest.mark.parametrize("place", [0, 100, 2090])
def test_one_strong_chunk_among_mild_ones(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a piece, in its middle and after more chunks than are looked at together: no factor is out of range."""
    use_processors(monkeypatch, SCALAR, 1)
    case = widened(Case(SCALAR, (2100, 30), rate=0.01, learns=False, dtype=GPU_DTYPES[0]))
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
    check_compiled(Case(form, (7, 0, 12), 2, 1, K=8, V=16, learns=False, dtype=GPU_DTYPES[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (300, 0, 700, 1), (5000,)], ids=["in full", "ragged", "cut"])
@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_form
def test_whole_heads_in_16_bits(
    form: Recurrence, dtype: torch.dtype, rate: float, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strong decays or mild ones: under strong ones alone a state that is lost goes unseen."""
    monkeypatch.undo()
    dense = lengths == (512, 512)
    case = Case(
        form, lengths, 4, 2, K=128, V=128, rate=rate, spare=0 if dense else 3, dense=dense, tight=dense, learns=False,
        dtype=dtype,
    )  # fmt: skip
    check(case)
    check(replace(case, K=72, V=104))


MILD = Case(Recurrence(Decay.SCALAR, Erase.DELTA), (86, 3), K=24, V=24, rate=0.2, spare=4, learns=False)
NO_DECAY = replace(MILD, form=Recurrence(Decay.NONE, Erase.DELTA))
STRONG = replace(MILD, rate=40.0)
# What mild decays do in the other loop, which float16 takes always.
PAIRS = replace(MILD, dtype=torch.float16)
HEADS = replace(MILD, lengths=(3, 20, 2, 3), heads=4, key_heads=2)
CUT = replace(MILD, lengths=(2, 250), rate=0.05)
# So long together that they might be cut, and are walked the longest first.
ORDERED = replace(MILD, lengths=(3, 30, 25, 30, 28))
CLEAN = {
    "mild": MILD,
    "none": NO_DECAY,
    "strong": STRONG,
    "pairs": PAIRS,
    "heads": HEADS,
    "cut": CUT,
    "ordered": ORDERED,
}


def of_both(name: str, right: str, wrong: str) -> dict[str, tuple[Case, Bug]]:
    """A bug of what both loops run, seen in each."""
    bug = Bug(delta_turned_walk, right, wrong)
    return {f"{name} of mild decays": (MILD, bug), f"{name} of pairs": (PAIRS, bug)}


def walk(case: Case, right: str, wrong: str) -> tuple[Case, Bug]:
    return case, Bug(delta_turned_walk, right, wrong)


def launch(case: Case, right: str, wrong: str) -> tuple[Case, Bug]:
    return case, Bug(gated_deltanet, right, wrong)


MASK = "pairs = tl.where(seen, pairs, 0.0)"
STORE = "store_rows(o_ptr, tl.trans(o.to(k.dtype)), first, head, HEADS, V, rows, values, valid)"
EVERY_COLUMN = (
    "tl.store(o_ptr + (first * HEADS + head) * V + rows[:, None] * (HEADS * V) + values[None, :], "
    "tl.trans(o.to(k.dtype)), mask=valid[:, None])"
)
STARTS = "        output,\n        *starts.arguments(),"
ERASED = "-beta[None, :] * wrong"
BUGS = {
    "a causal mask dropped": walk(MILD, MASK, "pass"),
    "a causal mask without a decay dropped": walk(NO_DECAY, MASK, "pass"),
    "a causal mask of pairs dropped": walk(PAIRS, "decay_where(seen, summed[None, :]", "decay_between(summed[None, :]"),
    "pairs that do not fade": walk(PAIRS, "decay_where(seen, summed[None, :]", "decay_where(seen, 0 * summed[None, :]"),
    "the state's carry forgotten": walk(MILD, "decay_of(carry + middle)", "decay_of(middle)"),
    "a middle that is half a chunk late for the carry": walk(MILD, "carry = total - middle", "carry = total - total"),
    "a middle forgotten in what is read and known": walk(MILD, "decay_of(summed - middle)", "decay_of(summed)"),
    "a final state without its carry": walk(MILD, "state *= decay_of(carry)", "pass"),
    "reads of mild decays that do not fade": walk(MILD, "o *= (scale * fades)[None, :]", "o *= scale"),
    "reads of pairs that do not fade": walk(PAIRS, "o *= fades[None, :]", "pass"),
    **of_both("what is known does not fade", "wrong * fades[None, :]", "wrong"),
    "writes of mild decays that do not fade": walk(MILD, "beta * decay_of(middle - summed)", "beta"),
    "writes of pairs that do not fade": walk(PAIRS, "decay_between(total, summed)", "decay_of(0 * summed)"),
    "a state of pairs that does not fade": walk(PAIRS, "state *= decay_of(total)", "pass"),
    **of_both("beta forgotten in what is erased", ERASED, "-wrong"),
    "beta forgotten in what mild decays write": walk(MILD, "beta * decay_of(middle", "decay_of(middle"),
    "beta forgotten in what is written": walk(NO_DECAY, "writes = beta\n", "writes = 0 * beta + 1.0\n"),
    "beta forgotten in what pairs write": walk(PAIRS, "writes = beta\n", "writes = 0 * beta + 1.0\n"),
    **of_both("what is erased stays", ERASED, "0 * wrong"),
    **of_both("what is erased is added", ERASED, ERASED.removeprefix("-")),
    **of_both("erasures not transposed", "tl.trans(erasure)", "erasure"),
    **of_both("what is known is added", "wrong = v - wrong *", "wrong = v + wrong *"),
    "what is known is added where nothing fades": walk(NO_DECAY, "wrong = v - wrong\n", "wrong = v + wrong\n"),
    **of_both("queries and keys exchanged", "tl.dot(k, tl.trans(q)", "tl.dot(q, tl.trans(k)"),
    **of_both("what came before is not read", "pairs, acc=o,", "pairs,"),
    **of_both("a state that is not added to", "k, acc=state,", "k,"),
    "a scale forgotten with mild decays": walk(MILD, "(scale * fades)", "fades"),
    "a scale forgotten in pairs": walk(PAIRS, "o *= scale\n", "pass\n"),
    "a start lost": launch(MILD, STARTS, "        output,\n        *(None,) * 4,"),
    "what a cut piece starts from lost": launch(
        CUT, STARTS, "        output,\n        starts.initial,\n        *(None,) * 3,"
    ),
    "a start not transposed": walk(MILD, "values, keys, V, K, True, False", "values, keys, V, K, False, False"),
    "an end not transposed": walk(MILD, "values, keys, V, K, True)", "values, keys, V, K, False)"),
    "rows past the end stored": walk(ORDERED, STORE, STORE.replace("valid", "rows < num_rows + 2")),
    "values past the last stored": walk(MILD, STORE, EVERY_COLUMN),
    "what comes after a piece read": (
        replace(MILD, spare=8),
        Bug(descriptors, "tl.maximum(size, 1)", "size + 5"),
    ),
    "strong decays taken for mild ones": walk(STRONG, ">= -LIMIT", "< -LIMIT"),
    "all decays taken for mild ones": walk(STRONG, ">= -LIMIT", ">= -1e9"),
    "the weakest decay taken for the strongest": (
        STRONG,
        Bug(mild_decays, "tl.min(least_of_each", "tl.max(least_of_each"),
    ),
    "float16 given no room": launch(replace(PAIRS, rate=0.75), "RANGE=k.dtype != torch.float16", "RANGE=True"),
    "strong chunks walked twice": walk(STRONG, "start, 0, mild, size", "start, 0, num_chunks, size"),
    "mild chunks walked twice": walk(MILD, "start, mild, num_chunks", "start, 0, num_chunks"),
    "heads taken in turn": walk(HEADS, "head // (HEADS // K_HEADS)", "head % K_HEADS"),
    "another head's strengths": walk(HEADS, "beta_ptr + head.to(tl.int64)", "beta_ptr + 0 * head.to(tl.int64)"),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(gated_deltanet, seeded, case, tmp_path, monkeypatch, walks_turned=always)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(gated_deltanet, None, case, tmp_path, monkeypatch, walks_turned=always)
