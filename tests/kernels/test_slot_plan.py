"""The plan of slots is that of torch's stable sort, bit for bit, and the bugs that this must catch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import Patch
from seeding import Bug, in_the_interpreter, seed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.kernels import mixing, slot_plan
from linear_moe.kernels.slot_plan import Launch, SlotPlan
from linear_moe.layers.routing import sort_slots

SMALL = Launch(block=16, columns=8, bins=4, blocks=2, borders=8, num_warps=4)
"""Several programs of everything, and several steps of every loop, for a hundred slots."""
LAUNCHES = {"the table's": slot_plan.LAUNCH, "several of everything": SMALL}


class Slots(NamedTuple):
    """What is sorted."""

    memory: Tensor
    sequence: Tensor
    num_states: int
    num_sequences: int


def draw_slots(
    tokens: int, fan_out: int, num_states: int, num_sequences: int, pads: float = 0.2, skew: float = 1.0
) -> Slots:
    """Tokens of sequences in order, pads anywhere; the larger the skew, the more slots the first memories get."""
    memory = (num_states * torch.rand(tokens, fan_out) ** skew).long()
    sequence = torch.randint(0, max(num_sequences, 1), (tokens,)).sort().values
    pad = (torch.rand(tokens) < pads) | (num_sequences == 0)
    return Slots(memory.to(DEVICE), torch.where(pad, num_sequences, sequence).to(DEVICE), num_states, num_sequences)


def expected(slots: Slots) -> SlotPlan:
    """By torch's stable sort of groups."""
    memory, sequence, num_states, num_sequences = slots
    real = sequence < num_sequences
    groups = torch.where(real[:, None], memory * num_sequences + sequence[:, None], num_states * num_sequences)
    plan = sort_slots(groups.flatten(), num_states * num_sequences)
    counts = torch.bincount(memory[real].flatten(), minlength=num_states)
    source, segment = plan.order // memory.shape[1], groups.flatten()[plan.order].to(torch.int32)
    ends = counts.cumsum(0).to(torch.int32)
    return SlotPlan(plan.order, plan.place, plan.cu_seqlens, counts, source, segment, ends)


def assert_same(plan: SlotPlan, other: SlotPlan) -> None:
    for name, one, two in zip(SlotPlan._fields, plan, other, strict=True):
        assert one.dtype == two.dtype == (torch.int32 if name in ("segment", "ends") else torch.int64)
        assert torch.equal(one, two), f"{name} differs"


def check(slots: Slots, launch: Launch | None = None, module: ModuleType = slot_plan) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LAUNCH", launch or module.LAUNCH)
        assert_same(module.sort(*slots), expected(slots))


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@settings(max_examples=12 if DEVICE == "cpu" else 100)
@given(
    tokens=st.integers(0, 40 if DEVICE == "cpu" else 20_000),
    fan_out=st.integers(1, 4),
    num_states=st.sampled_from([1, 2, 3, 5, 9]),
    num_sequences=st.sampled_from([0, 1, 2, 7, 30]),
    pads=st.sampled_from([0.0, 0.3, 1.0]),
    skew=st.sampled_from([1.0, 4.0]),
)
def test_drawn_slots_are_sorted_as_torch_sorts_them(
    launch: Launch, tokens: int, fan_out: int, num_states: int, num_sequences: int, pads: float, skew: float
) -> None:
    check(draw_slots(tokens, fan_out, num_states, num_sequences, pads, skew), launch)


def in_one_memory(tokens: int, memory: int, num_states: int) -> Slots:
    """Every slot in one."""
    slots = draw_slots(tokens, 2, num_states, 3, pads=0)
    return slots._replace(memory=torch.full_like(slots.memory, memory))


def few_of_many(num_sequences: int) -> Slots:
    """Sequences of which most are empty, a run of them before the first token and one behind the last."""
    slots = draw_slots(50, 2, 4, num_sequences - 200)
    moved = torch.where(slots.sequence < slots.num_sequences, slots.sequence + 100, num_sequences)
    return slots._replace(sequence=moved, num_sequences=num_sequences)


