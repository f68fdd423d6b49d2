"""The delta rule with a scalar decay or none: S' = a S_{t-1}; S_t = S' + b k (v - S'^T k)^T; o_t = scale q_t^T S_t.

The kernels and the mathematics are in `linear_moe.kernels.delta_walks`; this is how they are launched. A forward pass makes the
chunks' own matrices, walks each segment (or, of long ones, its pieces, whose transitions are joined first) for r and o, and
keeps r and the states that chunks begin with. A backward pass walks back for dv and the strengths' gradients, and stores the
states' gradients; those of queries and keys are made from the two, all chunks in parallel. Where a head's state is too large
for a walk that also reads it, states are stored of pieces of a few chunks (`linear_moe.kernels.piece_gradients`), and the
output is made from them too (`linear_moe.kernels.piece_reads`), if not by a walk that can (`linear_moe.kernels.delta_forward`).
In 16 bits what is along a token's own key is then put right (`linear_moe.kernels.delta_along_keys`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels import piece_reads
from linear_moe.kernels.blocks import (
    DECAY_KINDS,
    DECAY_NAMES,
    block_of,
    cdiv,
    gates_by_head,
    inverse_precision_of,
    new_folded_states,
    new_states,
    num_processors,
    precision_of,
    sum_heads,
    tile_choices,
    tile_of,
    zero_uncovered,
)
from linear_moe.kernels.decay_gradient import decay_gradient, new_sums
from linear_moe.kernels.delta_along_keys import MOST_TOGETHER, settle_kernel, settle_tiles_kernel
from linear_moe.kernels.delta_walks import (
    forward_kernel,
    gradients_kernel,
    solve_kernel,
    values_kernel,
)
from linear_moe.kernels.join import FROM_ZEROS, Starts, join_affine
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.piece_gradients import ScanOverlaps, delta_gradients
from linear_moe.kernels.piece_reads import Pieces, read_pieces
from linear_moe.kernels.splits import Ragged, Splits, Walked, split_length, whole


class Launch(NamedTuple):
    """Launch parameters of the walks."""

    chunk: int
    tile: int
    """Channels of a program: of values, or of keys for the gradients of queries and keys."""
    num_warps: int
    num_stages: int


def choose_launch(walk: str, key_dim: int, value_dim: int, dtype: torch.dtype, decay: str = Decay.NONE.value) -> Launch:
    """Launch parameters of `walk`: "forward", "values" ("values in full" where every chunk is C tokens), or of the "gradients"
    that are no walk. All share one chunk, and no size depends on the decay.

    From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms of training passes with a scalar decay, 1 to 3
    stages). At B8 T4096 H16 K = V = 128: forward -, 0.487, 0.410; values in full 0.516, 0.570, 0.450; of as many tokens in 8
    unequal segments values 0.888, 0.902, 0.809. At B32 T2048 H16 K = V = 64: values in full 0.386, 0.372, 0.354; on an H200
    forward -, 0.305, 0.348, without a decay -, 0.301, 0.274. Gradients on an H200 0.609, 0.522, 0.755, and, of K = 64, whose
    loop has one step, 0.44. Tiles of 32 and 8 warps are slower.
    At B8 T4096 H4 K = V = 256, where forward and values only write, tiles of 64 on 8 warps with 2 and 3 stages: forward 0.280,
    0.200; values 0.401, -. Where a mixture's segments fill the GPU several times over, forward 0.587 with tiles of 32, of
    which two programs fit a multiprocessor, 0.670 with 3 stages, 0.666 with tiles of 64; values 1.243 with 32, 1.202 with 64.
    """
    largest = max(key_dim, value_dim)
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=32, tile=32 if largest <= 128 else 16, num_warps=4, num_stages=1)
    if largest > 128:
        if walk == "forward":
            return Launch(chunk=64, tile=32, num_warps=4, num_stages=2)
        return Launch(chunk=64, tile=64, num_warps=8, num_stages=2)
    few = walk == "gradients" or (
        largest <= 64 and (walk == "values" or (walk == "forward" and decay != Decay.NONE.value))
    )
    return Launch(chunk=64, tile=64, num_warps=4, num_stages=2 if few else 3)


TABLE = LaunchTable(
    "gated_deltanet",
    lambda walk, decay, key_dim, value_dim, dtype: choose_launch(walk, key_dim, value_dim, dtype, decay),
    lambda walk, decay, key_dim, value_dim, dtype: {
        "tile": tile_choices(*((key_dim, value_dim) if walk == "gradients" else (value_dim, key_dim)), dtype),
        "num_warps": (4, 8),
        # At four the others do not fit a multiprocessor.
        "num_stages": (1, 2, 3, 4) if walk == "forward" else (1, 2, 3),
    },
)
"""By the walk, the decay, K, V and the dtype. The chunk, whose matrices are kept for the backward pass, and, through
`piece_length`, where segments are cut are the frozen table's."""


