"""The scan of recurrences without erase whose decay is none, a constant a head, or a scalar a token.

The kernels and the mathematics are in `linear_moe.kernels.scalar_walks` and `linear_moe.kernels.turned_scan`; this is how they
are launched. A forward pass walks each segment, or, of long ones, its pieces, whose starts are joined first. A backward pass is
the same walk again with the roles of q, k, v and the output's gradient exchanged, two of the three backwards in time; of narrow
heads these two are one. The decay's gradient needs no walk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels.blocks import (
    DECAY_KINDS,
    DECAY_NAMES,
    NO_DECAY,
    SCALAR_DECAY,
    Direction,
    block_of,
    cdiv,
    gates_by_head,
    new_states,
    num_processors,
    precision_of,
    sum_heads,
    tile_choices,
    tile_of,
    wants_factors,
    zero_uncovered,
)
from linear_moe.kernels.decay_gradient import decay_gradient, new_sums
from linear_moe.kernels.descriptors import describable
from linear_moe.kernels.join import FROM_ZEROS, Starts, join
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.results import Backward, Forward
from linear_moe.kernels.scalar_walks import scan_kernel, writes_kernel
from linear_moe.kernels.splits import Ragged, Splits, Walked, split_length
from linear_moe.kernels.turned_scan import MOST_KEYS, Launch, turned_scan


def chunk_length(dtype: torch.dtype) -> int:
    """Tokens that are read and written at a time."""
    # Exact products take no tensor cores and twice the registers.
    return 32 if dtype == torch.float32 else 64


def turns(decay: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether a walk that makes no overlap is `turned_scan`'s.

    Forwards at B8 T4096 H16 K = V = 128 on an H200 (torch 2.11, triton 3.6, bf16; ms, and of `scan_kernel`) without a decay
    0.149, 0.170; with one a head 0.168, 0.185; with one a token 0.171, 0.208. At B32 T2048 H16 K = V = 64 0.150, 0.142; 0.152,
    0.146; 0.163, 0.150.
    """
    fits = dtype != torch.float32 and (decay == NO_DECAY.value or wants_factors(dtype))
    return fits and all(64 < width <= MOST_KEYS for width in (key_dim, value_dim))


def takes_factors(k: Tensor, v: Tensor) -> bool:
    """Whether a walk by a decay a token may be turned, and takes factors of tokens, which of either direction are others."""
    return turns(SCALAR_DECAY.value, k.shape[2], v.shape[2], k.dtype) and wants_factors(k.dtype)


def walk_name(*, overlap: bool, reverse: bool, turned: bool = False) -> str:
    """Of a walk with an output: whether the decay gradient's part is made with it, and whether it goes back in time."""
    return ("overlap" if overlap else "turned" if turned else "output") + (" backwards" if reverse else "")


def choose_launch(walk: str, decay: str, key_dim: int, value_dim: int, dtype: torch.dtype) -> Launch:
    """Launch parameters of `walk`: as `walk_name` says, or "states" alone.

    From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms of a scan with 2, 3 and 4 stages). K = V =
    128, B8 T4096 H16, forwards: without a decay 0.203, 0.191, 0.181 (5 stages 0.183), with one a head 0.219, 0.205, 0.182
    (0.193), a token -, 0.214, 0.199 (0.205); backwards without overlap 0.203, 0.192, 0.182; 0.216, 0.202, 0.182; 0.218, 0.219,
    0.226. With overlap 0.316, 0.342, 0.311, but where pieces start from a state, B1 T32768, 0.319, 0.346, 0.379; and backwards
    0.302, 0.298, 0.343, and there 0.335, 0.291, 0.385. Value tile 128 on 8 warps with 3 stages forwards: 0.184, 0.209, 0.299.
    States alone, of 8 of 9 pieces at B1 T32768, 0.105, 0.094, 0.096 (a head); with value tile 128 and 3 stages 0.093.
    K = V = 64, B32 T2048 H16, forwards with 2 to 5 stages: 0.215, 0.190, 0.191, 0.186 without a decay; 0.199, 0.190, 0.192,
    0.187; 0.210, 0.193, 0.196, 0.194.
    On an H200, there, with an overlap, 0.206, 0.167, 0.193: with 4 stages a multiprocessor has room for one program, not two.
    Forwards with a decay a head: value tile 32 0.340 for 0.243, chunk 32 0.318, chunk 128 0.332. Turned, K = V =
    128, B8 T4096 H16, without a decay 0.157 when first tried, with 2 stages 0.224; value tile 64 on 4 warps with 2 to 5 stages
    0.181, 0.172, 0.165, 0.165.
    """
    chunk = chunk_length(dtype)
    if dtype == torch.float32:
        return Launch(chunk, value_tile=32, num_warps=4, num_stages=1)
    if walk.startswith("turned"):
        return Launch(chunk, value_tile=128, num_warps=8, num_stages=3)
    launch = Launch(chunk, value_tile=64, num_warps=4, num_stages=4)
    if walk == "states":
        return launch._replace(value_tile=128 if value_dim > 64 else 64, num_stages=3)
    if max(key_dim, value_dim) <= 64:
        return launch._replace(num_stages=5 if walk.startswith("output") and decay != "scalar" else 3)
    elif decay == "scalar" and walk != "output":
        return launch._replace(num_stages=3 if walk.endswith("backwards") else 2)
    return launch


