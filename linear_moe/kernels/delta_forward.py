"""The delta rule's forward pass with a scalar decay or none in one walk, of short chunks.

For heads of any width where nothing is kept for a backward pass, and for wide ones, of which states are kept of pieces of
several chunks. The equations are those of `linear_moe.kernels.delta_walks`. There tiles are multiplied by what lies in shared
memory, and wide heads take a walk that stores states and a pass that reads from them. Here a program walks the chunks of one
(piece of a segment, head, tile of value channels) and reads as it goes:

    - the state is transposed, `[values, keys]`, so that it is the left factor of what is read from it, and so is all that comes
      of it: a tensor core takes a left factor from registers, where products leave it
    - a wide state is in two halves of the keys, of which one at a time has a copy that is rounded to 16 bits
    - tiles are loaded and stored by descriptors of tensors, which a GPU's tensor memory accelerator follows: there are no
      addresses of rows, and no masks, for past a piece's end and past the last channel it reads 0 and writes nothing
    - chunks are of 32 tokens, half as many: what is summed of one is half as large, and so is what is loaded of one, so that
      neither registers nor the shared memory for the chunks ahead run out
    - what each chunk knows of its own pairs, `solve` makes for all chunks in parallel, with all that is known before the walk
      multiplied in: the strengths, the scale, and every decay between two tokens

With S the state before a chunk, s_t the sum of its log decays up to token t, and E, P and R as there,

    E' = -E diag(b)            R' = scale R diag(b)
    x_t = v_t - e^(s_t) S^T k_t
    r_t = x_t + sum_j E'_tj x_j
    o_t = scale e^(s_t) S^T q_t + sum_j R'_tj x_j
    S  <- e^(s_C) S + sum_j k_j (e^(s_C - s_j) b_j r_j)^T

A walk of narrow heads has room to make P itself, which is faster than R' by way of memory: there it is P (b r) that is read.
Of keys nearly parallel each write takes back the last one's, and the roundings of both would be left: both are two numbers.

Segments that are cut have a walk of this kind first that reads nothing: from zeros, for what each piece adds to a state, and in
more programs from the identity, for what it does to one.

A backward pass has chunks twice as long, whose E and R it is left. These chunks' are the blocks on their diagonals: one solve
makes both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels.blocks import (
    DECAY_KINDS,
    NO_DECAY,
    block_of,
    cdiv,
    decay_between,
    decay_of,
    decay_where,
    gates_by_head,
    inverse_precision_of,
    load_numbers,
    load_start,
    new_states,
    precision_of,
    rows_left,
    state_offsets,
    store_rows,
    summed_decays,
    tile_of,
    walk_at,
    zero_uncovered,
)
from linear_moe.kernels.delta_walks import solve_kernel
from linear_moe.kernels.descriptors import describable, described_rows, described_states
from linear_moe.kernels.gated_deltanet import (
    Forward,
    Kept,
    new_stored_states,
    piece_length,
    solve,
    stored_piece,
    walk_of,
)
from linear_moe.kernels.join import FROM_ZEROS, Starts, join_affine
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.splits import Ragged, Walked


class Launch(NamedTuple):
    """Launch parameters of the walk."""

    chunk: int
    """Tokens that are read and written at a time."""
    keys: int
    """Of a state in one part where a walk reads; of more it is in two."""
    moved_keys: int
    """The same where it does not."""
    paired_keys: int
    """Of heads whose pairs a walk makes itself. Wider ones leave no registers for it."""
    tile: int
    """Value channels of a program."""
    num_warps: int
    num_stages: int


def choose_launch(dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms without a decay and with a scalar one).

    At B8 T4096 H4 K = V = 256 0.161 and 0.174; 2 stages 0.232, 0.232, 4 stages 0.160, 0.175. Of prototypes, both parts rounded
    at once 0.010 more, and outputs stored by address 0.018; chunks of 64, for which only 2 stages fit, 0.237 and 0.284 at best.
    At B32 T2048 H16 K = V = 64, of P in one number, 0.271 and 0.236, 2 stages 0.306 and 0.296. Whole passes with R', and with P
    made in the walk: at B8 T4096 H16 K = V = 128 0.359 and 0.381, 0.353 and 0.401; at B32 T2048 H16 K = V = 64 0.444 and 0.491,
    0.424 and 0.389.
    The two walks of one long sequence that do not read (B1 T32768 H16 K = V = 128), in two parts, of which four programs share
    a multiprocessor: 0.164 and 0.214 for 0.197 and 0.234.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=32, keys=16, moved_keys=16, paired_keys=16, tile=16, num_warps=4, num_stages=1)
    return Launch(chunk=32, keys=128, moved_keys=64, paired_keys=64, tile=64, num_warps=4, num_stages=3)


TABLE = LaunchTable(
    "delta_forward",
    lambda decay, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda decay, key_dim, value_dim, dtype: {"num_stages": (2, 3, 4)},
)
"""By the decay, K, V and the dtype."""


class SolveLaunch(NamedTuple):
    """Launch parameters of the solve."""

    num_warps: int


def choose_solve(key_dim: int) -> SolveLaunch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms with a scalar decay, 1 and 2 warps).

    At B32 T2048 H16 K = V = 64 0.122, 0.135. At B8 T4096 H4 K = V = 256, with pairs that know of no erases, 0.076, 0.060, on 4
    warps 0.088, with 168 registers a thread 0.084. Whole passes at B8 T4096 H16 K = V = 128 0.381, 0.405, on 4 warps 0.529.
    """
    return SolveLaunch(num_warps=1 if key_dim <= 128 else 2)