EXTREMES: dict[str, Callable[[], Slots]] = {
    "no token": lambda: draw_slots(0, 3, 5, 8),
    "no token of no sequence": lambda: draw_slots(0, 3, 5, 0),
    "one slot": lambda: draw_slots(1, 1, 1, 1, pads=0),
    "nothing but pads": lambda: draw_slots(130, 2, 3, 4, pads=1),
    "no sequence": lambda: draw_slots(9, 2, 3, 0),
    "the first memory takes all": lambda: in_one_memory(300, 0, 3),
    "the last memory takes all": lambda: in_one_memory(300, 2, 3),
    "one memory": lambda: draw_slots(300, 1, 1, 5),
    "whole blocks": lambda: draw_slots(256, 2, 5, 3),
    "one slot past a block": lambda: draw_slots(257, 1, 5, 3),
    "more memories than are counted at once": lambda: draw_slots(100, 3, 70, 3),
    "more memories than slots": lambda: draw_slots(5, 2, 40, 2),
    "most sequences empty": lambda: few_of_many(2000),
    "a sequence a token": lambda: draw_slots(100, 2, 3, 100)._replace(sequence=torch.arange(100).to(DEVICE)),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str) -> None:
    check(EXTREMES[name]())


def test_what_a_pad_picked_means_nothing() -> None:
    slots = draw_slots(60, 2, 5, 4, pads=0.3)
    pad = (slots.sequence == 4)[:, None]
    assert pad.any()
    for wild in (-7, 2**40):
        assert_same(slot_plan.sort(*slots._replace(memory=torch.where(pad, wild, slots.memory))), expected(slots))


def test_same_bits_twice_and_memory_is_written_before_it_is_read(monkeypatch: Patch) -> None:
    monkeypatch.setattr(slot_plan, "LAUNCH", SMALL)
    slots = draw_slots(20, 2, 9, 4)
    once = slot_plan.sort(*slots)
    assert_same(slot_plan.sort(*slots), once)
    with poisoned_memory():
        assert_same(slot_plan.sort(*slots), once)


def test_strides_change_nothing() -> None:
    slots = draw_slots(40, 3, 5, 4)
    apart = slots._replace(memory=slots.memory.T.contiguous().T, sequence=slots.sequence.repeat_interleave(2)[::2])
    assert not apart.memory.is_contiguous() and not apart.sequence.is_contiguous()
    assert_same(mixing.plan_slots(*apart), expected(slots))


def test_what_torch_asks_of_an_operator() -> None:
    torch.library.opcheck(mixing._plan, tuple(draw_slots(10, 3, 2, 2)))
    torch.library.opcheck(mixing._plan, tuple(draw_slots(0, 3, 5, 4)), test_utils=("test_schema", "test_faketensor"))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    slots = draw_slots(40, 3, 5, 4)
    with FakeTensorMode() as mode:
        fake = mixing.plan_slots(mode.from_tensor(slots.memory), mode.from_tensor(slots.sequence), 5, 4)
    for name, one, real in zip(SlotPlan._fields, fake, expected(slots), strict=True):
        assert (one.shape, one.dtype, one.device) == (real.shape, real.dtype, real.device), name