FULL_TILE = 64
"""Channels of a 16-bit walk that has a multiprocessor to itself."""


class SolveLaunch(NamedTuple):
    """Launch parameters of the solve."""

    num_warps: int


SOLVE_TABLE = LaunchTable(
    "gated_deltanet.solve",
    lambda decay, key_dim, dtype: SolveLaunch(num_warps=4),
    lambda decay, key_dim, dtype: {"num_warps": (2, 4, 8)},
)
"""By the decay, K and the dtype."""


SOLVE_REGISTERS = 168
"""Of a thread: three programs a multiprocessor instead of two, for some spills. Measured on an H100 (torch 2.11, triton 3.6,
bf16, scalar decay; ms of a solve that makes R - E^T, with 168, without a limit, with 128): 0.192, 0.211, 0.247 at 32,768
tokens, H16 K 128; 0.322, 0.373, 0.385 at 65,536, H16 K 64; 0.092, 0.082, 0.106 at 32,768, H4 K 256: above K = 128 there is no
limit. An inverse of whole matrices from pairs on takes 1.4 times as long as one of blocks of 16 first, one with blocks of 32
between 1.1 (of E alone)."""


class _Walk(NamedTuple):
    """What all walks of one call have in common."""

    kind: int
    decays: Tensor | None
    """The sums of a chunk's log decays `[H, S]`."""
    beta: Tensor
    """Heads first, `[H, S]` float32."""
    splits: Splits
    cuts: Splits
    """Where chunks lie: pieces of `piece` tokens, which are chunks or a few of them. A split is a multiple of a piece."""
    piece: int
    pieces: Pieces | None
    """Where states are stored to be read from in parallel, if they are."""
    in_full: bool
    """Whether every piece has `piece` tokens."""

    def constants(self, k: Tensor, v: Tensor, *unused: str) -> dict[str, object]:
        """But for those that a kernel has no use for."""
        constants: dict[str, object] = {
            "HEADS": v.shape[1],
            "K_HEADS": k.shape[1],
            "K": k.shape[2],
            "V": v.shape[2],
            "DECAY": self.kind,
            "IN_FULL": self.in_full,
            "PRECISION": precision_of(k.dtype),
        }
        return {name: value for name, value in constants.items() if name not in unused}


def chunk_length(k: Tensor, v: Tensor) -> int:
    """C"""
    return choose_launch("forward", k.shape[2], v.shape[2], k.dtype).chunk


def stored_piece(k: Tensor, v: Tensor) -> int | None:
    """Tokens between two states that are stored to be read from in parallel, or None where walks read."""
    if piece_reads.takes(k.shape[2], v.shape[2], k.dtype):
        return piece_reads.choose_launch(k.dtype).piece
    return None


def new_stored_states(k: Tensor, v: Tensor, count: int) -> Tensor:
    """Room for the states of `count` pieces that are stored, or of chunks where no larger pieces are."""
    if stored_piece(k, v) is None:
        return new_folded_states(count, chunk_length(k, v), k, v)
    return new_states(count, k, v, k.dtype)


