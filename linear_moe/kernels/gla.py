"""A decay a key channel, without erase: S_t = Diag(a_t) S_{t-1} + k_t v_t^T; o_t = scale q_t^T S_t.

The kernels and the mathematics are in `linear_moe.kernels.gla_walks`; this is how they are launched. A forward pass prepares
every chunk, then walks each segment (or, of long ones, its pieces, whose starts are joined first) over what was prepared. A
backward pass prepares again, walks in both directions for the states that chunks begin with and their gradients, and makes the
rest from them, all chunks in parallel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.kernels.blocks import (
    LOG2E,
    block_of,
    cdiv,
    new_states,
    num_processors,
    precision_of,
    sum_heads,
    tile_choices,
    tile_of,
    zero_uncovered,
)
from linear_moe.kernels.gla_walks import gradients_kernel, prepare_kernel, walk_kernel
from linear_moe.kernels.join import FROM_ZEROS, Starts, join
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.results import Backward
from linear_moe.kernels.splits import Ragged, Splits, Walked, split_length

MILDEST = {torch.bfloat16: 60.0, torch.float16: 8.0, torch.float32: 4.0}
"""A chunk in which no channel fades by more than e^60 is multiplied out around half of its fading: two exponentials a number,
none above e^30. float16 has less range; in float32 an exponent's own rounding must stay below that of its exponential.
"""
COLUMNS = 64
"""Value channels that gradients take at a time."""
HARSH_PROGRAMS = 4
"""A multiprocessor."""


class Launch(NamedTuple):
    """Launch parameters."""

    chunk: int
    tile: int
    """Channels of a program: of values in the walk, of keys elsewhere."""
    num_warps: int
    num_stages: int


def choose_launch(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype) -> Launch:
    """Launch parameters of `kernel`: "prepare", "walk", "states" (a walk that stores them) or "gradients". All share one chunk.

    From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H16 K = V = 128): prepare 0.340,
    at 2 stages 0.355 (0.43 when 1 stage took 0.50 and 8 warps 0.63); walk 0.237, at 1 stage 0.29, at 3 stages 0.25; states,
    both ways, 0.536, at 2 stages 0.603, on 8 warps 0.538, with tile 128 0.534; gradients 0.93, at 2 stages 0.95, on 8 warps
    1.8. With 168 registers, for three programs a multiprocessor, prepare 0.48. At B32 T2048 H16 K = V = 64: walk 0.238, at
    2 stages 0.266.
    """
    largest = max(key_dim, value_dim)
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=64 if largest <= 64 else 32, tile=32 if largest <= 128 else 16, num_warps=4, num_stages=1)
    if kernel in ("walk", "states"):
        stages = 2 if largest > 128 or (kernel == "walk" and largest > 64) else 3
        return Launch(chunk=64, tile=64, num_warps=8 if largest > 128 else 4, num_stages=stages)
    return Launch(chunk=64, tile=64, num_warps=4, num_stages=2 if kernel == "prepare" and largest > 128 else 3)


TABLE = LaunchTable(
    "gla",
    choose_launch,
    lambda kernel, key_dim, value_dim, dtype: {
        "tile": tile_choices(*((value_dim, key_dim) if kernel in ("walk", "states") else (key_dim, value_dim)), dtype),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
)
"""The chunk and, through `piece_length`, where segments are cut are the frozen table's: all four share them, and so do forward
and backward passes."""


class Forward(NamedTuple):
    """What a forward pass makes: as `linear_moe.kernels.results.Forward`, and what its walks shared."""

    output: Tensor
    final_state: Tensor | None
    starts: Tensor | None
    products: Tensor
    """`[S, H, C]`"""


class _Prepared(NamedTuple):
    """What the walks over values need of q, k and the decays."""

    reads: Tensor
    """q e^G `[S, H, K]`"""
    writes: Tensor
    """k e^(G_C - G) `[S, H, K]`"""
    products: Tensor
    """P `[S, H, C]`: a token's row of its chunk's matrix. In a backward pass the forward one's."""
    kept: Tensor | None
    """e^G `[S, H, K]`, in a backward pass."""
    totals: Tensor
    """G_C of every chunk `[chunks, H, K]` float32, to base 2, as `fades`."""
    fades: Tensor
    """How much the channel of a head that fades most does in each chunk `[chunks, H]` float32."""
    chunks: Splits
    splits: Splits
    in_full: bool
    """Whether every chunk is C tokens."""