TABLE = LaunchTable(
    "scalar_scan",
    lambda walk, decay, key_dim, value_dim, dtype: choose_launch(walk, decay, key_dim, value_dim, dtype),
    lambda walk, decay, key_dim, value_dim, dtype: {
        "value_tile": tile_choices(value_dim, key_dim, dtype),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5) if dtype != torch.float32 else (1, 2, 3),
    },
)
"""By what is made, the decay, the widths of what is walked as keys and values, and the dtype. The chunk and, through
`piece_length`, where segments are cut are the frozen table's: forward and backward passes share them."""


class WritesLaunch(NamedTuple):
    """Launch parameters of the walk that makes dk and dv."""

    num_warps: int
    num_stages: int


WRITES_TABLE = LaunchTable(
    "scalar_scan.writes",
    lambda way, decay, key_dim, value_dim, dtype: WritesLaunch(
        num_warps=4, num_stages=3 if way == "mild" and dtype != torch.float32 else 1
    ),
    lambda way, decay, key_dim, value_dim, dtype: {"num_warps": (4, 8), "num_stages": (1, 2, 3)},
)
"""By which decays it takes ("mild" or "any"), the decay, K, V and the dtype. The chunk is that of the scan.

At B32 T2048 H16 K = V = 64 on an H200 (torch 2.11, triton 3.6, bf16; ms of all launches) without a decay 0.215, with 1 stage
0.229; with one a head 0.216, 0.236; with one a token 0.233, with 2 stages 0.273. Where any decay is taken 0.244 (a head) and
0.260 (a token), with 2 stages 0.278. Both ways in one kernel: 0.229, 0.264. Loaded by descriptors, of which a program makes
four in 4 us: 0.224, 0.240.
"""

MILD_CHUNKS = 4
"""Of a piece, on average, for which mild decays have a launch of their own. Of shorter ones what that gains is less than what
it takes every program to see that the other launch is not for it: of 65,536 tokens in unequal segments, as above with a decay
a token, two launches 0.963 for 0.777 of 32 tokens, 0.395 for 0.407 of 128."""


def writes_ways(decay: int, dtype: torch.dtype, piece: float) -> tuple[bool, ...]:
    """Of each launch of the walk that makes dk and dv whether it is of mild decays; one alone takes what there is.

    `piece`: the tokens of one, on average.
    """
    if decay == NO_DECAY.value:
        return (True,)
    long = piece >= MILD_CHUNKS * chunk_length(dtype)
    return (True, False) if wants_factors(dtype) and long else (False,)


