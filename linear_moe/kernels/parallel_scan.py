"""The scalar scan in two steps, where a head's state is too large for a walk that also reads it: K or V above 128.

`linear_moe.kernels.scalar_scan` reads a chunk from the state in registers, then writes the chunk to it: one after the other,
with one program a multiprocessor at K = V = 256, and the products of queries and keys again for every tile of values. Here

    _states      walks a segment and only writes: a tile `[keys, values]` of the state in registers, stored before each piece
    read_pieces  reads, all pieces and rows in parallel (`linear_moe.kernels.piece_reads`)

Its gradients are made of the same two steps (`linear_moe.kernels.piece_gradients`), with the states' own gradients stored too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels import piece_reads
from linear_moe.kernels.blocks import (
    DECAY_KINDS,
    DECAY_NAMES,
    LOG2E,
    NO_DECAY,
    Direction,
    cdiv,
    decay_between,
    decay_of,
    gates_by_head,
    load_rows,
    load_start,
    new_states,
    num_processors,
    precision_of,
    rate_of,
    rows_left,
    state_offsets,
    sum_heads,
    summed_decays,
    tile_choices,
    tile_of,
    walk_at,
    zero_uncovered,
)
from linear_moe.kernels.decay_gradient import decay_gradient
from linear_moe.kernels.join import FROM_ZEROS, Starts, join
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.piece_gradients import scan_gradients
from linear_moe.kernels.piece_reads import Pieces, read_pieces
from linear_moe.kernels.results import Backward, Forward
from linear_moe.kernels.splits import Ragged, Splits, Walked, split_length, whole


class Launch(NamedTuple):
    """Launch parameters of the first step."""

    chunk: int
    """Tokens that are written at a time."""
    key_tile: int
    value_tile: int
    """Keys and values of a program."""
    num_warps: int
    num_stages: int


def choose_launch(decay: str, dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H4 K = V = 256).

    Of 128 by 128 channels on 8 warps and of 128 by 64 on 4, 4 stages: 0.070, 0.075 without a decay; 0.073, 0.073 with one a
    head; 0.076, 0.074 a token; at 65,536 tokens in 32 segments 0.163, 0.161; 0.184, 0.177; 0.198, 0.186. With a decay a token,
    the first with 3 stages 0.083, the second 0.079, with 5 stages 0.088; 64 by 128 0.082, 64 by 64 0.100.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=32, key_tile=32, value_tile=32, num_warps=4, num_stages=1)
    if decay == "none":
        return Launch(chunk=64, key_tile=128, value_tile=128, num_warps=8, num_stages=4)
    return Launch(chunk=64, key_tile=128, value_tile=64, num_warps=4, num_stages=4)


TABLE = LaunchTable(
    "parallel_scan.states",
    lambda decay, key_dim, value_dim, dtype: choose_launch(decay, dtype),
    lambda decay, key_dim, value_dim, dtype: {
        "key_tile": tile_choices(key_dim, 1, dtype),
        "value_tile": tile_choices(value_dim, 1, dtype),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
)
"""By the decay, the widths of what is walked as keys and values, and the dtype. The chunk and, through `walk_length`, where
segments are cut are the frozen table's."""


