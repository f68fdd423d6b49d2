"""The short convolution with its activation and norm on one GPU: the kernels against the layers' PyTorch path.

    python benchmarks/conv_part.py --output conv_part.csv

32,768 tokens in 3 memories each, 1024 channels in 4 heads, W = 4, bfloat16: once as a range of a fused projection's columns, a
row a slot; once read through the index of a projection that is made once a token; and keys and values together, with the
gradient of the whole projection. First both are held to the error budget in float64 on fewer tokens. The floor is the time in
which 3.0 TB/s move what must be moved: forward the rows of x and the output, backward x, the output's gradient and x's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import median_ms, provenance, write_rows
from torch import Tensor

from linear_moe.kernels.slot_conv_operator import segment_of_slots, slot_conv
from linear_moe.kernels.slot_convs_operator import Part, slot_convs
from linear_moe.layers.routing import SlotPlan, sort_slots
from linear_moe.layers.short_conv import activate, short_conv
from linear_moe.layers.slots import gather_tokens
from linear_moe.rules.transforms import l2_norm
from linear_moe.testing.budget import error_budget

BYTES_PER_SECOND = 3.0e12
TOKENS, FAN_OUT, CHANNELS, HEAD, WIDTH = 32_768, 3, 1024, 256, 4
FUSED_COLUMNS = 2 * CHANNELS + 8
"""Of a projection of keys, values and two gates of 4 heads."""


class Case(NamedTuple):
    """What is timed."""

    kind: str
    """"rows", "indexed", or "columns": the ranges of keys and values, and the gates as they are."""
    segments: int
    norm: bool = True
    tokens: int = TOKENS

    @property
    def convolved(self) -> int:
        """C"""
        return 2 * CHANNELS if self.kind == "columns" else CHANNELS

    def __str__(self) -> str:
        return f"{self.kind}, N = {self.segments}" + ("" if self.norm else ", no norm")


CASES = [Case(kind, segments) for kind in ("rows", "indexed", "columns") for segments in (40, 520)]
CASES.append(Case("rows", 40, norm=False))


class Inputs(NamedTuple):
    """Of a case. Gradients are asked for x and the weight."""

    x: Tensor
    """`[S, FUSED_COLUMNS]`, or `[S, C]` if it is indexed."""
    weight: Tensor
    seeds: tuple[Tensor, ...]
    """The outputs' gradients."""
    plan: SlotPlan


def draw(case: Case) -> Inputs:
    """Slots routed at random, the same at every call."""
    generator = torch.Generator("cuda").manual_seed(0)
    slots = case.tokens * FAN_OUT
    plan = sort_slots(torch.randint(case.segments, (slots,), generator=generator, device="cuda"), case.segments)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    x = normal(case.tokens, CHANNELS) if case.kind == "indexed" else normal(slots, FUSED_COLUMNS)
    weight = normal(case.convolved, WIDTH) / WIDTH**0.5
    widths = (CHANNELS, CHANNELS, FUSED_COLUMNS - 2 * CHANNELS) if case.kind == "columns" else (CHANNELS,)
    return Inputs(x.requires_grad_(), weight.requires_grad_(), tuple(normal(slots, width) for width in widths), plan)


Run = Callable[[Case, Inputs], tuple[Tensor, ...]]


