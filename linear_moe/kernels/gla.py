"""A decay a key channel, without erase: S_t = Diag(a_t) S_{t-1} + k_t v_t^T; o_t = scale q_t^T S_t.

The kernels and the mathematics are in `linear_moe.kernels.gla_walks`; this is how they are launched. A forward pass prepares
every chunk, then walks each segment (or, of long ones, its pieces, whose starts are joined first) over what was prepared. A
backward pass prepares again, walks back for dv, then once by key channels in each direction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.kernels.blocks import (
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
from linear_moe.kernels.gla_walks import keys_kernel, prepare_kernel, queries_kernel, walk_kernel
from linear_moe.kernels.join import join
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.results import Backward, Forward
from linear_moe.kernels.splits import Ragged, Splits, split_length

MILDEST = {torch.bfloat16: 60.0, torch.float16: 8.0, torch.float32: 4.0}
"""A chunk in which no channel fades by more than e^60 is multiplied out around half of its fading: two exponentials a number,
none above e^30. float16 has less range; in float32 an exponent's own rounding must stay below that of its exponential.
"""


class Launch(NamedTuple):
    """Launch parameters."""

    chunk: int
    tile: int
    """Channels of a program: of values in the walk, of keys elsewhere."""
    num_warps: int
    num_stages: int


def choose_launch(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype) -> Launch:
    """Launch parameters of `kernel`: "prepare", "walk", "keys" or "queries". All share one chunk.

    From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H16 K = V = 128): prepare 0.59, with
    8 warps 0.81, and tile 128 0.78; walk 0.235, at 1 stage 0.29, at 3 stages 0.25; keys 1.19, with 4 warps 1.30; queries 1.66,
    with 4 warps 1.82.
    """
    largest = max(key_dim, value_dim)
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=64 if largest <= 64 else 32, tile=32 if largest <= 128 else 16, num_warps=4, num_stages=1)
    if kernel == "walk":
        return Launch(chunk=64, tile=64, num_warps=8 if largest > 128 else 4, num_stages=2)
    return Launch(chunk=64, tile=64, num_warps=4 if kernel == "prepare" or largest <= 64 else 8, num_stages=1)


TABLE = LaunchTable(
    "gla",
    choose_launch,
    lambda kernel, key_dim, value_dim, dtype: {
        "tile": tile_choices(*((value_dim, key_dim) if kernel == "walk" else (key_dim, value_dim)), dtype),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
)
"""The chunk and, through `piece_length`, where segments are cut are the frozen table's: all four share them, and so do forward
and backward passes."""


class _Prepared(NamedTuple):
    """What the walks over values need of q, k and the decays."""

    reads: Tensor
    """q e^G `[S, H, K]`"""
    writes: Tensor
    """k e^(G_C - G) `[S, H, K]`"""
    products: Tensor
    """P `[S, H, C]`: a token's row of its chunk's matrix."""
    totals: Tensor
    """G_C of every chunk `[chunks, H, K]` float32."""
    fades: Tensor
    """How much the channel of a head that fades most does in each chunk `[chunks, H]` float32."""
    first_chunks: Tensor
    """`[P]` the chunk each piece begins with."""


def _shared_constants(k: Tensor, chunk: int) -> dict[str, object]:
    return {
        "CHUNK": chunk,
        "LEVELS": chunk.bit_length() - 1,
        "LIMIT": MILDEST[k.dtype],
        "PRECISION": precision_of(k.dtype),
    }


def _prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, splits: Splits, ragged: Ragged) -> _Prepared:
    num_tokens, heads, key_dim = log_decay.shape
    launch = TABLE.pick(v.device, "prepare", key_dim, v.shape[2], k.dtype)
    chunk = launch.chunk
    # A piece is a multiple of a chunk: chunks of segments are chunks of pieces.
    chunks = ragged.pieces(num_tokens, chunk)
    reads, writes = (torch.empty(num_tokens, heads, key_dim, dtype=k.dtype, device=k.device) for _ in range(2))
    products = torch.empty(num_tokens, heads, chunk, dtype=k.dtype, device=k.device)
    totals = torch.empty(chunks.num_pieces, heads, key_dim, dtype=torch.float32, device=k.device)
    fades = totals.new_empty(chunks.num_pieces, heads)
    tile = tile_of(key_dim, launch.tile, k.dtype)
    # The mild chunks first, then those that are left: the two ways in one kernel would take twice the registers.
    for mild in (True, False):
        launch_kernel(prepare_kernel, chunks.num_pieces * heads,
            q, k, log_decay, reads, writes, products, totals, fades, chunks.borders, chunks.borders.stride(0), HEADS=heads,
            K_HEADS=k.shape[1], K=key_dim, TILE=tile, MILD=mild, num_warps=launch.num_warps,
            num_stages=launch.num_stages, **_shared_constants(k, chunk),
        )  # fmt: skip
    first = splits.first_pieces(chunks, ragged, chunk)
    return _Prepared(reads, writes, products, totals, fades, first)


def _walk(
    reads: Tensor,
    writes: Tensor,
    v: Tensor,
    prepared: _Prepared,
    splits: Splits,
    *,
    starts: Tensor | None,
    output: Tensor | None = None,
    final: Tensor | None = None,
    piece_totals: Tensor | None = None,
    scale: float = 1.0,
    state_scale: float = 1.0,
    reverse: bool = False,
    borders: Tensor | None = None,
) -> None:
    borders = splits.borders if borders is None else borders
    heads, value_dim, key_dim = v.shape[1], v.shape[2], reads.shape[2]
    launch = TABLE.pick(v.device, "walk", key_dim, value_dim, v.dtype)
    tile = tile_of(value_dim, launch.tile, v.dtype)
    launch_kernel(
        walk_kernel,
        splits.num_pieces * heads * cdiv(value_dim, tile),
        reads,
        writes,
        v,
        prepared.products,
        prepared.totals,
        prepared.first_chunks,
        output,
        starts,
        final,
        piece_totals,
        borders,
        borders.stride(0),
        splits.order,
        scale,
        state_scale,
        HEADS=heads,
        K=key_dim,
        V=value_dim,
        CHUNK=launch.chunk,
        K_BLOCK=block_of(key_dim),
        TILE=tile,
        REVERSE=reverse,
        PRECISION=precision_of(v.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _joined(
    writes: Tensor,
    v: Tensor,
    prepared: _Prepared,
    splits: Splits,
    initial_state: Tensor | None,
    *,
    state_scale: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """The state that each piece starts from: each piece alone, then the join."""
    shape = (splits.num_pieces, v.shape[1], writes.shape[2], v.shape[2])
    increments = torch.empty(shape, dtype=torch.float32, device=v.device)
    totals = torch.zeros(shape[:3], dtype=torch.float32, device=v.device)
    _walk(
        writes, writes, v, prepared, splits, starts=None, final=increments, piece_totals=totals, state_scale=state_scale,
        reverse=reverse, borders=splits.trailing if reverse else splits.leading,
    )  # fmt: skip
    return join(increments, totals, initial_state, splits, reverse=reverse, want_final=False)[0]


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
    splits = ragged.splits(v.shape[0], piece_length(k, v, ragged))
    prepared = _prepare(q, k, v, log_decay, splits, ragged)
    starts = initial_state
    if splits.cut:
        starts = _joined(prepared.writes, v, prepared, splits, initial_state)
    piece_ends = None
    if want_final:
        piece_ends = new_states(splits.num_pieces, k, v)
    output = torch.empty_like(v)
    _walk(
        prepared.reads,
        prepared.writes,
        v,
        prepared,
        splits,
        starts=starts,
        output=output,
        scale=scale,
        final=piece_ends,
    )
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    final = None if piece_ends is None else splits.ends(piece_ends)
    return Forward(output, final, starts if splits.cut else None)


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    ragged: Ragged,
    *,
    scale: float,
) -> Backward:
    """The gradients of `forward`; `starts` as it returned them."""
    num_tokens, heads, value_dim = v.shape
    key_dim = k.shape[2]
    splits = ragged.splits(num_tokens, piece_length(k, v, ragged))
    prepared = _prepare(q, k, v, log_decay, splits, ragged)
    reverse_starts = d_final
    if splits.cut:
        reverse_starts = _joined(prepared.reads, d_output, prepared, splits, d_final, state_scale=scale, reverse=True)
    else:
        starts = initial_state
    dv = torch.empty_like(v)
    piece_ends = None
    if starts is not None:
        piece_ends = new_states(splits.num_pieces, k, v)
    _walk(
        prepared.writes, prepared.reads, d_output, prepared, splits, starts=reverse_starts, output=dv, final=piece_ends,
        scale=scale, state_scale=scale, reverse=True,
    )  # fmt: skip
    fades = (prepared.fades, prepared.first_chunks)
    del prepared
    # A key head's gradient is the sum over the value heads that share it, in float32.
    shared = k.shape[1] != heads
    dtype = torch.float32 if shared else k.dtype
    dq, dk = (torch.empty(num_tokens, heads, key_dim, dtype=dtype, device=k.device) for _ in range(2))
    written = torch.empty(num_tokens, heads, key_dim, dtype=k.dtype, device=k.device)
    d_decay = torch.empty_like(log_decay)
    at_start = None if starts is None else torch.linalg.vecdot(starts, piece_ends)

    def run(name: str, kernel: Any, *results: Tensor | None) -> None:
        launch = TABLE.pick(v.device, name, key_dim, value_dim, k.dtype)
        tile = tile_of(key_dim, launch.tile, k.dtype)
        for mild in (True, False):
            launch_kernel(kernel, splits.num_pieces * heads * cdiv(key_dim, tile),
                q, k, v, d_output, log_decay, *results, *fades, splits.borders, splits.borders.stride(0), splits.order, scale,
                HEADS=heads, K_HEADS=k.shape[1], K=key_dim, V=value_dim, V_BLOCK=block_of(value_dim), TILE=tile, MILD=mild,
                num_warps=launch.num_warps, num_stages=launch.num_stages,
                **_shared_constants(k, launch.chunk),
            )  # fmt: skip

    run("keys", keys_kernel, dk, written, reverse_starts)
    run("queries", queries_kernel, written, dq, d_decay, starts, at_start)
    if not ragged.dense:
        for gradient in (dq, dk, dv, d_decay):
            zero_uncovered(gradient, ragged.cu_seqlens)
    if shared:
        dq, dk = (sum_heads(x, k) for x in (dq, dk))
    d_initial = None
    if initial_state is not None:
        assert piece_ends is not None
        d_initial = splits.ends(piece_ends, reverse=True)
    return Backward(dq, dk, dv, d_decay, d_initial)
