"""A router: a token's logits, its best choices and their weights, how even the picks were; and its backward.

    l = W x        s = softmax(l) or sigmoid(l)        p = s / sum s
    I = the k largest of s + bias        g = s[I] / sum s[I] or s[I]
    balance = M sum_m f_m P_m, f the fraction of the slots, P the mean of p        z = mean of logsumexp(l)^2

    r_m = g_m (dg_m - sum g dg) of a pick, or g_m dg_m where g is s[I]        q_m = dbalance M f_m / tokens
    softmax: dl = a - p sum a, a = r + p q        sigmoid: dl = (r + p (q - sum p q)) (1 - s)
    both: dl += dz 2 logsumexp(l) softmax(l) / tokens        dx = dl W        dW = dl^T x

All of it in float32. A library's matmul may split a row differently when there are more or fewer rows beside it, and a bit's
difference is enough to send a token to another memory in decoding than in training. Here a row's products are added up in
blocks of one width, whatever stands in the other rows of its tile. On tensor cores numbers of 16 bits are exact, and float32
numbers beside them have two parts.

What is summed over tokens is summed in programs first, then over programs in one order: same input, same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, num_processors, sigmoids
from linear_moe.kernels.launch import launch_kernel

LARGEST_CHOICES = 256
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
NUM_SCALARS = 4
"""Statistics behind the loads: entropy, balance loss, z-loss, real tokens (at least 1)."""


class Options(NamedTuple):
    """What the router does."""

    top_k: int
    shared: bool
    """Whether one more choice, number M, stands behind each token's picks with weight 1."""
    sigmoid: bool
    """Scores: sigmoids, or the softmax."""
    renormalize: bool
    balance_weight: float
    z_weight: float

    @property
    def columns(self) -> int:
        """Slots of a token."""
        return self.top_k + self.shared


class Launch(NamedTuple):
    """Launch parameters."""

    rows: int
    """Tokens of a program forward."""
    width: int
    """Channels of a step forward: the order of a logit's sum."""
    warps: int
    """Forward, and so on."""
    stages: int
    back_rows: int
    """Tokens of a step backward."""
    channels: int
    """Channels of a program backward."""
    back_warps: int


# A frozen table by the padded number of choices: nothing of a token's sum may depend on the number of tokens. Chosen by what
# the compiler (triton 3.6, for Hopper) makes of it in 16 bits: up to 16 choices 84 registers a thread forward and 87 backward,
# up to 64 114 and 118, with no more than a fifth of a multiprocessor's shared memory, so that several programs read at once; of
# 256 choices 183, and 255 with 112 bytes spilled. Twice the rows or channels take up to twice the registers. 64 channels of 16
# bits are a whole line of 128 bytes. Four stages forward, where a decoded token waits for nothing but its own loads.
FEW = Launch(rows=64, width=64, warps=4, stages=4, back_rows=16, channels=128, back_warps=4)
MANY = Launch(rows=32, width=64, warps=8, stages=3, back_rows=16, channels=64, back_warps=8)
MOST = Launch(rows=16, width=64, warps=8, stages=3, back_rows=16, channels=64, back_warps=8)
BACK_PROGRAMS = 4
"""Programs a multiprocessor runs at once backward. There are no more: each writes a partial sum of the weight's gradient."""


def choose_launch(block: int) -> Launch:
    """For so many choices, the padding among them."""
    return FEW if block <= 16 else MANY if block <= 64 else MOST


class Routed(NamedTuple):
    """What the forward pass makes."""

    weights: Tensor
    """`[S, k]` float32, or `[S, k + 1]` with the shared choice, the best first."""
    indices: Tensor
    """The same int64."""
    loss: Tensor
    """Scalar, float32."""
    statistics: Tensor
    """`[M + NUM_SCALARS]` float32: the loads, then the scalars."""
    logits: Tensor
    """`[S, M]` float32, for the backward pass."""


@triton.jit
def _softmax(logits, inside):
    """Softmax of each row, 0 outside, and its logsumexp."""
    logits = tl.where(inside, logits, float("-inf"))
    largest = tl.max(logits, 1)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.sum(exponentials, 1)
    return exponentials / total[:, None], largest + tl.log(total)


@triton.jit
def _total(scores):
    """Of each row, but not the 0 that underflowed scores make."""
    return tl.maximum(tl.sum(scores, 1), TINY)


