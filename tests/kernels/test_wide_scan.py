"""The walk of wide heads that leaves nothing for a backward pass, at sizes that the interpreter takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scan_laws
import torch
from cases import (
    DEVICE,
    DTYPES,
    SCALAR_FORMS,
    Case,
    check,
    check_compiled,
    check_drawn,
    described,
    draw,
    kernels,
    new_heads,
    results,
)
from scan_laws import LAWS, Law, either_result_alone, long_enough_to_split
from seeding import Bug, assert_caught, in_the_interpreter

from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import blocks, descriptors, library, parallel_scan, piece_reads, turned_scan, wide_scan

every_form = pytest.mark.parametrize("form", SCALAR_FORMS, ids=str)
GPU_DTYPES = DTYPES if DEVICE == "cpu" else DTYPES[1:]
"""On a GPU float32 never comes here."""


def always(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """In place of `piece_reads.takes`."""
    return True


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size."""
    monkeypatch.setattr(piece_reads, "takes", always)
    monkeypatch.setattr(scan_laws, "widened", described)
    monkeypatch.setattr(turned_scan, "MOST_KEYS", 16)


def test_what_a_descriptor_can_describe_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: True)
    x, wide = new_heads(64, torch.bfloat16), new_heads(136, torch.bfloat16)
    assert wide_scan.takes(wide, wide, x)
    assert wide_scan.takes(x, x, wide)
    assert not wide_scan.takes(x, x, x)
    # Rows that begin between 16 bytes, and tensors that do.
    odd, moved = new_heads(140, torch.bfloat16), new_heads(136, torch.bfloat16, offset=4)
    assert not wide_scan.takes(wide, wide, odd)
    assert not wide_scan.takes(odd, odd, wide)
    assert not wide_scan.takes(moved, wide, wide)
    assert not wide_scan.takes(*(new_heads(256, torch.float32),) * 3)


@pytest.mark.gpu
def test_older_gpus_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wide = new_heads(256, torch.bfloat16)
    assert wide_scan.takes(wide, wide, wide) == (torch.cuda.get_device_capability() >= (9, 0))
    monkeypatch.setattr(descriptors, "_has_descriptors", lambda device: False)
    assert not wide_scan.takes(wide, wide, wide)


