"""The state-resident scan of recurrences without erase whose decay is none, a constant a head, or a scalar a token.

One program walks the chunks of one (piece of a segment, head, tile of value channels) with its K x V-tile state in
registers: every input is read once and every output written once. The same walk gives all four results of training:

    o  = scan(q, k, v)             forwards in time
    dq = scan(do, v, k)            forwards:  dq_t = sum_{j <= t} decay(t, j) <do_t, v_j> k_j
    dk = scan(v, do, q)            backwards: dk_t = sum_{j >= t} decay(j, t) <v_t, do_j> q_j
    dv = scan(k, q, do)            backwards: dv_t = sum_{j >= t} decay(j, t) <k_t, q_j> do_j

so there is one kernel, and no accumulator is ever transposed. The decay's gradient needs no pass: d log a_t is <S_0, dS_0> plus
the sum before t of <v, dv> - <q, dq>, both taken in float32 before anything is rounded. (Summed from the end instead, from
<dS_T, S_T>, it would start with a large number: S_T holds what was written last, undecayed, while dS_0 has been through
every decay.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels.splits import Splits, cut, split_length, whole

NO_DECAY = tl.constexpr(0)
HEAD_DECAY = tl.constexpr(1)
SCALAR_DECAY = tl.constexpr(2)
_KINDS = {Decay.NONE: 0, Decay.HEAD: 1, Decay.SCALAR: 2}

JOIN_BLOCK = 1024
CUMSUM_BLOCK = 1024


class Launch(NamedTuple):
    """Launch parameters of the scan."""

    chunk: int
    value_tile: int
    num_warps: int
    num_stages: int


def choose_launch(key_dim: int, dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H200 (torch 2.11, triton 3.6, bf16; forward ms with a constant decay a head).

    K = V = 128, B8 T4096 H16: 0.243; 8 warps 0.362, value tile 128 0.272, value tile 32 0.340, chunk 32 0.318, chunk 128 0.332,
    3 stages 0.388. K = V = 256, B8 T4096 H4: 0.262; 4 warps 0.548, value tile 32 0.359, value tile 128 0.682. K = V = 64, B32
    T2048 H16: 0.149; 2 stages 0.190, value tile 32 0.228, chunk 128 0.470.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores and twice the registers.
        return Launch(chunk=32, value_tile=32, num_warps=4, num_stages=1)
    if key_dim > 128:
        return Launch(chunk=64, value_tile=64, num_warps=8, num_stages=2)
    if key_dim > 64:
        return Launch(chunk=64, value_tile=64, num_warps=4, num_stages=2)
    return Launch(chunk=64, value_tile=64, num_warps=4, num_stages=3)


@triton.jit
def _scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    total_ptr,
    overlap_ptr,
    other_ptr,
    borders_ptr,
    num_tokens,
    read_scale,
    write_scale,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    OTHER_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out: no output (states alone), no initial or final state, no overlap."""
    NUM_TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    # A difference of sums of decays is a small number made of large ones: float32 results need it exact.
    SUM_DTYPE: tl.constexpr = tl.float64 if PRECISION == "ieee" else tl.float32
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start = tl.load(borders_ptr + 2 * piece)
    size = (tl.load(borders_ptr + 2 * piece + 1) - start).to(tl.int32)
    q_head = head // (HEADS // Q_HEADS)
    k_head = head // (HEADS // K_HEADS)
    v_head = head // (HEADS // V_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    in_keys = keys < K
    in_values = values < V
    dtype = k_ptr.dtype.element_ty

    if TRANSPOSED_STATE:
        state_at = keys[:, None] + values[None, :] * K
    else:
        state_at = keys[:, None] * V + values[None, :]
    state_at += (piece * HEADS + head) * K * V
    in_state = in_keys[:, None] & in_values[None, :]
    if initial_ptr is not None:
        state = tl.load(initial_ptr + state_at, mask=in_state, other=0.0)
    else:
        state = tl.zeros((K_BLOCK, V_TILE), tl.float32)
    if DECAY == HEAD_DECAY:
        rate = tl.load(decay_ptr + head).to(SUM_DTYPE)
    if total_ptr is not None:
        all_decay = 0.0

    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        row = chunk * CHUNK + rows
        valid = row < size
        token = start + row
        k_mask = valid[:, None] & in_keys[None, :]
        v_mask = valid[:, None] & in_values[None, :]
        k = tl.load(k_ptr + ((token * K_HEADS + k_head) * K)[:, None] + keys[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + ((token * V_HEADS + v_head) * V)[:, None] + values[None, :], mask=v_mask, other=0.0)
        # `before` brings the chunk's incoming state to a row, `after` a row's write to the outgoing state.
        if DECAY != NO_DECAY:
            if DECAY == HEAD_DECAY:
                summed = rate * (rows + 1)
                total = rate * tl.minimum(size - chunk * CHUNK, CHUNK)
            else:
                each = tl.load(decay_ptr + head.to(tl.int64) * num_tokens + token, mask=valid, other=0.0)
                summed = tl.cumsum(each.to(SUM_DTYPE), 0)
                total = tl.sum(each.to(SUM_DTYPE), 0)
            to_end = tl.exp(tl.minimum(total - summed, 0.0).to(tl.float32))
            from_start = tl.exp(summed.to(tl.float32))
            before = to_end if REVERSE else from_start
            after = from_start if REVERSE else to_end
        if o_ptr is not None:
            q = tl.load(q_ptr + ((token * Q_HEADS + q_head) * K)[:, None] + keys[None, :], mask=k_mask, other=0.0)
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            if overlap_ptr is not None:
                seen = seen & (rows[:, None] != rows[None, :])
            read = tl.dot(q, state.to(dtype), input_precision=PRECISION)
            if DECAY != NO_DECAY:
                between = summed[None, :] - summed[:, None] if REVERSE else summed[:, None] - summed[None, :]
                # Only seen pairs are exponentiated: the others' exponents are positive and may overflow.
                products *= tl.exp(tl.where(seen, between, 0.0).to(tl.float32))
                read *= before[:, None]
            products = tl.where(seen, products, 0.0)
            o = read_scale * (read + write_scale * tl.dot(products.to(dtype), v, input_precision=PRECISION))
            o_at = ((token * HEADS + head) * V)[:, None] + values[None, :]
            if overlap_ptr is not None:
                # A token's own pair is in <q, dq> and <v, dv> alike. Left out of both: with a strong decay it is nearly all
                # of them, and their difference would be rounding.
                own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
                other_head = head // (HEADS // OTHER_HEADS)
                other_at = ((token * OTHER_HEADS + other_head) * V)[:, None] + values[None, :]
                other = tl.load(other_ptr + other_at, mask=v_mask, other=0.0)
                overlap = tl.sum(o * other.to(tl.float32), 1)
                tl.store(overlap_ptr + (tile * HEADS + head).to(tl.int64) * num_tokens + token, overlap, mask=valid)
                o += read_scale * write_scale * own[:, None] * v.to(tl.float32)
            tl.store(o_ptr + o_at, o.to(o_ptr.dtype.element_ty), mask=v_mask)
        if DECAY != NO_DECAY:
            state *= tl.exp(total.to(tl.float32))
            v = (v.to(tl.float32) * after[:, None]).to(dtype)
            if total_ptr is not None:
                all_decay += total.to(tl.float32)
        state += write_scale * tl.dot(tl.trans(k), v, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state, mask=in_state)
    if total_ptr is not None:
        if tile == 0:
            tl.store(total_ptr + piece * HEADS + head, all_decay)


@triton.jit
def _join_kernel(
    increments_ptr,
    totals_ptr,
    initial_ptr,
    starts_ptr,
    final_ptr,
    first_ptr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Join the pieces' transitions S -> exp(total) S + increment in order: the state at every border and the last."""
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % NUM_BLOCKS
    head = (program // NUM_BLOCKS) % HEADS
    segment = (program // (NUM_BLOCKS * HEADS)).to(tl.int64)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < SIZE
    at_segment = (segment * HEADS + head) * SIZE + numbers
    if initial_ptr is not None:
        state = tl.load(initial_ptr + at_segment, mask=inside, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(first_ptr + segment)
    count = (tl.load(first_ptr + segment + 1) - first).to(tl.int32)
    for step in range(count):
        piece = first + (count - 1 - step if REVERSE else step)
        at = (piece * HEADS + head) * SIZE + numbers
        tl.store(starts_ptr + at, state, mask=inside)
        total = tl.load(totals_ptr + piece * HEADS + head)
        state = tl.exp(total) * state + tl.load(increments_ptr + at, mask=inside, other=0.0)
    if final_ptr is not None:
        tl.store(final_ptr + at_segment, state, mask=inside)


@triton.jit
def _decay_gradient_kernel(
    q_overlap_ptr,
    v_overlap_ptr,
    start_ptr,
    gradient_ptr,
    cu_seqlens_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    Q_TILES: tl.constexpr,
    V_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one (segment, head): <S_0, dS_0>, and the sums before each token of <v, dv> - <q, dq>."""
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    segment = program // HEADS
    start = tl.load(cu_seqlens_ptr + segment)
    size = (tl.load(cu_seqlens_ptr + segment + 1) - start).to(tl.int32)
    # In float64: over a long segment the sums are far larger than what they differ by.
    carry = tl.full((), 0.0, tl.float64)
    if start_ptr is not None:
        carry += tl.load(start_ptr + segment * HEADS + head).to(tl.float64)
    for step in range(tl.cdiv(size, BLOCK)):
        row = step * BLOCK + tl.arange(0, BLOCK)
        valid = row < size
        token = start + row
        amount = tl.zeros((BLOCK,), tl.float64)
        for tile in tl.static_range(V_TILES):
            amount += tl.load(v_overlap_ptr + (tile * HEADS + head) * num_tokens + token, mask=valid, other=0.0)
        for tile in tl.static_range(Q_TILES):
            amount -= tl.load(q_overlap_ptr + (tile * HEADS + head) * num_tokens + token, mask=valid, other=0.0)
        before = carry + tl.cumsum(amount, 0) - amount
        tl.store(gradient_ptr + head * num_tokens + token, before.to(tl.float32), mask=valid)
        carry += tl.sum(amount, 0)


class _Walk(NamedTuple):
    """What all scans of one call have in common."""

    decay: Decay
    log_decay: Tensor | None
    """`[H]` or `[H, S]`, float32."""
    cu_seqlens: Tensor
    """`[N + 1]` int64."""
    max_length: int
    heads: int


class _Scanned(NamedTuple):
    output: Tensor
    """`[S, H, V]`"""
    final_state: Tensor | None
    """`[N, H, K, V]` float32."""
    overlap: Tensor | None
    """`[tiles, H, S]` float32: parts of <output, other>, before the output is rounded."""


def _scan(
    walk: _Walk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    read_scale: float = 1.0,
    write_scale: float = 1.0,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    want_final: bool = False,
    transposed_state: bool = False,
    other: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> _Scanned:
    """Scan `q`, `k` `[S, *, K]` and `v` `[S, *, V]`, splitting long segments where that fills the GPU better."""
    num_tokens, _, key_dim = q.shape
    value_dim = v.shape[2]
    launch = choose_launch(key_dim, k.dtype)
    chunk = min(launch.chunk, max(16, triton.next_power_of_2(walk.max_length)))
    value_tile = min(launch.value_tile, max(16, triton.next_power_of_2(value_dim)))
    tiles = -(-value_dim // value_tile)
    device = q.device
    # Tokens in no segment are not visited: their output is 0.
    output = torch.zeros(num_tokens, walk.heads, value_dim, dtype=output_dtype or v.dtype, device=device)
    overlap = None
    if other is not None:
        overlap = torch.empty(tiles, walk.heads, num_tokens, dtype=torch.float32, device=device)
    shape = (walk.heads, *((value_dim, key_dim) if transposed_state else (key_dim, value_dim)))

    def run(
        splits: Splits, *, outputs: bool, initial: Tensor | None, final: Tensor | None, total: Tensor | None
    ) -> None:
        _scan_kernel[(splits.num_pieces * walk.heads * tiles,)](
            q,
            k,
            v,
            walk.log_decay,
            output if outputs else None,
            initial,
            final,
            total,
            overlap if outputs else None,
            other,
            splits.borders,
            num_tokens,
            read_scale,
            write_scale,
            HEADS=walk.heads,
            Q_HEADS=q.shape[1],
            K_HEADS=k.shape[1],
            V_HEADS=v.shape[1],
            OTHER_HEADS=1 if other is None else other.shape[1],
            K=key_dim,
            V=value_dim,
            CHUNK=chunk,
            K_BLOCK=max(16, triton.next_power_of_2(key_dim)),
            V_TILE=value_tile,
            DECAY=_KINDS[walk.decay],
            REVERSE=reverse,
            TRANSPOSED_STATE=transposed_state,
            PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )

    num_segments = walk.cu_seqlens.numel() - 1
    final_state = torch.empty(num_segments, *shape, dtype=torch.float32, device=device) if want_final else None
    length = split_length(num_tokens, walk.max_length, walk.heads * tiles, _num_processors(device), chunk)
    if length is None:
        run(whole(walk.cu_seqlens), outputs=True, initial=initial_state, final=final_state, total=None)
        return _Scanned(output, final_state, overlap)
    splits = cut(walk.cu_seqlens, num_tokens, length)
    increments = torch.empty(splits.num_pieces, *shape, dtype=torch.float32, device=device)
    totals = torch.zeros(splits.num_pieces, walk.heads, dtype=torch.float32, device=device)
    run(splits, outputs=False, initial=None, final=increments, total=totals)
    starts = torch.zeros_like(increments)
    size = key_dim * value_dim
    _join_kernel[(num_segments * walk.heads * -(-size // JOIN_BLOCK),)](
        increments,
        totals,
        initial_state,
        starts,
        final_state,
        splits.first,
        HEADS=walk.heads,
        SIZE=size,
        BLOCK=JOIN_BLOCK,
        REVERSE=reverse,
    )
    run(splits, outputs=True, initial=starts, final=None, total=None)
    return _Scanned(output, final_state, overlap)


def _num_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # The interpreter: small enough that tests of a few hundred tokens are split.
    return 8


class _ScalarScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, decay, scale, cu_seqlens, max_length):
        # Heads first: a program reads its head's decays side by side.
        heads_first = log_decay.t().contiguous() if decay is Decay.SCALAR else log_decay
        walk = _Walk(decay, heads_first, cu_seqlens, max_length, v.shape[1])
        scanned = _scan(walk, q, k, v, read_scale=scale, initial_state=initial_state, want_final=True)
        ctx.save_for_backward(q, k, v, heads_first, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)
        ctx.decay, ctx.scale, ctx.max_length = decay, scale, max_length
        return scanned.output, scanned.final_state

    @staticmethod
    def backward(ctx, d_output, d_final):
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        walk = _Walk(ctx.decay, log_decay, cu_seqlens, ctx.max_length, v.shape[1])
        d_output = torch.zeros_like(v) if d_output is None else d_output.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        gated = ctx.needs_input_grad[3] and ctx.decay is Decay.SCALAR
        scale = ctx.scale
        # A key head's gradient is the sum over the value heads that share it, in float32.
        shared = q.shape[1] != v.shape[1]
        dtype = torch.float32 if shared else q.dtype
        dq = _scan(
            walk,
            d_output,
            v,
            k,
            read_scale=scale,
            initial_state=initial_state,
            transposed_state=True,
            other=q if gated else None,
            output_dtype=dtype,
        )
        dk = _scan(
            walk,
            v,
            d_output,
            q,
            write_scale=scale,
            reverse=True,
            initial_state=d_final,
            transposed_state=True,
            output_dtype=dtype,
        )
        dv = _scan(
            walk,
            k,
            q,
            d_output,
            write_scale=scale,
            reverse=True,
            initial_state=d_final,
            want_final=initial_state is not None,
            other=v if gated else None,
        )
        d_decay = None
        if gated:
            assert dq.overlap is not None and dv.overlap is not None
            d_decay = torch.zeros_like(log_decay)
            at_start = None if initial_state is None else (initial_state * dv.final_state).sum((2, 3))
            _decay_gradient_kernel[((cu_seqlens.numel() - 1) * v.shape[1],)](
                dq.overlap,
                dv.overlap,
                at_start,
                d_decay,
                cu_seqlens,
                v.shape[0],
                HEADS=v.shape[1],
                Q_TILES=dq.overlap.shape[0],
                V_TILES=dv.overlap.shape[0],
                BLOCK=CUMSUM_BLOCK,
            )
            d_decay = d_decay.t()
        d_q, d_k = (
            part.output.unflatten(1, (q.shape[1], -1)).sum(2).to(q.dtype) if shared else part.output
            for part in (dq, dk)
        )
        return d_q, d_k, dv.output, d_decay, dv.final_state, None, None, None, None


def scalar_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    decay: Decay,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t along ragged segments.

    Args:
        q: `[S, H_k, K]` bfloat16, float16 or float32, K up to 256.
        k: `[S, H_k, K]` in the dtype of q.
        v: `[S, H, V]` in the dtype of q, V up to 256, H a multiple of H_k.
        log_decay: natural log, at most 0: `[H]` or `[S, H]`, or None.
        decay: NONE, HEAD or SCALAR.
        scale: factor on the read.
        initial_state: `[N, H, K, V]` float32, or None for zeros.
        cu_seqlens: `[N + 1]` on the device; tokens past the last border are in no segment and read 0.
        max_length: a bound on the tokens of a segment.

    Returns:
        The reads `[S, H, V]` in the dtype of v, and the final state `[N, H, K, V]` float32. Differentiable in the first
        five arguments (in `log_decay` only if it is SCALAR); the same input gives the same bits.
    """
    output, final_state = _ScalarScan.apply(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if log_decay is None else log_decay.float(),
        None if initial_state is None else initial_state.contiguous(),
        decay,
        scale,
        cu_seqlens.long().contiguous(),
        max_length,
    )
    return output, final_state