SOLVE_TABLE = LaunchTable(
    "delta_forward.solve",
    lambda decay, key_dim, dtype: choose_solve(key_dim),
    lambda decay, key_dim, dtype: {"num_warps": (1, 2, 4)},
)
"""By the decay, K and the dtype."""


ENDLESS = 2**30
"""Tokens of a piece where no states are stored: a walk's loop over pieces is of one."""


def takes(q: Tensor, k: Tensor, v: Tensor, keep: bool = False) -> bool:
    """Whether descriptors can describe what heads are in. Exact products have no use for them.

    `keep`: for a backward pass, which of narrow heads takes a state of every chunk of its own, and of the reads.
    """
    if k.dtype == torch.float32 or (keep and stored_piece(k, v) is None):
        return False
    return describable(q, k, v)


@triton.jit
def _product_of_two(x, y, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Sum of acc and x y, whose factors are two numbers of `dtype` each; without the product of the two small ones."""
    large_x, large_y = x.to(dtype), y.to(dtype)
    acc = tl.dot(large_x, large_y, acc=acc, input_precision=PRECISION)
    acc = tl.dot((x - large_x.to(tl.float32)).to(dtype), large_y, acc=acc, input_precision=PRECISION)
    return tl.dot(large_x, (y - large_y.to(tl.float32)).to(dtype), acc=acc, input_precision=PRECISION)


@triton.jit
def delta_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    erasure_ptr,
    reads_ptr,
    o_ptr,
    wrong_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    transitions_ptr,
    states_ptr,
    first_piece_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    num_states,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out, but R', in place of which P is made here then, of keys in one part.

    HALF: keys of the state's first part, which may hold all of them. `transitions` `[*, HEADS, K, K]`: the final state of tiles
    past the values', from a start of the identity and with no values. `states`: of the state before each PIECE tokens.
    """
    VALUE_TILES: tl.constexpr = (V + TILE - 1) // TILE
    TILES: tl.constexpr = VALUE_TILES if transitions_ptr is None else VALUE_TILES + (K + TILE - 1) // TILE
    IN_TWO: tl.constexpr = K > HALF
    KEYS: tl.constexpr = 2 * HALF if IN_TWO else HALF
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, TILES)
    # A final state alone is for what comes after: of a piece that was emptied nothing does.
    if o_ptr is None:
        if size == 0:
            return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, HALF)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    ks = described_rows(k_ptr, start, size, k_head, K_HEADS, K, CHUNK, HALF)
    vs = described_rows(v_ptr, start, size, head, HEADS, V, CHUNK, TILE)
    erasures = described_rows(erasure_ptr, start, size, head, HEADS, CHUNK, CHUNK, CHUNK)
    if o_ptr is not None:
        qs = described_rows(q_ptr, start, size, k_head, K_HEADS, K, CHUNK, HALF)
        outputs = described_rows(o_ptr, start, size, head, HEADS, V, CHUNK, TILE)
        if reads_ptr is not None:
            reads = described_rows(reads_ptr, start, size, head, HEADS, CHUNK, CHUNK, CHUNK)
    if states_ptr is not None:
        states = described_states(states_ptr, num_states * HEADS, K, V, KEYS, TILE)
        first_place = tl.load(first_piece_ptr + piece).to(tl.int32)
    low = load_start(initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, keys, V, K, True, False)
    if transitions_ptr is not None:
        columns = values - VALUE_TILES * TILE
        low += (columns[:, None] == keys[None, :]).to(tl.float32)
    # If there is no other part, anything.
    high = low
    if IN_TWO:
        high = load_start(
            initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, HALF + keys, V, K, True, False
        )
        if transitions_ptr is not None:
            high += (columns[:, None] == HALF + keys[None, :]).to(tl.float32)
    for begin in range(0, size, PIECE):
        if states_ptr is not None:
            # Both parts at once: a store waits for the one before. In the loop over chunks it would take the products' time.
            if IN_TWO:
                before = tl.permute(tl.join(low.to(dtype), high.to(dtype)), (2, 1, 0))
            else:
                before = tl.trans(low.to(dtype))
            place = (first_place + begin // PIECE) * HEADS + head
            states.store([place, 0, tile * TILE], tl.reshape(before, (1, KEYS, TILE)))
        for done in range(begin, begin + tl.minimum(size - begin, PIECE), CHUNK):
            first = start + done
            num_rows = rows_left(size, done, CHUNK, IN_FULL)
            # One part after the other: but for its sums, only one part's rounded copy takes registers.
            k_low = ks.load([done, 0])
            rounded = low.to(dtype)
            known = tl.dot(rounded, tl.trans(k_low), input_precision=PRECISION)
            if o_ptr is not None:
                q_low = qs.load([done, 0])
                o = tl.dot(rounded, tl.trans(q_low), input_precision=PRECISION)
            if IN_TWO:
                k_high = ks.load([done, HALF])
                rounded = high.to(dtype)
                known = tl.dot(rounded, tl.trans(k_high), acc=known, input_precision=PRECISION)
                if o_ptr is not None:
                    q_high = qs.load([done, HALF])
                    o = tl.dot(rounded, tl.trans(q_high), acc=o, input_precision=PRECISION)
            beta = load_numbers(beta_ptr + head.to(tl.int64) * num_tokens + first, rows, rows < num_rows, THREADS)
            if DECAY != NO_DECAY:
                summed, total = summed_decays(decay_ptr, 0.0, head, first, rows, num_rows, num_tokens, DECAY, THREADS)
                fades = decay_of(summed)[None, :]
                known *= fades
            # Of tiles past the values there are none: zeros.
            # What is erased of it is to be of the same numbers: of keys nearly parallel a small rest is left.
            crossing = (tl.trans(vs.load([done, tile * TILE])).to(tl.float32) - known).to(dtype)
            erasure = tl.trans(erasures.load([done, 0]))
            wrong = tl.dot(crossing, erasure, acc=crossing.to(tl.float32), input_precision=PRECISION)
            if o_ptr is not None:
                if DECAY != NO_DECAY:
                    o *= fades
                if reads_ptr is not None:
                    o = tl.dot(crossing, tl.trans(reads.load([done, 0])), acc=scale * o, input_precision=PRECISION)
                else:
                    pairs = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)
                    seen = rows[:, None] <= rows[None, :]
                    if DECAY != NO_DECAY:
                        pairs *= decay_where(seen, summed[None, :], summed[:, None])
                    else:
                        pairs = tl.where(seen, pairs, 0.0)
                    o = scale * _product_of_two(beta[None, :] * wrong, pairs, o, dtype, PRECISION)
                outputs.store([done, tile * TILE], tl.trans(o.to(dtype)))
            if wrong_ptr is not None:
                # A descriptor's store would wait for the output's.
                store_rows(wrong_ptr, tl.trans(wrong), first, head, HEADS, V, rows, values, rows < num_rows)
            weights = beta
            if DECAY != NO_DECAY:
                to_end = decay_of(total)
                low *= to_end
                if IN_TWO:
                    high *= to_end
                weights *= decay_between(total, summed)
            written = (weights[None, :] * wrong).to(dtype)
            # The next chunk begins with the first part while the other's product is on its way. Where nothing is read, that
            # makes ptxas let every product wait for the one before; so there the other comes first.
            if IN_TWO and o_ptr is None:
                high = tl.dot(written, k_high, acc=high, input_precision=PRECISION)
            low = tl.dot(written, k_low, acc=low, input_precision=PRECISION)
            if IN_TWO and o_ptr is not None:
                high = tl.dot(written, k_high, acc=high, input_precision=PRECISION)
    if final_ptr is not None:
        at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        inside = (values < V)[:, None]
        tl.store(final_ptr + at, low, mask=inside & (keys < K)[None, :])
        if IN_TWO:
            tl.store(final_ptr + at + HALF * V, high, mask=inside & (HALF + keys < K)[None, :])
    if transitions_ptr is not None:
        at = state_offsets(piece, head, HEADS, columns, keys, K, K, True)
        inside = ((columns >= 0) & (columns < K))[:, None]
        tl.store(transitions_ptr + at, low, mask=inside & (keys < K)[None, :])
        if IN_TWO:
            tl.store(transitions_ptr + at + HALF * K, high, mask=inside & (HALF + keys < K)[None, :])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_final: bool,
    keep: bool,
) -> Forward:
    """As `linear_moe.kernels.gated_deltanet.forward`. `keep` only where `stored_piece` says how far apart states are stored."""
    num_tokens, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[1:]
    device, exact, kind = v.device, k.dtype == torch.float32, DECAY_KINDS[decay]
    launch = TABLE.pick(device, decay.value, key_dim, value_dim, k.dtype)
    chunk, block = launch.chunk, block_of(key_dim)
    constants = {
        "HEADS": heads, "K_HEADS": key_heads, "K": key_dim, "CHUNK": chunk, "DECAY": kind,
        "IN_FULL": ragged.in_full(num_tokens, chunk),
    }  # fmt: skip
    kept, decays, piece = None, None, ENDLESS
    makes_reads = block <= launch.paired_keys and not keep
    solved = k.new_empty(1 if makes_reads else 2, num_tokens, heads, chunk)
    if keep:
        # The chunks of the backward pass are longer, and solved with these.
        back = walk_of(k, v, log_decay, beta, ragged, decay)
        piece, cuts, splits, strengths = back.piece, back.cuts, back.splits, back.beta
        longer = solve(q, k, v, back, scale=scale, short=solved)
        kept = Kept(torch.empty_like(v), longer, None, None, new_stored_states(k, v, cuts.num_pieces))
        if log_decay is not None:
            decays = gates_by_head(log_decay, None, cuts.borders, piece, chunk=chunk, exact=exact).inner
    else:
        cuts, splits = ragged.cut_twice(num_tokens, chunk, piece_length(k, v, ragged))
        gates = gates_by_head(log_decay, beta, cuts.borders, chunk, exact=exact)
        assert gates.beta is not None
        decays, strengths = gates.sums, gates.beta
        launch_kernel(
            solve_kernel, cuts.num_pieces * heads, None if makes_reads else q, k, decays, strengths, solved, None, None, None,
            cuts.borders, cuts.borders.stride(0), num_tokens, scale, PIECE=chunk, SHORT=chunk, LEVELS=chunk.bit_length() - 1,
            K_BLOCK=block, PACKED=False, WEIGHTED=True, PRECISION=inverse_precision_of(k.dtype),
            num_warps=SOLVE_TABLE.pick(device, decay.value, key_dim, k.dtype).num_warps, num_stages=1, **constants,
        )  # fmt: skip
    erasure, reads = solved[0], None if makes_reads else solved[1]

    def walk(
        walked: Walked,
        starts: Starts,
        ends: Tensor | None,
        output: Tensor | None = None,
        transitions: Tensor | None = None,
    ) -> None:
        tile = tile_of(value_dim, launch.tile, k.dtype)
        tiles = cdiv(value_dim, tile) + (0 if transitions is None else cdiv(key_dim, tile))
        (queries, given), keys = ((None, None), launch.moved_keys) if output is None else ((q, reads), launch.keys)
        wrong, states = (None, None) if kept is None or output is None else (kept.wrong, kept.states)
        begins, num_states, apart = (None, 0, ENDLESS) if states is None else (splits.begins, len(states), piece)
        launch_kernel(
            delta_forward_kernel, walked.num_pieces * heads * tiles, queries, k, v, decays, strengths, erasure, given, output,
            wrong, *starts.arguments(), ends, transitions, states, begins, *walked.arguments(), num_states, num_tokens, scale,
            V=value_dim, PIECE=apart, HALF=block if block <= keys else block // 2, TILE=tile, THREADS=32 * launch.num_warps,
            PRECISION=precision_of(k.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages, **constants,
        )  # fmt: skip

    joined = None
    if splits.cut:
        increments = new_states(splits.num_pieces, k, v)
        transitions = increments.new_empty(splits.num_pieces, heads, key_dim, key_dim)
        # Backwards in time it is other pieces that hand on.
        moving = splits.of_cut_segments if keep else splits.handing_on()
        walk(moving, FROM_ZEROS, increments, transitions=transitions)
        joined, _ = join_affine(increments, transitions, initial_state, splits, want_final=False, exact=exact)
        if kept is not None:
            kept = kept._replace(transitions=transitions)
    ends = new_states(splits.num_pieces, k, v) if want_final else None
    output = torch.empty_like(v)
    walk(splits.all, Starts(initial_state, joined, splits), ends, output)
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    return Forward(output, None if ends is None else splits.ends(ends), kept)
