"""The parts of a mixture beside its scan on one GPU: the plan of slots and the combine, Triton against PyTorch, and the floor.

    python benchmarks/mom_parts.py
    python benchmarks/mom_parts.py --tune

The kernels are first compared with PyTorch's numbers on the timed input; `parts.py` says how each is timed. `--tune` times a
small grid of launch parameters, as graphs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from parts import Grid, Part, fastest, main
from torch import Tensor
from torch.func import functional_call

from linear_moe.kernels import combine, mixing, slot_plan
from linear_moe.kernels.slot_plan import SlotPlan
from linear_moe.layers import routing
from linear_moe.layers.norms import GatedRMSNorm
from linear_moe.layers.slots import scatter_slots

HEADS, V, EPS = 4, 256, 1e-5


class Shape(NamedTuple):
    """S = B * T tokens, F slots each, of which the last is the shared memory's; the others go to `states - 1` memories."""

    batch: int
    length: int
    fan_out: int
    states: int

    @property
    def tokens(self) -> int:
        """S"""
        return self.batch * self.length

    def __str__(self) -> str:
        return f"S{self.tokens} F{self.fan_out} B{self.batch}, {self.states} states"


SHAPES = (Shape(8, 4096, 3, 5), Shape(8, 4096, 3, 65))


def draw_memories(shape: Shape, skew: float) -> tuple[Tensor, Tensor]:
    """The memories `[S, F]` of each token, distinct, and its sequence `[S]`; the larger the skew the more uneven."""
    scores = torch.rand(shape.tokens, shape.states - 1, device="cuda")
    scores += skew * torch.linspace(1, 0, shape.states - 1, device="cuda")
    routed = scores.topk(shape.fan_out - 1).indices
    shared = torch.full((shape.tokens, 1), shape.states - 1, device="cuda")
    sequence = torch.arange(shape.batch, device="cuda").repeat_interleave(shape.length)
    return torch.cat((routed, shared), 1), sequence


def torch_plan(memory: Tensor, sequence: Tensor, num_states: int, num_sequences: int) -> SlotPlan:
    """The plan and the counts as the layers make them of tensors."""
    num_segments = num_states * num_sequences
    valid = sequence < num_sequences
    groups = torch.where(valid[:, None], memory * num_sequences + sequence[:, None], num_segments)
    plan = routing.sort_slots(groups.flatten(), num_segments)
    states = torch.arange(num_states, device=memory.device)
    counts = ((memory[..., None] == states) & valid[:, None, None]).sum((0, 1))
    return SlotPlan(plan.order, plan.place, plan.cu_seqlens, counts)


def plan_part(shape: Shape, skew: float) -> Part:
    """The plan of uneven slots."""
    slots = (*draw_memories(shape, skew), shape.states, shape.batch)
    ours, theirs = mixing.plan_slots(*slots), torch_plan(*slots)
    for name, one, other in zip(SlotPlan._fields, ours, theirs, strict=True):
        if not torch.equal(one, other):
            sys.exit(f"the plan's {name} is wrong at {shape}, skew {skew}")
    nbytes = sum(x.nbytes for x in (*slots[:2], *ours))
    return Part(
        f"plan, skew {skew:g}", lambda: mixing.plan_slots(*slots), lambda: torch_plan(*slots), nbytes
    )  # fmt: skip


def torch_combine(norm: GatedRMSNorm, plan: SlotPlan, inputs: dict[str, Tensor]) -> Tensor:
    """The combine as the layers make it of tensors."""
    sorted_slots = routing.SlotPlan(plan.order, plan.place, plan.cu_seqlens)
    reads = scatter_slots(inputs["reads"], sorted_slots, inputs["weights"].shape[1]).float()
    mixed = (inputs["weights"][..., None, None] * reads).sum(1)
    gate = inputs["gate"].unflatten(-1, mixed.shape[1:])
    output: Tensor = functional_call(norm, {"weight": inputs["norm_weight"]}, (mixed, gate))
    return output.flatten(1)


def combine_parts(shape: Shape) -> list[Part]:
    """The combine of bfloat16 reads, forward and backward."""
    memory, sequence = draw_memories(shape, 0)
    plan = mixing.plan_slots(memory, sequence, shape.states, shape.batch)
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "reads": torch.randn(shape.tokens * shape.fan_out, HEADS, V, **make),
        "weights": torch.rand(shape.tokens, shape.fan_out, device="cuda"),
        "gate": torch.randn(shape.tokens, HEADS * V, **make),
        "norm_weight": torch.randn(V, **make),
    }
    learned = {name: x.requires_grad_() for name, x in inputs.items()}
    norm = GatedRMSNorm(V, EPS, **make)
    seed = torch.randn(shape.tokens, HEADS * V, **make)

    def ours() -> Tensor:
        x = learned
        return mixing.combine_reads(x["reads"], plan.place, x["weights"], x["gate"], x["norm_weight"], eps=EPS)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, list(learned.values()), seed, retain_graph=True)

    def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(run)

    def theirs() -> Tensor:
        return torch_combine(norm, plan, learned)

    outputs = ours(), theirs()
    for one, other in zip((outputs[0], *gradients(outputs[0])), (outputs[1], *gradients(outputs[1])), strict=True):
        apart = float(((one.float() - other.float()).abs().max() / other.float().abs().max()).detach())
        if not apart < 0.02:
            sys.exit(f"the combine is wrong at {shape}: {list(one.shape)} differs by {apart:.3g} of its largest")
    # Only what a kernel is handed: autograd's own part takes host time that a graph has not.
    given = (
        learned["reads"].detach(),
        plan.place,
        *(learned[name].detach() for name in ("weights", "gate", "norm_weight")),
    )
    once = sum(x.nbytes for x in (*inputs.values(), plan.place))
    back = once + seed.nbytes + sum(x.nbytes for x in inputs.values())
    return [
        Part("combine, forward", without_gradients(ours), without_gradients(theirs), once + seed.nbytes),
        Part(
            "combine, backward", lambda: mixing._combine_backward(seed, *given, None, EPS),
            lambda: gradients(outputs[1]), back,
        ),
    ]  # fmt: skip


def tuned(shape: Shape) -> list[dict[str, object]]:
    """Every entry of the grids, fastest first within a part."""
    parts = {part.name: part for part in (plan_part(shape, 0), *combine_parts(shape))}
    grids: list[Grid] = [
        ("combine, forward", combine, [combine.LAUNCH._replace(forward=numbers) for numbers in (4, 8, 16)]),
        ("combine, backward", combine, [
            combine.LAUNCH._replace(backward=numbers, tokens=tokens)
            for numbers, tokens in itertools.product((4, 8, 16), (1, 2, 4, 8, 16))
        ]),
        ("plan, skew 0", slot_plan, [
            slot_plan.LAUNCH._replace(block=block, columns=columns, num_warps=warps)
            for block, columns, warps in itertools.product((128, 256, 512), (8, 16, 32), (4, 8))
        ]),
    ]  # fmt: skip
    return fastest(parts, grids)


def timed() -> Iterator[tuple[Part, object]]:
    """Everything that is timed, with its shape."""
    for shape in SHAPES:
        yield from ((part, shape) for part in (plan_part(shape, 0), plan_part(shape, 10), *combine_parts(shape)))


if __name__ == "__main__":
    main(__doc__, timed, lambda: tuned(SHAPES[0]))