def _shared_constants(k: Tensor, chunk: int, in_full: bool) -> dict[str, object]:
    return {
        "CHUNK": chunk,
        "IN_FULL": in_full,
        "LEVELS": chunk.bit_length() - 1,
        "LIMIT": MILDEST[k.dtype] * LOG2E.value,
        "PRECISION": precision_of(k.dtype),
    }


def _passes(units: int, device: torch.device) -> tuple[tuple[bool, int], ...]:
    """For mild chunks and then for harsh ones, the number of programs.

    Two launches: in one kernel the two ways would take the registers of both. A program that finds nothing to do costs as well,
    so the few that look for harsh chunks look at many.
    """
    return (True, units), (False, min(units, HARSH_PROGRAMS * num_processors(device)))


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    ragged: Ragged,
    products: Tensor | None = None,
) -> _Prepared:
    """For a forward pass, or with its products for a backward pass."""
    num_tokens, heads, key_dim = log_decay.shape
    launch = TABLE.pick(v.device, "prepare", key_dim, v.shape[2], k.dtype)
    chunk = launch.chunk
    # A piece is a multiple of a chunk: chunks of segments are chunks of pieces.
    chunks, splits = ragged.cut_twice(num_tokens, chunk, piece_length(k, v, ragged))
    in_full = ragged.in_full(num_tokens, chunk)
    reads, writes = (torch.empty(num_tokens, heads, key_dim, dtype=k.dtype, device=k.device) for _ in range(2))
    made = kept = None
    if products is None:
        made = products = torch.empty(num_tokens, heads, chunk, dtype=k.dtype, device=k.device)
    else:
        kept = torch.empty_like(reads)
    totals = torch.empty(chunks.num_pieces, heads, key_dim, dtype=torch.float32, device=k.device)
    fades = totals.new_empty(chunks.num_pieces, heads)
    tile = tile_of(key_dim, launch.tile, k.dtype)
    units = chunks.num_pieces * heads
    passes = _passes(units, k.device)
    if made is None:
        # What is not P is made the same way for all.
        passes = passes[:1]
    for mild, programs in passes:
        launch_kernel(
            prepare_kernel, programs, q, k, log_decay, reads, writes, made, kept, totals, fades, chunks.borders,
            chunks.borders.stride(0), units, programs, HEADS=heads, K_HEADS=k.shape[1], K=key_dim, TILE=tile, MILD=mild,
            num_warps=launch.num_warps, num_stages=launch.num_stages, **_shared_constants(k, chunk, in_full),
        )  # fmt: skip
    return _Prepared(reads, writes, products, kept, totals, fades, chunks, splits, in_full)