def kernels(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """With the slots' segments, which several convolutions can share."""
    borders, head = inputs.plan.cu_seqlens, HEAD if case.norm else None
    segment = segment_of_slots(borders, case.tokens * FAN_OUT)
    if case.kind == "columns":
        parts = [Part(CHANNELS, first, "silu", norm) for first, norm in ((0, head), (CHANNELS, None))]
        made = slot_convs(inputs.x, parts, inputs.weight, None, borders, segment=segment)
        return (*made.parts, made.rest)
    indexed = case.kind == "indexed"
    source, place = (inputs.plan.order // FAN_OUT, inputs.plan.place.view(-1, FAN_OUT)) if indexed else (None, None)
    output, _ = slot_conv(
        inputs.x[:, :CHANNELS], inputs.weight, None, borders, source=source, place=place, segment=segment,
        activation="silu", norm_heads=head,
    )  # fmt: skip
    return (output,)


def layers(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """As `RecurrentMixer` does it without kernels."""
    x = gather_tokens(inputs.x, inputs.plan, FAN_OUT) if case.kind == "indexed" else inputs.x
    convolved, rest = x[:, : case.convolved], x[:, case.convolved :]
    mixed = activate(short_conv(convolved, inputs.weight, None, inputs.plan.cu_seqlens, None)[0], "silu")
    first, *others = mixed.split(CHANNELS, -1)
    if case.norm:
        first = l2_norm(first.unflatten(-1, (-1, HEAD))).flatten(1)
    return (first, *(x.contiguous() for x in (*others, rest))) if case.kind == "columns" else (first,)


def wrong(case: Case) -> str | None:
    """What of the kernels' is over the error budget on fewer tokens."""
    inputs = draw(case._replace(tokens=1000))

    def measured(run: Run, dtype: torch.dtype) -> dict[str, Tensor]:
        x, weight, *seeds = (tensor.detach().to(dtype) for tensor in (inputs.x, inputs.weight, *inputs.seeds))
        mine = Inputs(x.requires_grad_(), weight.requires_grad_(), tuple(seeds), inputs.plan)
        outputs = run(case, mine)
        d_x, d_weight = torch.autograd.grad(outputs, (x, weight), seeds)
        return {"d_x": d_x, "d_weight": d_weight} | {f"output {n}": output for n, output in enumerate(outputs)}

    budgets = error_budget(
        measured(kernels, torch.bfloat16), measured(layers, torch.bfloat16), measured(layers, torch.float64)
    )
    return "; ".join(str(budget) for budget in budgets if not budget.holds) or None


def measure(run: Run, case: Case, inputs: Inputs) -> tuple[float, float]:
    """Milliseconds forward and backward. Of a range of columns the gradient is that range's, without a copy into the rest."""
    x = (inputs.x if case.kind == "columns" else inputs.x[:, :CHANNELS]).detach().requires_grad_()
    mine = inputs._replace(x=x)
    with torch.no_grad():
        forward = median_ms(lambda: run(case, mine))
    outputs = run(case, mine)
    backward = median_ms(lambda: torch.autograd.grad(outputs, (x, mine.weight), inputs.seeds, retain_graph=True))
    return forward, backward


def row(case: Case) -> dict[str, object]:
    """One line of the table."""
    inputs = draw(case)
    size = case.convolved * inputs.x.element_size()
    slots, rows = case.tokens * FAN_OUT * size, inputs.x.shape[0] * size
    values: dict[str, object] = {"case": str(case)}
    moved = {"forward": rows + slots, "backward": 2 * rows + slots}
    times = {name: measure(run, case, inputs) for name, run in (("ours", kernels), ("torch", layers))}
    for at, (direction, count) in enumerate(moved.items()):
        floor = 1e3 * count / BYTES_PER_SECOND
        ours, torch_ms = times["ours"][at], times["torch"][at]
        values |= {
            f"{direction}_ms": round(ours, 4), f"{direction}_torch_ms": round(torch_ms, 4),
            f"{direction}_MB": round(count / 1e6), f"{direction}_floor_ms": round(floor, 4),
            f"{direction}_over_floor": round(ours / floor, 2), f"{direction}_speed_up": round(torch_ms / ours, 1),
        }  # fmt: skip
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a CSV file to write, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("conv_part.py times kernels on a GPU: it needs a CUDA device")
    rows = []
    for case in CASES:
        fault = wrong(case)
        if fault:
            print(f"{case}: no time, {fault}", file=sys.stderr)
            continue
        rows.append(row(case))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="  ", flush=True)
    if arguments.output and rows:
        shared = provenance()
        write_rows(arguments.output, [each | shared for each in rows])


if __name__ == "__main__":
    main()