@triton.jit
def states_kernel(
    k_ptr,
    v_ptr,
    decay_ptr,
    states_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    total_ptr,
    first_piece_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    K_TILE: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    REVERSE: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. `borders` are those of the walks, `first_piece` the piece each begins with."""
    K_TILES: tl.constexpr = (K + K_TILE - 1) // K_TILE
    V_TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    tile, head, walk, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, K_TILES * V_TILES)
    # States alone are for what comes after: of a walk that was emptied nothing does.
    if states_ptr is None:
        if size == 0:
            return
    k_head = head // (HEADS // K_HEADS)
    v_head = head // (HEADS // V_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = (tile // V_TILES) * K_TILE + tl.arange(0, K_TILE)
    values = (tile % V_TILES) * V_TILE + tl.arange(0, V_TILE)
    dtype = k_ptr.dtype.element_ty
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state_at = state_offsets(walk, head, HEADS, keys, values, K, V, False)
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, walk, head, HEADS, keys, values, K, V, False, REVERSE
    )
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    if total_ptr is not None:
        all_decay = 0.0
    if states_ptr is not None:
        first_piece = tl.load(first_piece_ptr + walk)
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        in_piece = chunk * CHUNK % PIECE
        first = start + chunk * CHUNK
        num_rows = rows_left(size, chunk * CHUNK, CHUNK, IN_FULL)
        valid = rows < num_rows
        last = (chunk + 1) * CHUNK
        begins_piece = (last % PIECE == 0) | (last >= size) if REVERSE else in_piece == 0
        if DECAY != NO_DECAY:
            piece_size = rows_left(size, chunk * CHUNK - in_piece, PIECE, IN_FULL)
            summed, total = summed_decays(
                decay_ptr, rate, head, first - in_piece, in_piece + rows, piece_size, num_tokens, DECAY, THREADS
            )
        if begins_piece:
            if states_ptr is not None:
                piece = first_piece + chunk * CHUNK // PIECE
                at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
                tl.store(states_ptr + at, state.to(states_ptr.dtype.element_ty), mask=in_state)
            if DECAY != NO_DECAY:
                state *= decay_of(total)
                if total_ptr is not None:
                    all_decay += total.to(tl.float32)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        v = load_rows(v_ptr, first, v_head, V_HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            # What is written fades at once by all that comes after it in the piece, and the state once a piece.
            weights = decay_of(summed) if REVERSE else decay_between(total, summed)
            v = (v.to(tl.float32) * weights[:, None]).to(dtype)
        state = tl.dot(tl.trans(k), v, acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state, mask=in_state)
    if total_ptr is not None:
        if tile == 0:
            tl.store(total_ptr + walk * HEADS + head, all_decay / LOG2E)


class Plan(NamedTuple):
    """What all launches of one call have in common."""

    pieces: Pieces
    """A walk is a multiple of a piece: pieces of segments are pieces of walks."""
    walks: Splits
    """Of the first step: segments, or what long ones are cut into."""
    inner: Tensor | None
    """`[H, S]` the sums of scalar log decays from each chunk's start, where they are wanted."""
    factors: Tensor | None
    """`[H, S, 2]` of scalar decays, as `gates_by_head` makes them, where they are wanted."""


def walk_length(k: Tensor, v: Tensor, ragged: Ragged) -> int | None:
    """Tokens of a walk of the first step where long segments are split, from sizes alone."""
    launch = choose_launch("none", k.dtype)
    tiles = 1
    for size, tile in ((k.shape[2], launch.key_tile), (v.shape[2], launch.value_tile)):
        tiles *= cdiv(size, tile_of(size, tile, k.dtype))
    return split_length(v.shape[0], ragged.max_length, v.shape[1] * tiles, num_processors(v.device), piece_length(k))


def most_pieces(k: Tensor, num_tokens: int, ragged: Ragged) -> int:
    """P"""
    return ragged.num_pieces(num_tokens, piece_length(k))


def piece_length(k: Tensor) -> int:
    """Tokens between two stored states."""
    return piece_reads.choose_launch(k.dtype).piece


def plan_of(
    k: Tensor, v: Tensor, log_decay: Tensor | None, decay: Decay, ragged: Ragged, *, chunk: int | None = None,
    factors: Direction | None = None, sums: Tensor | None = None,
) -> Plan:  # fmt: skip
    """Pieces, whose log decays are summed up, along chunks too if they have a length, and walks.

    `factors`: of walks in which direction they are wanted, if of any. `sums`: the log decays', if they were made before.
    """
    num_tokens = v.shape[0]
    piece = piece_length(k)
    pieces, walks = ragged.cut_twice(num_tokens, piece, walk_length(k, v, ragged))
    inner = made = None
    if sums is not None:
        log_decay = sums
    elif decay is Decay.SCALAR:
        gates = gates_by_head(
            log_decay, None, pieces.borders, piece, chunk=chunk, exact=k.dtype == torch.float32,
            factors=factors,
        )  # fmt: skip
        log_decay, inner, made = gates.sums, gates.inner, gates.factors
    in_full = ragged.in_full(num_tokens, piece)
    return Plan(Pieces(pieces, DECAY_KINDS[decay], log_decay, v.shape[1], in_full), walks, inner, made)


def _run_states(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    *,
    starts: Starts,
    states: Tensor | None = None,
    final: Tensor | None = None,
    totals: Tensor | None = None,
    reverse: bool = False,
    walked: Walked | None = None,
) -> None:
    key_dim, value_dim = k.shape[2], v.shape[2]
    launch = TABLE.pick(v.device, DECAY_NAMES[plan.pieces.kind], key_dim, value_dim, k.dtype)
    k_tile = tile_of(key_dim, launch.key_tile, k.dtype)
    v_tile = tile_of(value_dim, launch.value_tile, k.dtype)
    walked = walked or plan.walks.all
    launch_kernel(
        states_kernel,
        walked.num_pieces * plan.pieces.heads * cdiv(key_dim, k_tile) * cdiv(value_dim, v_tile),
        k,
        v,
        plan.pieces.decays,
        states,
        *starts.arguments(),
        final,
        totals,
        plan.walks.begins,
        *walked.arguments(),
        v.shape[0],
        HEADS=plan.pieces.heads,
        K_HEADS=k.shape[1],
        V_HEADS=v.shape[1],
        K=key_dim,
        V=value_dim,
        PIECE=piece_length(k),
        CHUNK=launch.chunk,
        K_TILE=k_tile,
        V_TILE=v_tile,
        DECAY=plan.pieces.kind,
        IN_FULL=plan.pieces.in_full,
        REVERSE=reverse,
        THREADS=32 * launch.num_warps,
        PRECISION=precision_of(k.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def starts_of(plan: Plan, k: Tensor, v: Tensor, initial_state: Tensor | None, *, reverse: bool = False) -> Starts:
    """The states that walks start from: of cut segments, what each part but the last writes, then the join."""
    walks = plan.walks
    if not walks.cut:
        return Starts(initial_state)
    increments = new_states(walks.num_pieces, k, v)
    totals = torch.empty(walks.num_pieces, plan.pieces.heads, dtype=torch.float32, device=k.device)
    _run_states(
        plan, k, v, starts=FROM_ZEROS, final=increments, totals=totals, reverse=reverse,
        walked=walks.handing_on(reverse=reverse),
    )  # fmt: skip
    joined, _ = join(increments, totals, initial_state, walks, reverse=reverse, want_final=False)
    return Starts(initial_state, joined, walks)


def _states(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    *,
    final: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The state before each piece `[P, H, K, V]` in the dtype of k (in reverse: after it); each segment's last, if wanted."""
    walks = plan.walks
    starts = starts_of(plan, k, v, initial_state, reverse=reverse)
    states = new_states(plan.pieces.splits.num_pieces, k, v, k.dtype)
    ends = new_states(walks.num_pieces, k, v) if final else None
    _run_states(plan, k, v, starts=starts, states=states, final=ends, reverse=reverse)
    return states, None if ends is None else walks.ends(ends, reverse=reverse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_final: bool,
) -> Forward:
    """As `linear_moe.kernels.scalar_scan.forward`; `starts` are the states before each piece."""
    plan = plan_of(k, v, log_decay, decay, ragged)
    states, final = _states(plan, k, v, initial_state, final=want_final)
    output = torch.empty_like(v)
    read_pieces(plan.pieces, q, k, v, states, output, scale=scale, weights=None)
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    return Forward(output, final, states, plan.pieces.decays if decay is Decay.SCALAR else None)


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor,
    sums: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_decay: bool,
) -> Backward:
    """As `linear_moe.kernels.scalar_scan.backward`."""
    plan = plan_of(k, v, log_decay, decay, ragged, sums=sums)
    # What the queries ask is written to the states' gradients without the scale, or float16 might not hold it.
    unscaled = None if d_final is None else d_final / scale
    ends, d_initial = _states(plan, q, d_output, unscaled, final=initial_state is not None, reverse=True)
    # A key head's gradient is the sum over the value heads that share it, in float32.
    shared = q.shape[1] != v.shape[1]
    wide = (v.shape[0], v.shape[1], q.shape[2])
    dq, dk = (torch.empty(wide, dtype=torch.float32 if shared else q.dtype, device=q.device) for _ in range(2))
    dv = torch.empty_like(v)
    overlaps = scan_gradients(
        plan.pieces, q, k, v, d_output, starts, ends, dq, dk, dv, scale=scale, want_decay=want_decay
    )
    if not ragged.dense:
        for gradient in (dq, dk, dv):
            zero_uncovered(gradient, ragged.cu_seqlens)
    if d_initial is not None:
        d_initial = scale * d_initial
    d_decay = None
    if overlaps is not None:
        borders = whole(ragged.cu_seqlens).borders
        d_decay = decay_gradient(*overlaps, Starts(initial_state), d_initial, borders, dense=ragged.dense)
    if shared:
        dq, dk = (sum_heads(x, q) for x in (dq, dk))
    return Backward(dq, dk, dv, d_decay, d_initial)
