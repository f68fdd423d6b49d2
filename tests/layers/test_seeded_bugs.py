"""The layer laws catch what peers got wrong: each bug is put in on purpose, and the named law has to break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import MoMLayer, get_rule
from linear_moe.layers import recurrent_mixer, routing, slots
from linear_moe.layers.recurrent_mixer import Assignment
from linear_moe.layers.routing import SlotPlan, best_first, sort_slots
from linear_moe.layers.sequences import Sequences, describe_sequences
from linear_moe.layers.short_conv import short_conv
from linear_moe.rules.base import Tokens
from linear_moe.rules.retnet import RetNet
from linear_moe.rules.segments import Segments
from linear_moe.testing.laws import Case, LawBroken
from linear_moe.testing.layer_laws import LAYER_LAWS

LAWS = {law.name: law for law in LAYER_LAWS}
Patch = pytest.MonkeyPatch


def conv_across_a_segments_border(patch: Patch) -> None:
    """fla's MoM in training: one convolution over the segments laid end to end."""

    def bug(x: Tensor, weight: Tensor, bias: Tensor | None, cu: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        _, new_state = short_conv(x, weight, bias, cu, state)
        output, _ = short_conv(x, weight, bias, cu[[0, -1]], None)
        return output, new_state

    patch.setattr(recurrent_mixer, "short_conv", bug)


def unstable_grouping(patch: Patch) -> None:
    """Groups are right, order inside them is not."""

    def bug(groups: Tensor, num_groups: int) -> SlotPlan:
        order = torch.sort(groups.flip(0), stable=True).indices
        order = groups.numel() - 1 - order
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        return SlotPlan(order, place, sort_slots(groups, num_groups).cu_seqlens)

    patch.setattr(recurrent_mixer, "sort_slots", bug)


def counts_from_positive_weights(patch: Patch) -> None:
    """A slot whose weight underflowed to 0 is taken for one that was not routed."""
    assign = MoMLayer._assign

    def bug(self: MoMLayer, tokens: Tensor, sequences: Sequences, kernel: bool) -> tuple[Assignment, Tensor | None]:
        assignment, loss = assign(self, tokens, sequences, kernel)
        assert assignment.weights is not None
        memory = torch.where(assignment.weights > 0, assignment.memory, self.num_states)
        return assignment._replace(memory=memory), loss

    patch.setattr(MoMLayer, "_assign", bug)


def _after_the_scan(patch: Patch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`change(final_state, cu_seqlens)` of every scan."""
    scan = recurrent_mixer.scan_segments

    def bug(tokens: Tokens, segments: Segments, **options: Any) -> Any:
        result = scan(tokens, segments, **options)
        if result.final_state is None:
            return result
        return result._replace(final_state=change(result.final_state, segments.cu_seqlens))

    patch.setattr(recurrent_mixer, "scan_segments", bug)


def an_unpicked_memory_decays(patch: Patch) -> None:
    _after_the_scan(
        patch, lambda state, cu: torch.where((cu.diff() == 0)[:, None, None, None], state * (1 - 1e-14), state)
    )


def states_of_neighbours_are_swapped(patch: Patch) -> None:
    _after_the_scan(patch, lambda state, cu: state.flip(0))


def decay_applied_after_the_write(patch: Patch) -> None:
    scan = recurrent_mixer.scan_segments

    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * (state + token.k[..., :, None] * token.v[..., None, :])
        return state, (token.q[..., None, :] @ state).squeeze(-2)

    def bug(tokens: Tokens, segments: Segments, **options: Any) -> Any:
        return scan(tokens, segments, **options | {"step": step, "impl": "recurrent"})

    patch.setattr(recurrent_mixer, "scan_segments", bug)


def pads_in_the_balance_loss(patch: Patch) -> None:
    balance_loss = routing.balance_loss
    patch.setattr(
        routing,
        "balance_loss",
        lambda probabilities, load, valid: balance_loss(probabilities, load, torch.ones_like(valid)),
    )


def pads_in_the_load(patch: Patch) -> None:
    load_fractions = routing.load_fractions

    def bug(indices: Tensor, num_choices: int, valid: Tensor, *more: Any) -> Tensor:
        return load_fractions(indices, num_choices, torch.ones_like(valid), *more)

    patch.setattr(routing, "load_fractions", bug)


def _described(patch: Patch, change: Callable[[Sequences], Sequences]) -> None:
    patch.setattr(
        recurrent_mixer,
        "describe_sequences",
        lambda *given: change(describe_sequences(*given)),
    )


def tokens_seen_counts_pads(patch: Patch) -> None:
    _described(patch, lambda s: replace(s, lengths=torch.full_like(s.lengths, s.max_length)))


def pads_are_routed(patch: Patch) -> None:
    def change(sequences: Sequences) -> Sequences:
        if bool(sequences.valid.all()):
            return sequences
        rows = torch.arange(sequences.num_sequences).repeat_interleave(sequences.max_length)
        return replace(sequences, index=rows, valid=torch.ones_like(sequences.valid))

    _described(patch, change)


def positions_count_pads(patch: Patch) -> None:
    def change(sequences: Sequences) -> Sequences:
        columns = torch.arange(sequences.valid.numel()) % max(sequences.max_length, 1)
        return replace(sequences, position=columns)

    _described(patch, change)


def the_shared_memory_is_weighted(patch: Patch) -> None:
    pad = routing.F.pad

    class Functional:
        @staticmethod
        def pad(x: Tensor, amounts: tuple[int, ...], value: float = 0.0) -> Tensor:
            return pad(x, amounts, value=0.5 if value == 1.0 else value)

    patch.setattr(routing, "F", Functional)


def the_router_runs_in_bfloat16(patch: Patch) -> None:
    patch.setattr(routing, "ordered_sum", lambda x: x.bfloat16().sum(-1).to(x.dtype))


def the_router_follows_autocast(patch: Patch) -> None:
    def bug(x: Tensor) -> Tensor:
        return (x.bfloat16() if torch.is_autocast_enabled("cpu") else x).sum(-1).to(x.dtype)

    patch.setattr(routing, "ordered_sum", bug)


def the_conv_state_is_not_carried(patch: Patch) -> None:
    def bug(x: Tensor, weight: Tensor, bias: Tensor | None, cu: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return short_conv(x, weight, bias, cu, None if state is None else torch.zeros_like(state))

    patch.setattr(recurrent_mixer, "short_conv", bug)


def rotary_positions_count_per_memory(patch: Patch) -> None:
    plans: list[SlotPlan] = []

    def remember(groups: Tensor, num_groups: int) -> SlotPlan:
        plans.append(sort_slots(groups, num_groups))
        return plans[-1]

    tokens_of = RetNet.tokens

    def bug(self: RetNet, raw: Any, parameters: Any, positions: Tensor) -> Tokens:
        # The definition asks for one token at a time, and is to stay right.
        if plans and positions.numel() == plans[-1].order.numel() > 1:
            cu, places = plans[-1].cu_seqlens, torch.arange(positions.numel())
            segment = torch.searchsorted(cu[1:], places, right=True).clamp_max(cu.numel() - 2)
            positions = (places - cu[segment])[None]
        return tokens_of(self, raw, parameters, positions)

    patch.setattr(recurrent_mixer, "sort_slots", remember)
    patch.setattr(RetNet, "tokens", bug)


def a_tokens_gradient_is_its_first_slots(patch: Patch) -> None:
    backward = slots._GatherTokens.backward

    def bug(ctx: Any, *gradients: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        if ctx.fan_out == 1:
            return backward(ctx, *gradients)
        return gradients[0].index_select(0, place).unflatten(0, (-1, ctx.fan_out))[:, 0], None, None, None, None

    patch.setattr(slots._GatherTokens, "backward", staticmethod(bug))


def a_state_with_gradients_is_mutated(patch: Patch) -> None:
    def bug(self: Any, memory: Tensor, conv: Tensor | None, lengths: Tensor) -> None:
        with torch.no_grad():
            self.memory.copy_(memory)
            if conv is not None:
                self.conv.copy_(conv)
            self.tokens_seen.add_(lengths)

    patch.setattr(recurrent_mixer.MemoryState, "update", bug)


def ties_go_to_the_highest_index(patch: Patch) -> None:
    def bug(scores: Tensor, count: int) -> Tensor:
        return scores.shape[-1] - 1 - best_first(scores.flip(-1), count)

    patch.setattr(routing, "best_first", bug)


def training_drops_half_the_weight(patch: Patch) -> None:
    assign = MoMLayer._assign

    def bug(self: MoMLayer, tokens: Tensor, sequences: Sequences, kernel: bool) -> tuple[Assignment, Tensor | None]:
        assignment, loss = assign(self, tokens, sequences, kernel)
        assert assignment.weights is not None
        return assignment._replace(weights=assignment.weights * (0.5 if self.training else 1.0)), loss

    patch.setattr(MoMLayer, "_assign", bug)


BUGS: list[tuple[Callable[[Patch], None], str, str]] = [
    (conv_across_a_segments_border, "gated_deltanet", "layer-causal"),
    (conv_across_a_segments_border, "gated_deltanet", "layer-definition"),
    (conv_across_a_segments_border, "mamba2", "layer-packing"),
    (unstable_grouping, "gated_deltanet", "layer-causal"),
    (unstable_grouping, "retnet", "layer-splits"),
    (counts_from_positive_weights, "gla", "layer-one-takes-all"),
    (an_unpicked_memory_decays, "gated_deltanet", "layer-unpicked"),
    (states_of_neighbours_are_swapped, "gla", "layer-definition"),
    (states_of_neighbours_are_swapped, "deltanet", "layer-splits"),
    (decay_applied_after_the_write, "gla", "layer-definition"),
    (decay_applied_after_the_write, "retnet", "layer-gradients"),
    (pads_in_the_balance_loss, "gated_deltanet", "layer-padding"),
    (pads_in_the_balance_loss, "gated_deltanet", "layer-gradients"),
    (pads_in_the_load, "gated_deltanet", "layer-padding"),
    (tokens_seen_counts_pads, "retnet", "layer-padding"),
    (pads_are_routed, "gated_deltanet", "layer-padding"),
    (positions_count_pads, "retnet", "layer-padding"),
    (the_shared_memory_is_weighted, "deltanet", "layer-definition"),
    (the_router_runs_in_bfloat16, "linear_attention", "layer-definition"),
    (the_router_follows_autocast, "linear_attention", "layer-autocast"),
    (the_conv_state_is_not_carried, "gated_deltanet", "layer-splits"),
    (rotary_positions_count_per_memory, "retnet", "layer-definition"),
    (a_tokens_gradient_is_its_first_slots, "gla", "layer-gradients"),
    (a_state_with_gradients_is_mutated, "gla", "layer-carried-gradients"),
    (ties_go_to_the_highest_index, "gla", "layer-ties"),
    (training_drops_half_the_weight, "gla", "layer-training"),
]


@contextmanager
def patched(bug: Callable[[Patch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        yield


def case_of(rule: str) -> Case:
    return Case(
        get_rule(rule), lengths=(6, 3), num_heads=1, num_value_heads=1, head_dim=4, head_value_dim=3,
        hidden_size=6, num_memories=3, top_k=2, seed=1,
    )  # fmt: skip


@pytest.mark.parametrize("bug, rule, law", BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_the_bug_breaks_the_law(bug: Callable[[Patch], None], rule: str, law: str) -> None:
    case = case_of(rule)
    LAWS[law](case)
    with patched(bug), pytest.raises(LawBroken) as broken:
        LAWS[law](case)
    assert broken.value.law == law
    # By a number that is off, not by an injection that crashes.
    assert "Error" not in broken.value.measured