def piece_length(k: Tensor, v: Tensor, ragged: Ragged) -> int | None:
    """Tokens of a split where long segments are split, from sizes alone."""
    launch = choose_launch("forward", k.shape[2], v.shape[2], k.dtype)
    # Of narrower tiles a multiprocessor has more programs.
    tile = launch.tile if v.dtype == torch.float32 else max(launch.tile, FULL_TILE)
    tiles = cdiv(v.shape[2], tile_of(v.shape[2], tile, v.dtype))
    multiple = stored_piece(k, v) or launch.chunk
    return split_length(v.shape[0], ragged.max_length, v.shape[1] * tiles, num_processors(v.device), multiple)


def walk_of(k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, ragged: Ragged, decay: Decay) -> _Walk:
    num_tokens, heads = v.shape[:2]
    chunk, exact = chunk_length(k, v), k.dtype == torch.float32
    stored = stored_piece(k, v)
    piece = stored or chunk
    cuts, splits = ragged.cut_twice(num_tokens, piece, piece_length(k, v, ragged))
    gates = gates_by_head(log_decay, beta, cuts.borders, piece, chunk=chunk if stored else None, exact=exact)
    decays, pieces = gates.sums, None
    in_full = ragged.in_full(num_tokens, piece)
    if stored is not None:
        decays, pieces = gates.inner, Pieces(cuts, DECAY_KINDS[decay], gates.sums, heads, in_full)
    assert gates.beta is not None
    return _Walk(DECAY_KINDS[decay], decays, gates.beta, splits, cuts, piece, pieces, in_full)