def test_compiled_into_one_graph_it_is_the_same() -> None:
    slots = draw_slots(40, 3, 5, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(memory: Tensor, sequence: Tensor) -> SlotPlan:
        # Something of the compiler's own before.
        return mixing.plan_slots(memory + 0, sequence, 5, 4)

    assert_same(SlotPlan(*compiled(slots.memory, slots.sequence)), expected(slots))


GOOD = {"memory": torch.zeros(3, 2, dtype=torch.int64), "sequence": torch.zeros(3, dtype=torch.int64)}
BAD = {
    "memory shape": ({"memory": torch.zeros(3)}, r"memory must be \[S, F\] with F at least 1, got shape \[3\]"),
    "no slot of a token": ({"memory": torch.zeros(3, 0)}, r"memory must be \[S, F\] with F at least 1"),
    "memory dtype": ({"memory": torch.zeros(3, 2)}, "memory must be of dtype int64, got torch.float32"),
    "sequence shape": ({"sequence": torch.zeros(2)}, r"sequence must be \[S\] = \[3\], got shape \[2\]"),
    "sequence dtype": ({"sequence": torch.zeros(3).int()}, "sequence must be of dtype int64, got torch.int32"),
    "sequence device": ({"sequence": GOOD["sequence"].to("meta")}, "sequence must be on the device cpu, got meta"),
    "too many": (
        {"memory": torch.empty(2**30, 2, dtype=torch.int64, device="meta")},
        "memory must have at most 2147483647 slots, got 2147483648",
    ),
    "no memory": ({"num_states": 0}, "num_states must be at least 1, got 0"),
    "less than no sequence": ({"num_sequences": -1}, "num_sequences must be at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mixing.plan_slots(**{**GOOD, "num_states": 2, "num_sequences": 1, **changed})


BUGS = {
    "a later slot first": Bug(slot_plan, "(column[None, :] < row[:, None])", "(column[None, :] > row[:, None])"),
    "every block begins where the first does": Bug(slot_plan, "num_blocks + block, mask=exists", "num_blocks, mask=exists"),
    "a bin begins a bin too early": Bug(slot_plan, "(bins[None, :] <= each", "(bins[None, :] < each"),
    "a bin counts the one below": Bug(slot_plan, "tl.where(this > 0, num_blocks, 0)", "tl.where(this > 1, num_blocks, 0)"),
    "a walk begins again with every step": Bug(slot_plan, "carry += tl.sum(count, 0)", "carry += 0"),
    "pads are the first memory's": Bug(slot_plan, "num_sequences, memory, num_states)", "num_sequences, memory, 0)"),
    "a token of too many slots": Bug(
        slot_plan, "sequence_ptr + slot // FAN_OUT, mask=exists", "sequence_ptr + slot // (FAN_OUT + 1), mask=exists"
    ),
    "a sequence begins behind its tokens": Bug(slot_plan, "other=0) < sequence\n", "other=0) <= sequence\n"),
    "a search of too few steps": Bug(slot_plan, "num_slots.bit_length()", "num_slots.bit_length() - 4"),
    "a memory's slots and those before it": Bug(slot_plan, "(carry - begin).to", "carry.to"),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path) -> None:
    copy = seed(slot_plan, None if bug is None else BUGS[bug], tmp_path)
    slots = draw_slots(40, 2, 5, 4, pads=0.3, skew=3.0)
    # No bug writes past the slots. Where one leaves a place unwritten, what is found there must be a slot.
    with poisoned_memory():
        if bug is None:
            check(slots, SMALL, copy)
            return
        with pytest.raises(AssertionError, match="differs"):
            check(slots, SMALL, copy)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "fan_out", "num_states", "num_sequences"),
    [(32_768, 3, 5, 8), (32_768, 3, 65, 8), (10_000_000, 3, 257, 9000), (1_000_000, 2, 3, 700_000)],
)
def test_many_slots(tokens: int, fan_out: int, num_states: int, num_sequences: int) -> None:
    for skew in (1.0, 20.0):
        check(draw_slots(tokens, fan_out, num_states, num_sequences, skew=skew))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_captured_graph_sorts_other_slots() -> None:
    slots = draw_slots(20_000, 3, 5, 8)
    mixing.plan_slots(*slots)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixing.plan_slots(*slots)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = mixing.plan_slots(*slots)
    for skew in (1.0, 6.0):
        other = draw_slots(20_000, 3, 5, 8, skew=skew)
        slots.memory.copy_(other.memory)
        slots.sequence.copy_(other.sequence)
        graph.replay()
        assert_same(plan, expected(other))