def test_it_runs_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing here would test it."""
    calls, forward = [], wide_scan.forward
    monkeypatch.setattr(wide_scan, "forward", lambda *given, **named: calls.append(1) or forward(*given, **named))
    case = described(Case(SCALAR_FORMS[0], (5,), dtype=GPU_DTYPES[0]))
    for given, ran in ((case, True), (replace(case, learns=True), False), (replace(case, V=18), False), (case, True)):
        calls.clear()
        results(kernels, given, draw(given))
        # Of its kind the first compiles what it will launch by a pass of its own.
        assert bool(calls) == ran


@every_form
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_drawn_shapes_are_within_the_budget(form: Recurrence, dtype: torch.dtype) -> None:
    check_drawn(form, dtype, described)


@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", SCALAR_FORMS[1:], ids=str)
@pytest.mark.parametrize("law", [law for law in LAWS if law is not either_result_alone], ids=lambda law: law.__name__)
def test_it_holds(law: Law, dtype: torch.dtype, form: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    law(form, dtype, monkeypatch)


@every_form
@pytest.mark.parametrize(("K", "V"), [(8, 40), (40, 8), (24, 56)])
def test_widths_that_are_no_powers_of_two(form: Recurrence, K: int, V: int) -> None:
    """A half of the keys that holds nothing, and tiles of values that are not full."""
    check(Case(form, (33, 1, 0, 20), 4, 2, K=K, V=V, rate=0.1, spare=2, learns=False, dtype=GPU_DTYPES[0]))


@every_form
@pytest.mark.parametrize("rate", [0.1, 100.0])
def test_cut_segments_of_mild_and_strong_decays(form: Recurrence, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(long_enough_to_split(form, GPU_DTYPES[0], monkeypatch), heads=2, rate=rate)
    check(case)
    check(replace(case, initial=False, final=False))


@pytest.mark.parametrize("form", SCALAR_FORMS[1:], ids=str)
def test_a_strong_head_beside_a_mild_one(form: Recurrence) -> None:
    case = Case(form, (40, 17), heads=2, rate=0.1, learns=False, dtype=GPU_DTYPES[0])
    inputs = draw(case)
    inputs["log_decay"][..., 0] *= 1000
    check(case, inputs)


@pytest.mark.parametrize("place", [0, 100, 699])
def test_one_strong_chunk_among_mild_ones(place: int) -> None:
    """In the middle of a piece, before it and after: what the state keeps is seen, and no factor is out of range."""
    case = Case(Recurrence(Decay.SCALAR), (700, 30), rate=0.01, learns=False, dtype=GPU_DTYPES[0])
    inputs = draw(case)
    inputs["log_decay"][place] = -200.0
    check(case, inputs)


@pytest.mark.parametrize("form", SCALAR_FORMS, ids=str)
def test_what_torch_asks_of_an_operator_that_keeps_nothing(form: Recurrence) -> None:
    case = Case(form, (7, 0, 12), 2, 1, K=8, V=16, dtype=GPU_DTYPES[0])
    inputs = draw(case)
    given = (inputs["q"], inputs["k"], inputs["v"], inputs.get("log_decay"), inputs["initial_state"], case.cu_seqlens)
    arguments = (*given, case.max_length, True, 0.5, True, form.decay.value, False)
    torch.library.opcheck(library._scalar, arguments, test_utils=("test_schema", "test_faketensor"))
    *_, starts, sums = library._scalar(*arguments)
    assert not starts.numel()
    assert not sums.numel()


@every_form
def test_compiled_it_gives_the_same(form: Recurrence) -> None:
    check_compiled(Case(form, (7, 0, 12), 2, 1, K=8, V=16, learns=False, dtype=GPU_DTYPES[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (300, 0, 700, 1), (5000,)], ids=["in full", "ragged", "cut"])
@pytest.mark.parametrize("rate", [0.01, 1.0, 20.0])
@every_form
def test_wide_heads_in_bfloat16(form: Recurrence, rate: float, lengths: tuple[int, ...]) -> None:
    """Strong decays or mild ones: under strong ones alone a state that is lost goes unseen."""
    dense = lengths == (512, 512)
    case = Case(
        form, lengths, 4, 2, K=256, V=256, rate=rate, spare=0 if dense else 3, dense=dense, tight=dense, learns=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(case)
    check(replace(case, K=136, V=200))


MILD = Case(Recurrence(Decay.SCALAR), (70, 3), K=24, V=24, rate=0.2, spare=4, learns=False)
NO_DECAY = replace(MILD, form=Recurrence())
CONSTANT = replace(MILD, form=Recurrence(Decay.HEAD), rate=0.1)
STRONG = replace(MILD, rate=40.0)
# What mild decays do in the other loop, which float16 takes always.
PAIRS = replace(MILD, dtype=torch.float16)
HALVES = replace(MILD, K=136)
HEADS = replace(MILD, lengths=(3, 20, 2, 3), heads=4, key_heads=2)
CUT = replace(MILD, lengths=(2, 250), rate=0.05)
# So long together that they might be cut, and are walked the longest first.
ORDERED = replace(MILD, lengths=(3, 120, 90))
CLEAN = {
    "mild": MILD,
    "none": NO_DECAY,
    "constant": CONSTANT,
    "strong": STRONG,
    "pairs": PAIRS,
    "halves": HALVES,
    "heads": HEADS,
    "cut": CUT,
    "ordered": ORDERED,
}

STORE = "store_rows(o_ptr, tl.trans(o.to(v.dtype)), start + done, head, HEADS, V, rows, values, rows < num_rows)"
EVERY_COLUMN = (
    "tl.store(o_ptr + ((start + done) * HEADS + head) * V + rows[:, None] * (HEADS * V) + values[None, :], "
    "tl.trans(o.to(v.dtype)), mask=(rows < num_rows)[:, None])"
)
MASK = "pairs = tl.where(seen, pairs, 0.0)"
BUGS = {
    "a causal mask dropped": (MILD, Bug(turned_scan, MASK, "pass")),
    "a causal mask without a decay dropped": (NO_DECAY, Bug(turned_scan, MASK, "pass")),
    "a causal mask of pairs dropped": (
        PAIRS,
        Bug(turned_scan, "decay_where(seen, summed[None, :]", "decay_between(summed[None, :]"),
    ),
    "mild states do not fade": (
        MILD,
        Bug(turned_scan, "fades = decay_of(total)\n                low", "fades = 1.0\n                low"),
    ),
    "factors of what is written forgotten in pairs": (MILD, Bug(turned_scan, "pairs *= written[:, None]", "pass")),
    "factors of what is written forgotten in the state": (
        MILD,
        Bug(turned_scan, "(v.to(tl.float32) * writes[None, :])", "v"),
    ),
    "factors of what is read forgotten": (MILD, Bug(turned_scan, "(scale * reads)[None, :]", "scale")),
    "factors of what is read and written swapped": (
        MILD,
        Bug(turned_scan, "writes, reads = tl.split", "reads, writes = tl.split"),
    ),
    "factors one token late": (
        MILD,
        Bug(turned_scan, "tl.minimum(each // 2, num_rows - 1)", "tl.minimum(each // 2 + 1, num_rows - 1)"),
    ),
    "factors of what is written one token late": (
        MILD,
        Bug(turned_scan, "2 * row, None", "2 * tl.minimum(row + 1, num_rows - 1), None"),
    ),
    "factors seen from a piece's end": (
        MILD,
        Bug(blocks, "tl.sum(chunks, 1)[:, None, :]", "tl.sum(tl.sum(chunks, 1), 0)[None, None, :]"),
    ),
    "factors seen from the start": (MILD, Bug(blocks, "if not REVERSE:", "if REVERSE:")),
    "a constant decay off by one position": (
        CONSTANT,
        Bug(turned_scan, "CHUNK - 1 - rows", "CHUNK - rows"),
    ),
    "a strong constant decay off by one position": (
        replace(CONSTANT, dtype=torch.float16),
        Bug(turned_scan, "torch.arange(1, count + 1", "torch.arange(count"),
    ),
    "a constant decay of a whole chunk where it ends": (
        CONSTANT,
        Bug(turned_scan, "tl.minimum(size - end * CHUNK, 0)", "0"),
    ),
    "a strong constant decay of a whole chunk where it ends": (
        replace(CONSTANT, dtype=torch.float16),
        Bug(turned_scan, "total = rate * num_rows\n", "total = rate * rows.shape[0]\n"),
    ),
    "half of the keys forgotten in pairs": (HALVES, Bug(turned_scan, "tl.dot(k_high, tl", "tl.dot(0 * k_high, tl")),
    "half of the keys forgotten in what is read": (
        HALVES,
        Bug(turned_scan, "high.to(v.dtype)", "(0 * high).to(v.dtype)"),
    ),
    "half of the keys not written": (HALVES, Bug(turned_scan, "tl.dot(v, k_high,", "tl.dot(0 * v, k_high,")),
    "half of the keys starts as the other": (
        HALVES,
        Bug(turned_scan, "KEYS + keys, V, K, TURNED, REVERSE", "keys, V, K, TURNED, REVERSE"),
    ),
    "half of the keys ends where the other does": (
        HALVES,
        Bug(turned_scan, "KEYS + keys, V, K, TURNED)", "keys, V, K, TURNED)"),
    ),
    "a start lost": (MILD, Bug(turned_scan, "*starts.arguments(),", "None, None, None, None,")),
    "what a cut piece starts from lost": (
        CUT,
        Bug(turned_scan, "*starts.arguments(),", "starts.initial, None, None, None,"),
    ),
    "a final state of pairs that does not fade": (
        PAIRS,
        Bug(turned_scan, "fades = decay_of(total)\n            low", "fades = 1.0\n            low"),
    ),
    "what pairs read of the state does not fade": (PAIRS, Bug(turned_scan, "o *= before[None, :]", "pass")),
    "sums from the piece's start": (MILD, Bug(wide_scan, "plan.inner if decay is", "plan.pieces.decays if decay is")),
    "a write of pairs that does not fade": (
        PAIRS,
        Bug(turned_scan, "(v.to(tl.float32) * after[None, :])", "v"),
    ),
    "rows past the end stored": (ORDERED, Bug(turned_scan, STORE, STORE.replace("num_rows", "num_rows + 2"))),
    "values past the last stored": (MILD, Bug(turned_scan, STORE, EVERY_COLUMN)),
    "what comes after a piece read": (MILD, Bug(descriptors, "tl.maximum(size, 1)", "size + 5")),
    "strong decays taken for mild ones": (STRONG, Bug(blocks, ">= -LIMIT", "< -LIMIT")),
    "all decays taken for mild ones": (STRONG, Bug(blocks, ">= -LIMIT", ">= -1e9")),
    "float16 given no room": (replace(PAIRS, rate=0.75), Bug(blocks, "dtype != torch.float16", "True")),
    "key heads taken in turn": (HEADS, Bug(turned_scan, "head // (HEADS // K_HEADS)", "head % K_HEADS")),
    "query heads taken in turn": (HEADS, Bug(turned_scan, "head // (HEADS // Q_HEADS)", "head % Q_HEADS")),
    "a split's carry lost": (CUT, Bug(parallel_scan, "joined, _ = join(", "_, joined = join(")),
    "a start not transposed": (
        MILD,
        Bug(turned_scan, "TURNED: tl.constexpr = not TRANSPOSED_STATE", "TURNED: tl.constexpr = TRANSPOSED_STATE"),
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = BUGS[bug]
    assert_caught(wide_scan, seeded, case, tmp_path, monkeypatch)


@in_the_interpreter
@pytest.mark.parametrize("case", CLEAN.values(), ids=CLEAN)
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(wide_scan, None, case, tmp_path, monkeypatch)