def _launch(name: str, walk: _Walk, k: Tensor, v: Tensor) -> tuple[int, dict[str, int]]:
    """How many programs walk a piece, and the launch parameters."""
    entry = f"{name} in full" if name == "values" and walk.in_full else name
    launch = TABLE.pick(v.device, entry, DECAY_NAMES[walk.kind], k.shape[2], v.shape[2], k.dtype)
    tile = tile_of(v.shape[2], launch.tile, k.dtype)
    parameters = {
        "CHUNK": launch.chunk,
        "PIECE": walk.piece,
        "TILE": tile,
        "K_BLOCK": block_of(k.shape[2]),
        "THREADS": 32 * launch.num_warps,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    return v.shape[1] * cdiv(v.shape[2], tile), parameters


def new_solved(k: Tensor, v: Tensor) -> Tensor:
    """Room for what chunks know of their own pairs, `[1, S, H, C]` or `[2, S, H, C]` in the dtype of k: a token's row of its
    chunk's R - E^T of heads no wider than a chunk; else of -E, then of R.
    """
    chunk = chunk_length(k, v)
    return k.new_empty(1 if max(k.shape[2], v.shape[2]) <= chunk else 2, *v.shape[:2], chunk)


def solve(
    q: Tensor | None, k: Tensor, v: Tensor, walk: _Walk, *, scale: float = 1.0, short: Tensor | None = None,
    apart: Tensor | None = None, along: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Of what chunks know all, or, without queries, E. Fill the others as `solve_kernel` says."""
    num_tokens, heads = v.shape[:2]
    chunk = chunk_length(k, v)
    solved = new_solved(k, v)
    constants = walk.constants(k, v, "V") | {"PRECISION": inverse_precision_of(k.dtype)}
    launch = SOLVE_TABLE.pick(v.device, DECAY_NAMES[walk.kind], k.shape[2], k.dtype)
    launch_kernel(
        solve_kernel,
        walk.cuts.num_pieces * (walk.piece // chunk) * heads,
        q,
        k,
        walk.decays,
        walk.beta,
        solved,
        short,
        apart,
        along,
        walk.cuts.borders,
        walk.cuts.borders.stride(0),
        num_tokens,
        scale,
        PIECE=walk.piece,
        CHUNK=chunk,
        SHORT=chunk if short is None else short.shape[-1],
        LEVELS=chunk.bit_length() - 1,
        K_BLOCK=block_of(k.shape[2]),
        PACKED=len(solved) == 1,
        WEIGHTED=False,
        num_warps=launch.num_warps,
        num_stages=1,
        maxnreg=SOLVE_REGISTERS if k.shape[2] <= 128 else None,
        **constants,
    )
    return solved


def _run_forward(
    walk: _Walk,
    solved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    output: Tensor | None = None,
    wrong: Tensor | None = None,
    starts: Starts = FROM_ZEROS,
    final: Tensor | None = None,
    states: Tensor | None = None,
    transition: bool = False,
    walked: Walked | None = None,
) -> None:
    walked = walked or walk.splits.all
    programs, parameters = _launch("forward", walk, k, v)
    launch_kernel(
        forward_kernel,
        walked.num_pieces * programs,
        q,
        k,
        v,
        walk.decays,
        walk.beta,
        solved,
        output,
        wrong,
        *starts.arguments(),
        final,
        states,
        walk.splits.begins,
        *walked.arguments(),
        0 if states is None else states.stride(0),
        v.shape[0],
        scale,
        PACKED=len(solved) == 1,
        TRANSITION=transition,
        **parameters,
        **walk.constants(k, v),
    )


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    wrong: Tensor
    """r `[S, H, V]` in the dtype of v."""
    solved: Tensor
    """As `new_solved` says."""
    joined: Tensor | None
    """`[P, H, K, V]` float32, the states that splits start from but a segment's first, where some are cut and walks read."""
    transitions: Tensor | None
    """`[P, H, K, K]` float32, what each split does to a state, where segments were split."""
    states: Tensor
    """In the dtype of k, the state before each stored piece, `[pieces, H, K, V]`, or before each chunk, folded."""


class Forward(NamedTuple):
    """What a forward pass makes."""

    output: Tensor
    """`[S, H, V]` in the dtype of v."""
    final_state: Tensor | None
    """`[N, H, K, V]` float32, if wanted."""
    kept: Kept | None
    """If wanted."""


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
    """The recurrence along ragged segments; arguments as the library op's. `keep`: return what `backward` needs."""
    walk = walk_of(k, v, log_decay, beta, ragged, decay)
    # Walks that store states do not read: the reads are for the walk back.
    apart = along = None
    if keep and walk.pieces is not None:
        apart = q.new_empty(*v.shape[:2], k.shape[2])
        along = walk.beta.new_empty(2, *walk.beta.shape)
    solved = solve(q if keep or walk.pieces is None else None, k, v, walk, apart=apart, along=along)
    heads, key_dim = v.shape[1], k.shape[2]
    splits = walk.splits
    joined, transitions = None, None
    if splits.cut:
        # Only the width of the values matters here: K columns of I.
        columns = k.new_empty(1, 1, 1).expand(v.shape[0], heads, key_dim)
        # Of a piece that is all of its segment, or of none, it is nothing in particular.
        transitions = new_states(splits.num_pieces, k, columns)
        # Backwards in time it is other pieces that hand on.
        moving = splits.of_cut_segments if keep else splits.handing_on()
        _run_forward(walk, solved, q, k, columns, final=transitions, transition=True, walked=moving)
        increments = new_states(splits.num_pieces, k, v)
        _run_forward(walk, solved, q, k, v, final=increments, walked=splits.handing_on())
        exact = k.dtype == torch.float32
        joined, _ = join_affine(increments, transitions, initial_state, splits, want_final=False, exact=exact)
    starts = Starts(initial_state, joined, splits)
    piece_ends = new_states(splits.num_pieces, k, v) if want_final else None
    output = torch.empty_like(v)
    wrong = states = None
    if walk.pieces is None:
        wrong = torch.empty_like(v) if keep else None
        states = new_stored_states(k, v, walk.cuts.num_pieces) if keep else None
        _run_forward(
            walk,
            solved,
            q,
            k,
            v,
            scale=scale,
            output=output,
            wrong=wrong,
            starts=starts,
            final=piece_ends,
            states=states,
        )
    else:
        wrong = torch.empty_like(v)
        states = new_stored_states(k, v, walk.cuts.num_pieces)
        _run_forward(walk, solved, q, k, v, wrong=wrong, starts=starts, final=piece_ends, states=states)
        queries = q if apart is None else apart
        read_pieces(
            walk.pieces, queries, k, wrong, states, output, scale=scale, weights=walk.beta, along=along, values=v
        )  # fmt: skip
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    kept = None
    if keep:
        assert wrong is not None
        assert states is not None
        kept = Kept(wrong, solved, joined if walk.pieces is None else None, transitions, states)
    return Forward(output, None if piece_ends is None else splits.ends(piece_ends), kept)


class Backward(NamedTuple):
    """The gradients, each in the dtype of its input; the gates' in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor
    initial_state: Tensor | None


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    kept: Kept,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
) -> Backward:
    """The gradients of `forward`; `kept` as it returned it."""
    walk = walk_of(k, v, log_decay, beta, ragged, decay)
    num_tokens, heads, value_dim = v.shape
    splits = walk.splits
    constants = walk.constants(k, v)
    starts = Starts(initial_state, kept.joined, splits)
    programs, parameters = _launch("values", walk, k, v)
    tiles = cdiv(value_dim, parameters["TILE"])
    d_beta = torch.empty(tiles, num_tokens, heads, dtype=torch.float32, device=v.device)
    if not ragged.dense:
        d_beta.zero_()
    dv = torch.empty_like(v)

    def run_values(
        output: Tensor | None,
        start: Starts,
        final: Tensor | None,
        walked: Walked,
        states: Tensor | None = None,
    ) -> None:
        launch_kernel(
            values_kernel, walked.num_pieces * programs, q, k, d_output, kept.wrong, walk.decays, walk.beta,
            kept.solved, output, d_beta, *start.arguments(), final, states, splits.begins,
            *walked.arguments(), 0 if states is None else states.stride(0), num_tokens, scale, PACKED=len(kept.solved) == 1,
            **parameters, **constants,
        )  # fmt: skip

    reverse_joined = None
    if splits.cut:
        assert kept.transitions is not None
        increments = new_states(splits.num_pieces, k, v)
        run_values(None, FROM_ZEROS, increments, splits.handing_on(reverse=True))
        exact = k.dtype == torch.float32
        reverse_joined, _ = join_affine(
            increments, kept.transitions.mT, d_final, splits, reverse=True, want_final=False, exact=exact
        )
    wants_ends = initial_state is not None or kept.joined is not None
    piece_ends = new_states(splits.num_pieces, k, v) if wants_ends else None
    ends = [new_stored_states(k, v, walk.cuts.num_pieces)]
    run_values(dv, Starts(d_final, reverse_joined, splits), piece_ends, splits.all, *ends)
    d_initial = None
    if initial_state is not None:
        assert piece_ends is not None
        d_initial = splits.ends(piece_ends, reverse=True)

    # A key head's gradient is the sum over the value heads that share it, in float32.
    shared = k.shape[1] != heads
    dtype = torch.float32 if shared else k.dtype
    if walk.pieces is None:
        dq, dk, crossing = _gradients(walk, q, k, v, kept.wrong, d_output, dv, kept.states, ends.pop(), dtype, scale)
        borders, before, after = splits.borders, starts, piece_ends
    else:
        dq, dk, crossing = delta_gradients(
            walk.pieces, q, k, v, kept.wrong, walk.beta, d_output, dv, kept.states, ends, dtype, scale=scale
        )
        borders, before, after = whole(ragged.cu_seqlens).borders, Starts(initial_state), d_initial
    if crossing is not None and k.dtype != torch.float32:
        _settle(walk, q, k, v, kept.wrong, d_output, dv, dq, crossing, scale)
    if not ragged.dense:
        for gradient in (dq, dk, dv):
            zero_uncovered(gradient, ragged.cu_seqlens)
    d_decay = None
    if crossing is not None:
        d_decay = decay_gradient(crossing.read, crossing.written, before, after, borders, dense=ragged.dense)
    if shared:
        dq, dk = (sum_heads(x, k) for x in (dq, dk))
    return Backward(dq, dk, dv, d_decay, d_beta.squeeze(0) if tiles == 1 else d_beta.sum(0), d_initial)


def _gradients(
    walk: _Walk, q: Tensor, k: Tensor, v: Tensor, wrong: Tensor, d_output: Tensor, dv: Tensor, states: Tensor, ends: Tensor,
    dtype: torch.dtype, scale: float,
) -> tuple[Tensor, Tensor, ScanOverlaps | None]:  # fmt: skip
    """Of queries and keys `[S, H, K]` of `dtype`, and the overlaps where there is a decay, all chunks in parallel."""
    num_tokens, heads, value_dim = wrong.shape
    key_dim = k.shape[2]
    launch = TABLE.pick(k.device, "gradients", DECAY_NAMES[walk.kind], key_dim, value_dim, k.dtype)
    tile = tile_of(key_dim, launch.tile, k.dtype)
    shape = (num_tokens, heads, key_dim)
    # In the memory of the blocks that a program reads, where they lie as its gradients do.
    lie_alike = tile == launch.chunk and ends.shape[1:] == shape and ends.dtype == dtype
    room = list(ends[:2]) if lie_alike else []
    room += [k.new_empty(shape, dtype=dtype) for _ in range(2 - len(room))]
    dk, dq = room
    tiles = cdiv(key_dim, tile)
    overlaps = None
    if walk.decays is not None:
        overlaps = ScanOverlaps(*(new_sums(tiles, heads, num_tokens, k.dtype, k.device) for _ in range(2)))
    # In 16 bits, without a decay, what is along a key is put right: where a program has all keys at once.
    settles = overlaps is None and k.dtype != torch.float32
    missed = walk.beta.new_empty(tiles, *walk.beta.shape) if settles and tiles > 1 else None
    borders = walk.cuts.borders
    launch_kernel(
        gradients_kernel, walk.cuts.num_pieces * heads * tiles, q, k, v if settles else None, d_output, dv, wrong, walk.decays,
        walk.beta, states, ends, dq, dk, *(overlaps or (None, None)), missed, borders, borders.stride(0), states.stride(0),
        num_tokens, scale, CHUNK=launch.chunk, COLUMNS=tile_of(value_dim, launch.tile, k.dtype), TILE=tile,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **walk.constants(k, v),
    )  # fmt: skip
    if missed is not None:
        launch_kernel(
            settle_tiles_kernel, walk.cuts.num_pieces * heads, k, walk.beta, missed, dq, borders, borders.stride(0), num_tokens,
            TILES=tiles, CHUNK=launch.chunk, K_BLOCK=block_of(key_dim), num_warps=4, num_stages=1,
            **walk.constants(k, v, "PRECISION", "V", "DECAY"),
        )  # fmt: skip
    return dq, dk, overlaps


def _settle(
    walk: _Walk, q: Tensor, k: Tensor, v: Tensor, wrong: Tensor, d_output: Tensor, dv: Tensor, dq: Tensor,
    crossing: ScanOverlaps, scale: float,
) -> None:  # fmt: skip
    """Put into dq and the overlaps what is known along each token's own key."""
    heads, value_dim = v.shape[1:]
    chunk, block = chunk_length(k, v), block_of(k.shape[2])
    borders = walk.cuts.borders
    num_chunks = walk.cuts.num_pieces * (walk.piece // chunk)
    together = min(max(num_chunks * heads // (4 * num_processors(k.device)), 1), MOST_TOGETHER)
    launch_kernel(
        settle_kernel, cdiv(num_chunks, together) * heads, q, k, v, d_output, dv, wrong, walk.decays, walk.beta, dq, *crossing,
        borders, borders.stride(0), num_chunks, together, len(v), scale, PIECE=walk.piece, CHUNK=chunk, K_BLOCK=block,
        COLUMNS=min(block_of(value_dim), 64), READ_TILES=len(crossing.read), WRITTEN_TILES=len(crossing.written),
        MOST=MOST_TOGETHER, num_warps=8 if block > 128 else 4, num_stages=1, **walk.constants(k, v, "PRECISION", "DECAY"),
    )  # fmt: skip