def writes_together(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether dk and dv are made in one walk: where a program takes all channels of a head.

    At B32 T2048 H16 K = V = 64 on an H100 (torch 2.11, triton 3.6, bf16; ms at 1, 2 and 3 stages, and in two walks) without a
    decay 0.295, 0.293, 0.302, 0.38; with one a head 0.294, 0.298, 0.303, 0.38; with one a token 0.305, 0.318, 0.304, 0.46.
    """
    return max(key_dim, value_dim) <= (16 if dtype == torch.float32 else 64)


class _Walk(NamedTuple):
    """What all scans of one call have in common."""

    kind: int
    decays: Tensor | None
    """The log decays `[H]`, or the sums of a chunk's `[H, S]`."""
    heads: int
    splits: Splits
    in_full: bool
    """Whether every piece is whole chunks."""
    factors: Tensor | None
    """`[H, S, 2]` of scalar decays, where a walk may be turned, for one direction."""
    direction: Direction

    def turned(self, q: Tensor, k: Tensor, v: Tensor, *, reverse: bool) -> bool:
        """Whether a walk that makes no overlap is `turned_scan`'s: descriptors must describe what it reads."""
        if not turns(self.kind, k.shape[2], v.shape[2], k.dtype) or not describable(q, k, v):
            return False
        return self.kind != SCALAR_DECAY.value or reverse == (self.direction == "backwards")


def _scan(
    walk: _Walk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Starts,
    output: Tensor | None = None,
    scale: float = 1.0,
    state_scale: float = 1.0,
    reverse: bool = False,
    final: Tensor | None = None,
    totals: Tensor | None = None,
    transposed_state: bool = False,
    other: Tensor | None = None,
    walked: Walked | None = None,
) -> Tensor | None:
    """Scan `q`, `k` `[S, *, K]` and `v` `[S, *, V]` along every piece into `output` and `final`, where given.

    `walked`: the pieces, all unless given.

    Returns `[tiles, H, S]`, to be summed over tiles (`new_sums`): <output, other> without each token's own pair; None without
    `other`.
    """
    num_tokens, _, key_dim = q.shape
    value_dim = v.shape[2]
    walked = walked or walk.splits.all
    turned = output is not None and other is None and walk.turned(q, k, v, reverse=reverse)
    name = "states" if output is None else walk_name(overlap=other is not None, reverse=reverse, turned=turned)
    launch = TABLE.pick(v.device, name, DECAY_NAMES[walk.kind], key_dim, value_dim, k.dtype)
    if turned:
        assert output is not None
        turned_scan(
            q, k, v, walk.decays, walk.factors, output, kind=walk.kind, heads=walk.heads, starts=starts, final=final,
            walked=walked, launch=launch, scale=scale, state_scale=state_scale, reverse=reverse,
            transposed_state=transposed_state, in_full=walk.in_full,
        )  # fmt: skip
        return None
    value_tile = tile_of(value_dim, launch.value_tile, k.dtype)
    tiles = cdiv(value_dim, value_tile)
    overlap = None
    if other is not None:
        overlap = new_sums(tiles, walk.heads, num_tokens, k.dtype, q.device)
    launch_kernel(
        scan_kernel,
        walked.num_pieces * walk.heads * tiles,
        q,
        k,
        v,
        walk.decays,
        output,
        *starts.arguments(),
        final,
        totals,
        overlap,
        other,
        *walked.arguments(),
        num_tokens,
        scale,
        state_scale,
        HEADS=walk.heads,
        Q_HEADS=q.shape[1],
        K_HEADS=k.shape[1],
        V_HEADS=v.shape[1],
        OTHER_HEADS=0 if other is None else other.shape[1],
        K=key_dim,
        V=value_dim,
        CHUNK=launch.chunk,
        K_BLOCK=block_of(key_dim),
        V_TILE=value_tile,
        DECAY=walk.kind,
        IN_FULL=walk.in_full,
        REVERSE=reverse,
        TRANSPOSED_STATE=transposed_state,
        THREADS=32 * launch.num_warps,
        PRECISION=precision_of(k.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return overlap


def _writes(
    walk: _Walk, q: Tensor, k: Tensor, v: Tensor, d_output: Tensor, dk: Tensor, dv: Tensor, starts: Starts,
    final: Tensor | None, *, scale: float, want_decay: bool,
) -> Tensor | None:  # fmt: skip
    """Fill `dk`, `dv` and, if given, `final`; returns `[1, H, S]`, <dv, v> without each token's own pair, if wanted."""
    num_tokens, key_dim, value_dim = v.shape[0], k.shape[2], v.shape[2]
    written = None
    if want_decay:
        written = new_sums(1, walk.heads, num_tokens, k.dtype, v.device)
    ways = writes_ways(walk.kind, k.dtype, num_tokens / max(walk.splits.num_pieces, 1))
    for mild in ways:
        way = "mild" if mild else "any"
        launch = WRITES_TABLE.pick(v.device, way, DECAY_NAMES[walk.kind], key_dim, value_dim, k.dtype)
        launch_kernel(
            writes_kernel,
            walk.splits.num_pieces * walk.heads,
            q,
            k,
            v,
            d_output,
            walk.decays,
            dk,
            dv,
            *starts.arguments(),
            final,
            written,
            *walk.splits.all.arguments(),
            num_tokens,
            scale,
            HEADS=walk.heads,
            K_HEADS=k.shape[1],
            K=key_dim,
            V=value_dim,
            CHUNK=chunk_length(k.dtype),
            K_BLOCK=block_of(key_dim),
            V_BLOCK=block_of(value_dim),
            DECAY=walk.kind,
            MILD=mild,
            ALONE=len(ways) == 1,
            IN_FULL=walk.in_full,
            PRECISION=precision_of(k.dtype),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return written


def _starts(
    walk: _Walk, k: Tensor, v: Tensor, initial_state: Tensor | None, *, state_scale: float = 1.0, reverse: bool = False
) -> Starts:
    """The states that pieces start from: each piece alone, then the join."""
    if not walk.splits.cut:
        return Starts(initial_state)
    shape = (walk.splits.num_pieces, walk.heads, k.shape[2], v.shape[2])
    increments = torch.empty(shape, dtype=torch.float32, device=k.device)
    totals = torch.empty(shape[:2], dtype=torch.float32, device=k.device)
    _scan(
        walk, k, k, v, starts=FROM_ZEROS, state_scale=state_scale, reverse=reverse, final=increments, totals=totals,
        walked=walk.splits.handing_on(reverse=reverse),
    )  # fmt: skip
    joined, _ = join(increments, totals, initial_state, walk.splits, reverse=reverse, want_final=False)
    return Starts(initial_state, joined, walk.splits)


def piece_length(k: Tensor, v: Tensor, ragged: Ragged) -> int | None:
    """Tokens of a piece where long segments are split, from sizes alone."""
    launch = choose_launch("output", "none", k.shape[2], v.shape[2], v.dtype)
    tiles = cdiv(v.shape[2], tile_of(v.shape[2], launch.value_tile, v.dtype))
    return split_length(v.shape[0], ragged.max_length, v.shape[1] * tiles, num_processors(v.device), launch.chunk)


def _walk_of(
    k: Tensor, v: Tensor, log_decay: Tensor | None, decay: Decay, ragged: Ragged, direction: Direction,
    sums: Tensor | None = None,
) -> _Walk:  # fmt: skip
    """`sums`: the log decays', if they were made before."""
    chunk, kind, factors = chunk_length(k.dtype), DECAY_KINDS[decay], None
    if decay is Decay.SCALAR and sums is None:
        assert log_decay is not None
        # A piece is a multiple of a chunk: chunks of segments are chunks of pieces.
        chunks, splits = ragged.cut_twice(v.shape[0], chunk, piece_length(k, v, ragged))
        wanted = direction if takes_factors(k, v) else None
        gates = gates_by_head(log_decay, None, chunks.borders, chunk, exact=k.dtype == torch.float32, factors=wanted)
        sums, factors = gates.sums, gates.factors
    else:
        splits = ragged.splits(v.shape[0], piece_length(k, v, ragged))
    decays = log_decay if sums is None else sums
    return _Walk(kind, decays, v.shape[1], splits, ragged.in_full(v.shape[0], chunk), factors, direction)


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
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t along ragged segments; arguments as the library op's."""
    walk = _walk_of(k, v, log_decay, decay, ragged, "forwards")
    starts = _starts(walk, k, v, initial_state)
    piece_ends = None
    if want_final:
        piece_ends = new_states(walk.splits.num_pieces, k, v)
    output = torch.empty_like(v)
    _scan(walk, q, k, v, starts=starts, output=output, scale=scale, final=piece_ends)
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    final = None if piece_ends is None else walk.splits.ends(piece_ends)
    # Where factors are wanted, they are made with the sums.
    sums = walk.decays if decay is Decay.SCALAR and walk.factors is None else None
    return Forward(output, final, starts.joined, sums)


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    joined: Tensor | None,
    sums: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_decay: bool,
) -> Backward:
    """The gradients of `forward`; `joined` and `sums` as it returned them."""
    walk = _walk_of(k, v, log_decay, decay, ragged, "backwards", sums)
    starts = Starts(initial_state, joined, walk.splits)
    reverse_starts = _starts(walk, q, d_output, d_final, state_scale=scale, reverse=True)
    # A key head's gradient is the sum over the value heads that share it, in float32.
    shared = q.shape[1] != v.shape[1]
    wide = (v.shape[0], v.shape[1], q.shape[2])
    dq, dk = (torch.empty(wide, dtype=torch.float32 if shared else q.dtype, device=q.device) for _ in range(2))
    dv = torch.empty_like(v)
    piece_ends = None
    if initial_state is not None or (want_decay and joined is not None):
        piece_ends = new_states(walk.splits.num_pieces, k, v)
    read = _scan(
        walk, d_output, v, k, starts=starts, output=dq, scale=scale, transposed_state=True,
        other=q if want_decay else None,
    )  # fmt: skip
    if writes_together(k.shape[2], v.shape[2], k.dtype):
        written = _writes(
            walk, q, k, v, d_output, dk, dv, reverse_starts, piece_ends, scale=scale, want_decay=want_decay
        )
    else:
        _scan(
            walk, v, d_output, q, starts=reverse_starts, output=dk, scale=scale, state_scale=scale, reverse=True,
            transposed_state=True,
        )  # fmt: skip
        written = _scan(
            walk, k, q, d_output, starts=reverse_starts, output=dv, scale=scale, state_scale=scale, reverse=True,
            final=piece_ends, other=v if want_decay else None,
        )  # fmt: skip
    if not ragged.dense:
        for gradient in (dq, dk, dv):
            zero_uncovered(gradient, ragged.cu_seqlens)
    d_decay = None
    if want_decay:
        assert read is not None and written is not None
        d_decay = decay_gradient(read, written, starts, piece_ends, walk.splits.borders, dense=ragged.dense)
    if shared:
        dq, dk = (sum_heads(x, q) for x in (dq, dk))
    d_initial = None
    if initial_state is not None:
        assert piece_ends is not None
        d_initial = walk.splits.ends(piece_ends, reverse=True)
    return Backward(dq, dk, dv, d_decay, d_initial)