def _walk(
    writes: Tensor,
    v: Tensor,
    prepared: _Prepared,
    splits: Splits,
    *,
    starts: Starts,
    reads: Tensor | None = None,
    output: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    piece_totals: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
    walked: Walked | None = None,
) -> None:
    walked = walked or splits.all
    heads, value_dim, key_dim = v.shape[1], v.shape[2], writes.shape[2]
    launch = TABLE.pick(v.device, "walk" if states is None else "states", key_dim, value_dim, v.dtype)
    tile = tile_of(value_dim, launch.tile, v.dtype)
    launch_kernel(
        walk_kernel,
        walked.num_pieces * heads * cdiv(value_dim, tile),
        reads,
        writes,
        v,
        prepared.products,
        prepared.totals,
        splits.begins,
        output,
        states,
        *starts.arguments(),
        final,
        piece_totals,
        *walked.arguments(),
        scale,
        HEADS=heads,
        K=key_dim,
        V=value_dim,
        CHUNK=launch.chunk,
        K_BLOCK=block_of(key_dim),
        TILE=tile,
        # As a constant too, by which a tuner tells launches apart.
        STORES=states is not None,
        IN_FULL=prepared.in_full,
        REVERSE=reverse,
        PRECISION=precision_of(v.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _starts(
    writes: Tensor,
    v: Tensor,
    prepared: _Prepared,
    splits: Splits,
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
) -> Starts:
    """The states that pieces start from: each piece alone, then the join."""
    if not splits.cut:
        return Starts(initial_state)
    shape = (splits.num_pieces, v.shape[1], writes.shape[2], v.shape[2])
    increments = torch.empty(shape, dtype=torch.float32, device=v.device)
    totals = torch.zeros(shape[:3], dtype=torch.float32, device=v.device)
    _walk(
        writes, v, prepared, splits, starts=FROM_ZEROS, final=increments, piece_totals=totals, reverse=reverse,
        walked=splits.handing_on(reverse=reverse),
    )  # fmt: skip
    joined, _ = join(increments, totals, initial_state, splits, reverse=reverse, want_final=False)
    return Starts(initial_state, joined, splits)


def chunk_length(k: Tensor, v: Tensor) -> int:
    """C"""
    return choose_launch("walk", k.shape[2], v.shape[2], v.dtype).chunk


def piece_length(k: Tensor, v: Tensor, ragged: Ragged) -> int | None:
    """Tokens of a piece where long segments are split, from sizes alone."""
    launch = choose_launch("walk", k.shape[2], v.shape[2], v.dtype)
    tiles = cdiv(v.shape[2], tile_of(v.shape[2], launch.tile, v.dtype))
    return split_length(v.shape[0], ragged.max_length, v.shape[1] * tiles, num_processors(v.device), launch.chunk)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    scale: float,
    want_final: bool,
) -> Forward:
    """The recurrence along ragged segments; arguments as the library op's."""
    prepared = _prepare(q, k, v, log_decay, ragged)
    splits = prepared.splits
    starts = _starts(prepared.writes, v, prepared, splits, initial_state)
    piece_ends = None
    if want_final:
        piece_ends = new_states(splits.num_pieces, k, v)
    output = torch.empty_like(v)
    _walk(
        prepared.writes, v, prepared, splits, starts=starts, reads=prepared.reads, output=output, scale=scale,
        final=piece_ends,
    )  # fmt: skip
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    final = None if piece_ends is None else splits.ends(piece_ends)
    return Forward(output, final, starts.joined, prepared.products)


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    joined: Tensor | None,
    products: Tensor,
    ragged: Ragged,
    *,
    scale: float,
) -> Backward:
    """The gradients of `forward`; `joined` and `products` as it returned them."""
    num_tokens, heads, value_dim = v.shape
    key_dim = k.shape[2]
    prepared = _prepare(q, k, v, log_decay, ragged, products)
    splits = prepared.splits
    unscaled = None if d_final is None else d_final / scale
    starts = Starts(initial_state, joined, splits)
    reverse_starts = _starts(prepared.reads, d_output, prepared, splits, unscaled, reverse=True)
    chunks = prepared.chunks
    states, d_states = (new_states(chunks.num_pieces, k, v, k.dtype) for _ in range(2))
    d_starts = None if initial_state is None else new_states(splits.num_pieces, k, v)
    dv = torch.empty_like(v)
    _walk(prepared.writes, v, prepared, splits, starts=starts, states=states)
    _walk(
        prepared.reads, d_output, prepared, splits, starts=reverse_starts, reads=prepared.writes, output=dv, scale=scale,
        states=d_states, final=d_starts, reverse=True,
    )  # fmt: skip
    # In the memory of what they are made of: a program alone reads its tiles, all before it stores any.
    dq, dk = prepared.reads, prepared.writes
    shared = k.shape[1] != heads
    if shared:
        # A key head's gradient is the sum over the value heads that share it, in float32.
        dq, dk = (torch.empty(num_tokens, heads, key_dim, dtype=torch.float32, device=k.device) for _ in range(2))
    d_decay = torch.empty_like(log_decay)
    launch = TABLE.pick(v.device, "gradients", key_dim, value_dim, k.dtype)
    tile = tile_of(key_dim, launch.tile, k.dtype)
    units = chunks.num_pieces * heads * cdiv(key_dim, tile)
    for mild, programs in _passes(units, k.device):
        launch_kernel(
            gradients_kernel, programs, q, k, v, d_output, log_decay, prepared.reads, prepared.writes, prepared.kept, states,
            d_states, dq, dk, d_decay, prepared.totals, prepared.fades, chunks.borders, chunks.borders.stride(0),
            units, programs, scale, HEADS=heads, K_HEADS=k.shape[1], K=key_dim, V=value_dim,
            COLUMNS=tile_of(value_dim, COLUMNS, v.dtype), TILE=tile, MILD=mild, num_warps=launch.num_warps,
            num_stages=launch.num_stages, **_shared_constants(k, launch.chunk, prepared.in_full),
        )  # fmt: skip
    if not ragged.dense:
        for gradient in (dq, dk, dv, d_decay):
            zero_uncovered(gradient, ragged.cu_seqlens)
    if shared:
        dq, dk = (sum_heads(x, k) for x in (dq, dk))
    d_initial = None if d_starts is None else scale * splits.ends(d_starts, reverse=True)
    return Backward(dq, dk, dv, d_decay, d_initial)