@triton.jit
def _finish(counts, summed, entropy, z, tokens, statistics_ptr, loss_ptr, balance_weight, z_weight, CHOICES: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Statistics and loss from sums over the tokens; counts are integers: a float32 ends at 2^24."""
    choices = tl.arange(0, BLOCK)
    tokens = tl.maximum(tokens, 1).to(tl.float32)
    load = counts.to(tl.float32) / tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    balance = CHOICES * tl.sum(load * (summed / tokens), 0)
    tl.store(statistics_ptr + choices, load, mask=choices < CHOICES)
    tl.store(statistics_ptr + CHOICES, entropy / tokens)
    tl.store(statistics_ptr + CHOICES + 1, balance)
    tl.store(statistics_ptr + CHOICES + 2, z / tokens)
    tl.store(statistics_ptr + CHOICES + 3, tokens)
    tl.store(loss_ptr, balance_weight * balance + z_weight * (z / tokens))


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, valid_ptr, bias_ptr, indices_ptr, weights_ptr, logits_ptr, partials_ptr, statistics_ptr, loss_ptr,
    num_tokens, num_programs, balance_weight, z_weight, CHOICES: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    SIZE: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choices = tl.arange(0, BLOCK)
    in_rows, inside = rows < num_tokens, (choices < CHOICES)[None, :]
    logits = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, SIZE, WIDTH):
        channels = first + tl.arange(0, WIDTH)
        in_width = channels < SIZE
        x = tl.load(
            x_ptr + rows[:, None] * SIZE + channels[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + choices[None, :] * SIZE + channels[:, None], mask=inside & in_width[:, None], other=0.0
        )
        if x.dtype == weight.dtype and x.dtype != tl.float32:
            logits = tl.dot(x, weight, acc=logits)
        else:
            logits = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc=logits, input_precision=PRECISION)
    tl.store(logits_ptr + rows[:, None] * CHOICES + choices[None, :], logits, mask=in_rows[:, None] & inside)

    scores, logsumexp = _softmax(logits, inside)
    probabilities = scores
    if SIGMOID:
        scores = tl.where(inside, sigmoids(logits)[0], 0.0)
        # Rounded as IEEE has it: a number over itself is 1.
        probabilities = tl.div_rn(scores, tl.broadcast_to(_total(scores)[:, None], (ROWS, BLOCK)))
    selection = scores
    if bias_ptr is not None:
        selection += tl.load(bias_ptr + choices, mask=choices < CHOICES, other=0.0)[None, :]
    # A NaN is picked, as a library's argmax has it: whatever the numbers are, picks are choices, and differ.
    selection = tl.where(selection == selection, selection, float("inf"))
    rank = tl.full((ROWS, BLOCK), TOP_K, tl.int32)
    for pick in range(TOP_K):
        free = inside & (rank == TOP_K)
        best = tl.max(tl.where(free, selection, float("-inf")), 1)
        lowest = tl.min(tl.where(free & (selection == best[:, None]), choices[None, :], BLOCK), 1)
        rank = tl.where(choices[None, :] == lowest[:, None], pick, rank)
    picked = rank < TOP_K
    weights = tl.where(picked, scores, 0.0)
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.broadcast_to(_total(weights)[:, None], (ROWS, BLOCK)))
    columns: tl.constexpr = TOP_K + SHARED
    at = rows[:, None] * columns + rank
    stored = picked & in_rows[:, None]
    tl.store(indices_ptr + at, tl.broadcast_to(choices[None, :], (ROWS, BLOCK)).to(tl.int64), mask=stored)
    tl.store(weights_ptr + at, weights, mask=stored)
    if SHARED:
        tl.store(indices_ptr + rows * columns + TOP_K, tl.full((ROWS,), CHOICES, tl.int64), mask=in_rows)
        tl.store(weights_ptr + rows * columns + TOP_K, tl.full((ROWS,), 1.0, tl.float32), mask=in_rows)

    valid = tl.load(valid_ptr + rows, mask=in_rows, other=0) != 0
    counts = tl.sum((picked & valid[:, None]).to(tl.int32), 0)
    summed = tl.sum(tl.where(valid[:, None], probabilities, 0.0), 0)
    entropies = -tl.sum(probabilities * tl.log(tl.maximum(probabilities, TINY)), 1)
    entropy = tl.sum(tl.where(valid, entropies, 0.0), 0)
    z = tl.sum(tl.where(valid, logsumexp * logsumexp, 0.0), 0)
    tokens = tl.sum(valid.to(tl.int32), 0)
    if partials_ptr is None:
        _finish(counts, summed, entropy, z, tokens, statistics_ptr, loss_ptr, balance_weight, z_weight, CHOICES, BLOCK)
    else:
        # Programs lie side by side.
        base = partials_ptr + program
        tl.store(base + choices * num_programs, counts.to(tl.float32), mask=choices < CHOICES)
        tl.store(base + (CHOICES + choices) * num_programs, summed, mask=choices < CHOICES)
        tl.store(base + 2 * CHOICES * num_programs, entropy)
        tl.store(base + (2 * CHOICES + 1) * num_programs, z)
        tl.store(base + (2 * CHOICES + 2) * num_programs, tokens.to(tl.float32))


@triton.jit
def _statistics_kernel(partials_ptr, statistics_ptr, loss_ptr, num_programs, balance_weight, z_weight, CHOICES: tl.constexpr,
                       BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    choices = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK, PROGRAMS), tl.int32)
    summed = tl.zeros((BLOCK, PROGRAMS), tl.float32)
    entropy, z = tl.zeros((PROGRAMS,), tl.float32), tl.zeros((PROGRAMS,), tl.float32)
    tokens = tl.zeros((PROGRAMS,), tl.int32)
    for first in range(0, num_programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        made = program < num_programs
        at = partials_ptr + choices[:, None] * num_programs + program[None, :]
        mask = (choices < CHOICES)[:, None] & made[None, :]
        counts += tl.load(at, mask=mask, other=0.0).to(tl.int32)
        summed += tl.load(at + CHOICES * num_programs, mask=mask, other=0.0)
        at = partials_ptr + 2 * CHOICES * num_programs + program
        entropy += tl.load(at, mask=made, other=0.0)
        z += tl.load(at + num_programs, mask=made, other=0.0)
        tokens += tl.load(at + 2 * num_programs, mask=made, other=0.0).to(tl.int32)
    _finish(
        tl.sum(counts, 1), tl.sum(summed, 1), tl.sum(entropy, 0), tl.sum(z, 0), tl.sum(tokens, 0), statistics_ptr, loss_ptr,
        balance_weight, z_weight, CHOICES, BLOCK,
    )  # fmt: skip


@triton.jit
def _d_logits_kernel(
    d_weights_ptr, d_loss_ptr, valid_ptr, indices_ptr, statistics_ptr, logits_ptr, d_logits_ptr, num_tokens, balance_weight,
    z_weight, CHOICES: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr, Z_LOSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choices = tl.arange(0, BLOCK)
    in_rows, in_choices = rows < num_tokens, choices < CHOICES
    inside = in_choices[None, :]
    real = in_rows & (tl.load(valid_ptr + rows, mask=in_rows, other=0) != 0)
    at_logits = rows[:, None] * CHOICES + choices[None, :]
    logits = tl.load(logits_ptr + at_logits, mask=real[:, None] & inside, other=0.0)
    softmax, logsumexp = _softmax(logits, inside)
    scores, probabilities, certain = softmax, softmax, softmax
    if SIGMOID:
        scores, certain = sigmoids(logits)
        scores = tl.where(inside, scores, 0.0)
        all_scores = _total(scores)
        probabilities = scores / all_scores[:, None]
    by_score = tl.zeros((ROWS, BLOCK), tl.float32)
    if d_weights_ptr is not None:
        given = tl.zeros((ROWS, BLOCK), tl.float32)
        weights = tl.zeros((ROWS, BLOCK), tl.float32)
        for pick in range(TOP_K):
            at = rows * COLUMNS + pick
            mine = choices[None, :] == tl.load(indices_ptr + at, mask=real, other=0)[:, None]
            given = tl.where(mine, tl.load(d_weights_ptr + at, mask=real, other=0.0)[:, None], given)
            weights = tl.where(mine, scores, weights)
        if RENORMALIZE:
            total = _total(weights)
            weights = weights / total[:, None]
            # Underflowed scores are not over their sum.
            along = tl.where(total > TINY, tl.sum(weights * given, 1), 0.0)
            given -= along[:, None]
        by_score = weights * given
    per_token = 0.0
    if d_loss_ptr is not None:
        per_token = tl.load(d_loss_ptr) / tl.load(statistics_ptr + CHOICES + 3)
        load = tl.load(statistics_ptr + choices, mask=in_choices, other=0.0)
        by_probability = ((per_token * balance_weight * CHOICES) * load)[None, :]
        if SIGMOID:
            along = tl.where(all_scores > TINY, tl.sum(probabilities * by_probability, 1), 0.0)
            by_probability = by_probability - along[:, None]
        by_score += probabilities * by_probability
    if SIGMOID:
        d_logits = by_score * certain
    else:
        d_logits = by_score - probabilities * tl.sum(by_score, 1)[:, None]
    if Z_LOSS:
        d_logits += (per_token * z_weight * 2.0 * logsumexp)[:, None] * softmax
    # Whatever stands in a pad, it gives no gradient.
    d_logits = tl.where(real[:, None], d_logits, 0.0)
    tl.store(d_logits_ptr + at_logits, d_logits, mask=in_rows[:, None] & inside)


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """A float32 tile times another, plus `acc`. 16-bit numbers are exact in tf32; what multiplies them has two parts there."""
    if b.dtype == tl.float32:
        acc = tl.dot(a, b, acc=acc, input_precision=PRECISION)
    else:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(a - high, b.to(tl.float32), acc=acc, input_precision="tf32")
        acc = tl.dot(high, b.to(tl.float32), acc=acc, input_precision="tf32")
    return acc


@triton.jit
def _backward_kernel(
    d_logits_ptr, x_ptr, weight_ptr, valid_ptr, addend_ptr, d_x_ptr, partials_ptr, num_tokens, steps, CHOICES: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (SIZE + CHANNELS - 1) // CHANNELS
    group, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    channels, choices = part * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    in_channels, in_choices = channels < SIZE, choices < CHOICES
    in_weight = in_choices[:, None] & in_channels[None, :]
    at_weight = choices.to(tl.int64)[:, None] * SIZE + channels[None, :]
    weight = tl.load(weight_ptr + at_weight, mask=in_weight, other=0.0)
    d_weight = tl.zeros((BLOCK, CHANNELS), tl.float32)
    first = group.to(tl.int64) * steps * ROWS
    for step in range(tl.minimum((num_tokens - first + ROWS - 1) // ROWS, steps).to(tl.int32)):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        in_rows = rows < num_tokens
        real = in_rows & (tl.load(valid_ptr + rows, mask=in_rows, other=0) != 0)
        at = rows[:, None] * SIZE + channels[None, :]
        x = tl.load(x_ptr + at, mask=real[:, None] & in_channels[None, :], other=0.0)
        # Twice, by address: no operand is transposed.
        transposed = tl.load(
            d_logits_ptr + rows[None, :] * CHOICES + choices[:, None],
            mask=in_rows[None, :] & in_choices[:, None],
            other=0.0,
        )
        d_weight = _product(transposed, x, d_weight, PRECISION)
        d_logits = tl.load(
            d_logits_ptr + rows[:, None] * CHOICES + choices[None, :],
            mask=in_rows[:, None] & in_choices[None, :],
            other=0.0,
        )
        inside = in_rows[:, None] & in_channels[None, :]
        if addend_ptr is not None:
            d_x = tl.load(addend_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            d_x = tl.zeros((ROWS, CHANNELS), tl.float32)
        d_x = _product(d_logits, weight, d_x, PRECISION)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partials_ptr + group.to(tl.int64) * CHOICES * SIZE + at_weight, d_weight, mask=in_weight)


@triton.jit
def _sum_kernel(partials_ptr, sum_ptr, num_partials, SIZE: tl.constexpr, PARTIALS: tl.constexpr, NUMBERS: tl.constexpr):
    numbers = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    total = tl.zeros((PARTIALS, NUMBERS), tl.float32)
    for first in range(0, num_partials, PARTIALS):
        partial = first + tl.arange(0, PARTIALS).to(tl.int64)
        mask = (partial < num_partials)[:, None] & (numbers < SIZE)[None, :]
        total += tl.load(partials_ptr + partial[:, None] * SIZE + numbers[None, :], mask=mask, other=0.0)
    tl.store(sum_ptr + numbers, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=numbers < SIZE)


def _narrow_block(num_choices: int) -> int:
    """Where no tiles are multiplied."""
    return max(4, 1 << (num_choices - 1).bit_length())


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32x3"


def forward(x: Tensor, weight: Tensor, valid: Tensor, bias: Tensor | None, options: Options) -> Routed:
    """Route `x` `[S, D]` by `weight` `[M, D]`; `valid` is `[S]` bool, `bias` `[M]` float32. Everything is contiguous."""
    (num_tokens, size), num_choices = x.shape, weight.shape[0]
    float32 = torch.float32
    routed = Routed(
        weights=x.new_empty(num_tokens, options.columns, dtype=float32),
        indices=x.new_empty(num_tokens, options.columns, dtype=torch.int64),
        loss=x.new_empty((), dtype=float32),
        statistics=x.new_empty(num_choices + NUM_SCALARS, dtype=float32),
        logits=x.new_empty(num_tokens, num_choices, dtype=float32),
    )
    if num_tokens == 0:
        routed.loss.zero_()
        routed.statistics.zero_()
        return routed
    block = block_of(num_choices)
    launch = choose_launch(block)
    num_programs = cdiv(num_tokens, launch.rows)
    partials = x.new_empty(2 * num_choices + 3, num_programs, dtype=float32) if num_programs > 1 else None
    launch_kernel(
        _forward_kernel, num_programs, x, weight, valid.view(torch.uint8), bias, routed.indices, routed.weights,
        routed.logits, partials, routed.statistics, routed.loss, num_tokens, num_programs, options.balance_weight,
        options.z_weight, CHOICES=num_choices, TOP_K=options.top_k, SHARED=options.shared, SIZE=size,
        SIGMOID=options.sigmoid, RENORMALIZE=options.renormalize, ROWS=launch.rows, WIDTH=launch.width, BLOCK=block,
        PRECISION=_precision(x), num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if partials is not None:
        narrow = _narrow_block(num_choices)
        launch_kernel(
            _statistics_kernel, 1, partials, routed.statistics, routed.loss, num_programs, options.balance_weight,
            options.z_weight, CHOICES=num_choices, BLOCK=narrow, PROGRAMS=4096 // narrow, num_warps=8,
        )  # fmt: skip
    return routed


def backward(
    d_weights: Tensor | None, d_loss: Tensor | None, addend: Tensor | None, x: Tensor, weight: Tensor, valid: Tensor,
    indices: Tensor, statistics: Tensor, logits: Tensor, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the weight, from those of the picks' weights and of the loss; pads give none.

    That of x is added to the `addend` `[S, D]`, if there is one.
    """
    (num_tokens, size), num_choices = x.shape, weight.shape[0]
    d_x, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    if x.numel() == 0:
        return d_x, d_weight.zero_()
    block = block_of(num_choices)
    launch = choose_launch(block)
    d_logits = logits.new_empty(logits.shape)
    narrow = _narrow_block(num_choices)
    rows = max(1024 // narrow, 16)
    launch_kernel(
        _d_logits_kernel, cdiv(num_tokens, rows), d_weights, d_loss, valid.view(torch.uint8), indices, statistics, logits,
        d_logits, num_tokens, options.balance_weight, options.z_weight, CHOICES=num_choices, TOP_K=options.top_k,
        COLUMNS=options.columns, SIGMOID=options.sigmoid, RENORMALIZE=options.renormalize,
        Z_LOSS=options.z_weight != 0 and d_loss is not None, ROWS=rows, BLOCK=narrow, num_warps=4,
    )  # fmt: skip
    parts, tiles = cdiv(size, launch.channels), cdiv(num_tokens, launch.back_rows)
    steps = cdiv(tiles * parts, BACK_PROGRAMS * num_processors(x.device))
    num_groups = cdiv(tiles, steps)
    partials = x.new_empty(num_groups, *weight.shape, dtype=torch.float32)
    launch_kernel(
        _backward_kernel, num_groups * parts, d_logits, x, weight, valid.view(torch.uint8), addend, d_x, partials, num_tokens,
        steps, CHOICES=num_choices, SIZE=size, ROWS=launch.back_rows, CHANNELS=launch.channels, BLOCK=block,
        PRECISION=_precision(x), num_warps=launch.back_warps, num_stages=3,
    )  # fmt: skip
    launch_kernel(
        _sum_kernel, cdiv(weight.numel(), 64), partials, d_weight, num_groups, SIZE=weight.numel(), PARTIALS=32, NUMBERS=64,
        num_warps=4,
    )  # fmt: skip
    return d_x, d_weight
