"""A block's steps around its mixer on one GPU: the residual addition with its norm, the gated unit, the weighted sum of slots.

    python benchmarks/block_parts.py
    python benchmarks/block_parts.py --tune

As a training step under autocast has them: a float32 stream and float32 weights, all else in bfloat16. `parts.py` says how each
is timed. PyTorch's side of a norm has the casts that autocast makes of the normed tensor, once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from parts import Grid, Part, fastest, main
from torch import Tensor

from linear_moe.kernels import block_parts, mixing, residual_norm, slot_sum, swiglu

TOKENS, WIDTH, INNER = 16384, 1024, 2048
EPS = 1e-5
BF16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def both_ways(name: str, ours: Callable[..., Any], theirs: Callable[..., Any], backward: Callable[[], object],
              learned: list[Tensor], seeds: list[Tensor], nbytes: tuple[int, int]) -> list[Part]:  # fmt: skip
    """A step forward, and backward; compared first."""
    for x in learned:
        x.requires_grad_()

    def made(run: Callable[..., Any]) -> tuple[Tensor, ...]:
        outputs = run(*learned)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, learned, seeds, retain_graph=True)

    one, other = made(ours), made(theirs)
    for x, y in zip((*one, *gradients(one)), (*other, *gradients(other)), strict=True):
        apart = float(((x.float() - y.float()).abs().max() / y.float().abs().max()).detach())
        if not apart < 0.03:
            sys.exit(f"{name}: {list(x.shape)} differs by {apart:.3g} of its largest")
    forward = torch.no_grad()
    return [
        Part(f"{name}, forward", forward(lambda: made(ours)), forward(lambda: made(theirs)), nbytes[0]),
        Part(f"{name}, backward", backward, lambda: gradients(other), nbytes[1]),
    ]


def norm_parts() -> list[Part]:
    stream, branch, weight = (
        draw(TOKENS, WIDTH, dtype=torch.float32),
        draw(TOKENS, WIDTH),
        draw(WIDTH, dtype=torch.float32),
    )
    d_stream, d_normed = draw(TOKENS, WIDTH, dtype=torch.float32), draw(TOKENS, WIDTH)

    def ours(x: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return block_parts.add_and_norm(x, b, w, eps=EPS, dtype=BF16)

    def theirs(x: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + b
        return summed, F.rms_norm(summed, (WIDTH,), w, EPS).to(BF16)

    summed, _, factor = block_parts._residual_norm(stream, branch, weight, EPS, BF16)
    wide, narrow = stream.nbytes, branch.nbytes
    return both_ways(
        "add and norm", ours, theirs,
        lambda: block_parts._residual_norm_backward(d_stream, d_normed, summed, factor, weight, BF16, True),
        [stream, branch, weight], [d_stream, d_normed], (2 * wide + 2 * narrow, 3 * wide + 2 * narrow),
    )  # fmt: skip


def gated_parts(rows: int, width: int) -> list[Part]:
    x, d_output = draw(rows, 2 * width), draw(rows, width)

    def theirs(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    once = x.nbytes + d_output.nbytes
    return both_ways(
        f"gated unit {rows} x {width}", block_parts.gated_unit, theirs,
        lambda: block_parts._swiglu_backward(d_output, x.detach()),
        [x], [d_output], (once, once + x.nbytes),
    )  # fmt: skip


def sum_parts(fan_out: int) -> list[Part]:
    slots, weights, d_sum = (
        draw(TOKENS * fan_out, WIDTH),
        torch.rand(TOKENS, fan_out, device="cuda"),
        draw(TOKENS, WIDTH),
    )
    place = torch.randperm(TOKENS * fan_out, device="cuda")

    def theirs(slots: Tensor, weights: Tensor) -> Tensor:
        reads = slots.index_select(0, place).unflatten(0, weights.shape).float()
        return (weights[..., None] * reads).sum(1).to(BF16)

    once = slots.nbytes + d_sum.nbytes + place.nbytes
    return both_ways(
        f"sum of {fan_out} slots", lambda s, w: mixing.weighted_sum(s, place, w), theirs,
        lambda: mixing._weighted_sum_backward(d_sum, slots.detach(), place.view(weights.shape), weights.detach()),
        [slots, weights], [d_sum], (once, once + slots.nbytes),
    )  # fmt: skip


def tuned() -> list[dict[str, object]]:
    """Every entry of small grids, fastest first within a part."""
    parts = {part.name: part for part in (*norm_parts(), *gated_parts(TOKENS, INNER), *sum_parts(4))}
    grids: list[Grid] = [
        ("add and norm, forward", residual_norm, [residual_norm.LAUNCH._replace(forward=n) for n in (4, 8, 16, 32)]),
        ("add and norm, backward", residual_norm, [
            residual_norm.LAUNCH._replace(backward=n, rows=rows)
            for n, rows in itertools.product((8, 16, 32), (4, 8, 16, 32, 64))
        ]),
        *((f"gated unit {TOKENS} x {INNER}, {way}", swiglu, [
            swiglu.Launch(numbers, columns, warps)
            for numbers, columns, warps in itertools.product((1024, 2048, 4096), (256, 1024, 2048), (4, 8))
            if numbers >= columns
        ]) for way in ("forward", "backward")),
        ("sum of 4 slots, forward", slot_sum, [
            slot_sum.LAUNCH._replace(forward=numbers, channels=channels, numbers_per_thread=each)
            for numbers, channels, each in itertools.product((1024, 2048), (256, 1024), (8, 16))
        ]),
        ("sum of 4 slots, backward", slot_sum, [
            slot_sum.LAUNCH._replace(backward=numbers, numbers_per_thread=each)
            for numbers, each in itertools.product((1024, 2048, 4096), (8, 16, 32))
        ]),
    ]  # fmt: skip
    return fastest(parts, grids)


def timed() -> Iterator[tuple[Part, object]]:
    """Everything that is timed, with its size."""
    for step in (norm_parts(), gated_parts(TOKENS, INNER), gated_parts(8 * TOKENS, 512), sum_parts(4), sum_parts(2)):
        yield from ((part, f"{TOKENS} tokens") for part in step)


if __name__ == "__main__":
    main(__doc__, timed, tuned)
