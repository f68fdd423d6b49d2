"""The chunked form of every declared recurrence in PyTorch: parallel inside a chunk, one state handed on between chunks.

Inside a chunk that starts from state S_0, with G_t the sum of the log decays up to token t (2312.06635, section 4;
2412.06464, section 3.3 for the erase):

    o_t = (q_t * e^G_t)^T S_0 + sum_{j <= t} <q_t, k_j>_{t,j} u_j^T           <q, k>_{t,j} = sum_c q_c k_c e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j * e^(G_C - G_j)) u_j^T
    u_t = v_t                                                                 without erase
    u_t = beta_t (v_t - (k_t * e^G_t)^T S_0 - sum_{j < t} <k_t, k_j>_{t,j} u_j)   with the delta erase

Where looking at the decays is free, on a CPU, and e^-G stays in range, <q, k> is one product of q * e^G and k * e^-G.
Everywhere else no exponent is ever positive, so a decay of 1e-6 a token is as right as one of 1.

With erase, u = (I + L)^-1 beta (v - k_in S_0), k_in_t = k_t * e^G_t and L the strictly lower triangle of beta <k, k>. Both
products with the inverse are made for all chunks at once. What is left for the walk is to read a state with them and with q,
one above the other in one matrix, and to write u to it: two products a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import Tokens
from linear_moe.rules.looks import may_look
from linear_moe.rules.segments import Chunks, PackedChunks, Segments, cut
from linear_moe.rules.workspace import Workspace

LONGEST_CHUNK = 64
SHORTEST_CHUNK = 16

NUMBERS_A_PART = 2**17
"""Numbers of v that are worked on at a time where nothing is kept for a backward pass. At K = V = 64 in float32, 512 KB a
tensor: half of that spends as much on calls as it saves, four times that leaves the caches (2x slower)."""

TENSORS_A_PART = 16
"""Tensors of a part's size that the workspace has room for: no form needs more than 14 where K = V."""

MILD_EXPONENT = 8.0
"""Sums of log decays down to -8 leave an exponential of their float32 differences off by no more than some roundings."""

SAFE_EXPONENT = 60.0
"""e^60 = 1e26 leaves float32 a factor of 1e12 for the values themselves, forward and backward."""


def chunked(
    form: Recurrence, tokens: Tokens, segments: Segments, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run a declared recurrence chunk by chunk.

    Args:
        form: the declared form.
        tokens: flattened tokens `[S, H, *]` in the state's dtype, key heads repeated to the value heads; `log_decay`
            `[S, H, 1]` or `[S, H, K]` or None, `beta` `[S, H]` or None.
        segments: how the tokens fall into segments.
        initial_state: `[N, H, K, V]`.
        scale: factor on every read.

    Returns:
        The reads `[S, H, V]` and the final state `[N, H, K, V]`.
    """
    chunks = cut(segments, _chunk_length(form, tokens, segments), tokens.v.shape[1])
    reuses = segments.dense and not torch.is_grad_enabled()
    work = Workspace(tokens.v, TENSORS_A_PART * min(NUMBERS_A_PART, tokens.v.numel()) if reuses else None)
    scan = _Scan(form, tokens, chunks, work, scale)
    state = initial_state.flatten(0, 1)
    if isinstance(chunks, PackedChunks) or not work.reused:
        reads, state = scan.run(slice(None), slice(None), state)
        return chunks.merge(reads), state.view_as(initial_state)
    # The walk writes into the state that it is given, and may leave the last one in the workspace.
    state, output = state.clone(), chunks.room(tokens.v)
    places = chunks.split(output)
    for steps, matrices in chunks.parts(NUMBERS_A_PART // tokens.v[0].numel()):
        _, state = scan.run(steps, matrices, state, places[steps])
    return chunks.taken(output), state.clone().view_as(initial_state)


class _Fading(NamedTuple):
    """What the decays leave within each chunk, `[NC * H, ...]`."""

    sums: Tensor
    """`[C, K or 1]` G, in float32 where that is enough."""
    from_start: Tensor
    """`[C, K or 1]` e^G."""
    to_start: Tensor | None
    """`[C, K or 1]` e^-G; None where it may be out of range."""
    carry: Tensor
    """`[1, K or 1]` e^G_C."""

    def of(self, matrices: slice) -> _Fading:
        """The same of some of the chunks."""
        to_start = None if self.to_start is None else self.to_start[matrices]
        return _Fading(self.sums[matrices], self.from_start[matrices], to_start, self.carry[matrices])


class _Inside(NamedTuple):
    """What a chunk needs of q, k and the decays, `[NC * H, ...]`."""

    q_in: Tensor
    """`[C, K]` q_t * e^G_t: reads what the chunk starts from."""
    k_in: Tensor
    """`[C, K]` k_t * e^G_t: erases from what the chunk starts from."""
    k_out: Tensor
    """`[C, K]` k_j * e^(G_C - G_j): writes to what the chunk ends with."""
    carry: Tensor | None
    """`[K or 1, 1]` e^G_C: what is left of the state; None without decay."""
    reads: Tensor
    """`[C, C]` <q_t, k_j>, lower triangle."""
    overlaps: Tensor | None
    """`[C, C]` <k_t, k_j>, of which the lower triangle counts; None without erase."""


class _Scan:
    """One call of `chunked`: its tokens cut into chunks, and the decays and strengths that all of its parts share."""

    def __init__(self, form: Recurrence, tokens: Tokens, chunks: Chunks, work: Workspace, scale: float) -> None:
        self.chunks, self.work, self.scale = chunks, work, scale
        self.q, self.k, self.v = (chunks.split(x) for x in (tokens.q, tokens.k, tokens.v))
        self.log_decay = None if tokens.log_decay is None else chunks.split(tokens.log_decay)
        self.beta = None if tokens.beta is None else _matrices(chunks.split(tokens.beta[..., None]))
        self.walked: list[tuple[Tensor, ...]] | None = None
        self.fading: _Fading | None = None
        if self.log_decay is not None and form.decay is not Decay.VECTOR:
            # One number a token takes less time in one go than part by part.
            self.fading, self.log_decay = self.fade(self.log_decay), None

    def run(self, steps: slice, matrices: slice, state: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The module's equations for a run of steps: reads `[NC * H, C, V]` and the state after them `[N * H, K, V]`.

        `steps` and `matrices` are the run's part of the tokens and of what is shared. The reads go to `place`, if given.
        """
        work, length = self.work, self.chunks.length
        fading = self.fading and self.fading.of(matrices)
        if self.log_decay is not None:
            fading = self.fade(self.log_decay[steps])
        q, k, v = self.q[steps], self.k[steps], _matrices(self.v[steps], None, work, "v")
        spare = work("spare", *v.shape)
        if self.beta is None:
            inside = self.inside(q, k, fading)
            starts, state = self.walk_adding(inside, v, state)
            reads = torch.bmm(inside.q_in, starts, out=spare).baddbmm_(
                inside.reads, v, beta=self.scale, alpha=self.scale
            )
            return reads if place is None else place.copy_(reads.view(place.shape)), state
        # Above what reads there is room for what erases.
        rows = work("rows", v.shape[0], 2 * length, state.shape[1])
        inside = self.inside(q, k, fading, rows)
        walked, state = self.walk_erasing(inside, v, self.beta[matrices], state, rows)
        reads, unread = torch.bmm(inside.reads, walked[:, :length], out=spare), walked[:, length:]
        if place is not None:
            reads, unread = reads.view(place.shape), unread.view(place.shape)
        return torch.sub(reads, unread, out=place), state

    def fade(self, log_decay: Tensor) -> _Fading:
        """Sums and exponentials of the log decays of some chunks.

        Summed in float64: a pair's decay is a small difference of sums that reach hundreds, and 1e-5 off in float32. A decay
        a channel that fades little in a chunk, as one does at the start of training, is summed in float32 where a look is
        free: its exponentials are most of the work.
        """
        work, dtype = self.work, log_decay.dtype
        log_decay = _matrices(log_decay, None, work, "log_decay")
        shape = log_decay.shape
        sums = lowest = None
        if shape[-1] > 1 and may_look(log_decay.device):
            sums = torch.cumsum(log_decay, -2, out=work("sums", *shape))
            lowest = _lowest(sums)
        if sums is None or lowest is None or lowest <= -MILD_EXPONENT:
            sums = log_decay.cumsum(-2, dtype=torch.float64)
            lowest = _lowest(sums)
        from_start = torch.exp(sums, out=work("from_start", *shape)).to(dtype)
        to_start = None
        if lowest > -SAFE_EXPONENT:
            # A reciprocal is cheaper, but its gradient takes its square, which is out of range.
            room = work("to_start", *shape)
            to_start = (-sums).exp().to(dtype) if room is None else torch.reciprocal(from_start, out=room)
        return _Fading(sums, from_start, to_start, from_start[:, -1:])

    def inside(self, q: Tensor, k: Tensor, fading: _Fading | None, rows: Tensor | None = None) -> _Inside:
        """What the module's equations take from within each chunk; with erase scaled and q_in in the lower half of `rows`."""
        work, length, erases = self.work, self.chunks.length, self.beta is not None
        # e^G can be taken to the rows and e^-G to the columns of a product.
        apart = fading is not None and fading.to_start is not None
        faded, grown = (fading.from_start, fading.to_start) if fading is not None and apart else (None, None)
        columns = _matrices(k, grown, work, "columns")
        if erases:
            scaled = self.scale if faded is None else faded * self.scale
            q_in = _matrices(q, scaled) if rows is None else _fill(rows[:, length:], q, scaled)
        else:
            q_in = _matrices(q, faded, work, "q_in")
        if fading is None:
            overlaps = (
                torch.bmm(columns, columns.mT, out=work("overlaps", *columns.shape[:2], length)) if erases else None
            )
            return _Inside(q_in, columns, columns, None, lower_products(q_in, columns, work), overlaps)
        carry = fading.carry.mT
        if apart:
            reads = lower_products(q_in, columns, work)
            k_in, overlaps = columns, None
            if erases:
                k_in = _matrices(k, faded, work, "k_in")
                overlaps = torch.bmm(k_in, columns.mT, out=work("overlaps", *columns.shape[:2], length))
            k_out = torch.mul(columns, fading.carry, out=columns if work.reused else None)
            return _Inside(q_in, k_in, k_out, carry, reads, overlaps)
        sums = fading.sums
        both = torch.stack((q_in, columns), 1) if erases else q_in[:, None]
        if sums.shape[-1] == 1:
            products = (both @ columns.mT[:, None]) * pair_decays(sums).to(columns.dtype)[:, None]
        else:
            products = decayed_products(both, columns[:, None], sums[:, None])
        q_in = torch.mul(q_in, fading.from_start, out=q_in if work.reused else None)
        k_in = columns * fading.from_start if erases else columns
        to_end = (sums[:, -1:] - sums).exp().to(columns.dtype)
        k_out = torch.mul(columns, to_end, out=columns if work.reused else None)
        return _Inside(q_in, k_in, k_out, carry, products[:, 0], products[:, 1] if erases else None)

    def walk_adding(self, inside: _Inside, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """States at the start of every chunk `[NC * H, K, V]` and after the last, without erase."""
        chunks, count = self.chunks, state.shape[0]
        room = self.work("states", count + v.shape[0], *state.shape[1:])
        if room is not None:
            # What a chunk adds becomes, in its place, the state after it: the start of the chunk behind it.
            room[:count] = state
            state = room[:count]
            added = torch.bmm(inside.k_out.mT, v, out=room[count:])
            for more, carry in zip(chunks.by_step(added), self.carries(inside), strict=False):
                state = more.add_(state) if carry is None else more.addcmul_(carry, state)
            return room[:-count], state
        starts = []
        added = torch.bmm(inside.k_out.mT, v)
        for step, (more, carry) in enumerate(zip(chunks.by_step(added), self.carries(inside), strict=False)):
            starts.append(state)
            new = more + state if carry is None else torch.addcmul(more, carry, state)
            state = chunks.where_reached(step, new, state)
        return chunks.by_chunk(starts), state

    def walk_erasing(
        self, inside: _Inside, v: Tensor, beta: Tensor, state: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What every chunk writes, above minus what its queries read from its start, `[NC * H, 2 C, V]`; the last state."""
        chunks, work, length = self.chunks, self.work, self.chunks.length
        assert inside.overlaps is not None
        # The inverse and two products are measured at half the time of solving for both terms: K + V columns are more than C.
        overlaps = torch.mul(inside.overlaps, beta, out=inside.overlaps if work.reused else None)
        inverse = _unit_lower_inverse(overlaps, work)
        inverse = torch.mul(inverse, beta.mT, out=inverse if work.reused else None)
        if rows is not None:
            written = work("written", v.shape[0], 2 * length, v.shape[2])
            assert written is not None
            # A copy each: a product is fast only where it is contiguous.
            erasing = torch.bmm(inverse, inside.k_in, out=work("spare", *inside.k_in.shape))
            rows[:, :length].copy_(erasing)
            fresh = torch.bmm(inverse, v, out=work("spare", *v.shape))
            written[:, :length].copy_(fresh)
            written[:, length:].zero_()
            if self.walked is None:
                # The same in every part, all being in the workspace; the last part may have fewer steps.
                self.walked = [chunks.by_step(x) for x in (rows, written, written[:, :length], inside.k_out.mT)]
            steps = zip(*self.walked, self.carries(inside), strict=False)
            for row, made, above, k_out, carry in itertools.islice(steps, v.shape[0] // state.shape[0]):
                made.baddbmm_(row, state, alpha=-1)
                kept = state if carry is None else state.mul_(carry)
                state = kept.baddbmm_(k_out, above)
            return written, state
        rows = torch.cat((torch.bmm(inverse, inside.k_in), inside.q_in), 1)
        fresh, done = F.pad(torch.bmm(inverse, v), (0, 0, 0, length)), []
        recorded = (chunks.by_step(x) for x in (rows, fresh, inside.k_out.mT))
        for step, (row, more, k_out, carry) in enumerate(zip(*recorded, self.carries(inside), strict=False)):
            done.append(torch.baddbmm(more, row, state, alpha=-1))
            kept = state if carry is None else carry * state
            state = chunks.where_reached(step, torch.baddbmm(kept, k_out, done[-1][:, :length]), state)
        return chunks.by_chunk(done), state

    def carries(self, inside: _Inside) -> Iterable[Tensor | None]:
        """What is left of the state after each step."""
        return itertools.repeat(None) if inside.carry is None else self.chunks.by_step(inside.carry)


def _matrices(x: Tensor, factor: Tensor | float | None = None, work: Workspace | None = None, name: str = "") -> Tensor:
    """`x` `[..., C, *]` as matrices `[NC * H, C, *]`, times `factor` `[NC * H, C, * or 1]`; in the workspace under `name`."""
    room = None if work is None else work(name, x.shape[:-2].numel(), *x.shape[-2:])
    if room is not None:
        return _fill(room, x, factor)
    matrices = x.reshape(-1, *x.shape[-2:])
    return matrices if factor is None else matrices * factor


def _fill(room: Tensor, x: Tensor, factor: Tensor | float | None) -> Tensor:
    """The same in `room`."""
    if factor is None:
        room.view(x.shape).copy_(x)
    else:
        like_x = factor.view(*x.shape[:-2], *factor.shape[-2:]) if isinstance(factor, Tensor) else factor
        torch.mul(x, like_x, out=room.view(x.shape))
    return room


def _lowest(sums: Tensor) -> float:
    """The lowest sum of a chunk where a look is free, else -inf."""
    return float(sums[:, -1:].detach().amin()) if may_look(sums.device) else -torch.inf


def lower_products(rows: Tensor, columns: Tensor, work: Workspace) -> Tensor:
    """<rows_t, columns_j> for j <= t, else 0: `[n, C, K]` twice to `[n, C, C]`."""
    return torch.bmm(rows, columns.mT, out=work("lower_products", *rows.shape[:2], columns.shape[1])).tril_()


def pair_decays(decays: Tensor) -> Tensor:
    """e^(G_t - G_j) for j <= t, else 0: `[n, C, 1]` to `[n, C, C]`."""
    length = decays.shape[-2]
    later = torch.full((length, length), -torch.inf, dtype=decays.dtype, device=decays.device).triu_(1)
    # -inf before the exp: masking an overflowed exp afterwards would leave 0 * inf in its gradient
    return (decays - decays.mT + later).exp()


def decayed_products(rows: Tensor, columns: Tensor, decays: Tensor) -> Tensor:
    """sum_c rows[t, c] columns[j, c] e^(G_tc - G_jc) for j <= t, else 0, by halving.

    The pair (t, j) is made at the one level at which t and j lie in the two halves of a block: both refer to the later
    half's first row r, so that e^(G_t - G_r) and e^(G_r - G_j) are both at most 1, and log2(C) exponentials a row do for
    C pairs. Blocks that fade little are not halved further. `[n, C, K]` three times to `[n, C, C]`.
    """
    length = rows.shape[-2]
    width = _safe_width(decays)
    if width == 1:
        products = (rows * columns).sum(-1)[..., None, None]
    else:
        row, column, decay = (x.unflatten(-2, (-1, width)) for x in (rows, columns, decays))
        faded = decay - decay[..., :1, :]
        products = ((row * faded.exp().to(row.dtype)) @ (column * (-faded).exp().to(row.dtype)).mT).tril()
    while width < length:
        halves = (length // (2 * width), 2, width)
        row, column, decay = (x.unflatten(-2, halves) for x in (rows, columns, decays))
        reference = decay[..., 1, :1, :]
        later = row[..., 1, :, :] * (decay[..., 1, :, :] - reference).exp().to(row.dtype)
        earlier = column[..., 0, :, :] * (reference - decay[..., 0, :, :]).exp().to(row.dtype)
        cross = later @ earlier.mT
        first, second = products.unflatten(-3, halves[:2]).unbind(-3)
        products = torch.cat((torch.cat((first, torch.zeros_like(cross)), -1), torch.cat((cross, second), -1)), -2)
        width *= 2
    return products.squeeze(-3)


def _safe_width(decays: Tensor) -> int:
    """Rows of the largest blocks, a power of two, of which none fades by more than the safe exponent; 1 off the CPU."""
    width = decays.shape[-2] if may_look(decays.device) else 1
    while width > 1:
        blocks = decays.detach().unflatten(-2, (-1, width))
        if float((blocks[..., 0, :] - blocks[..., -1, :]).amax()) < SAFE_EXPONENT:
            break
        width //= 2
    return width


def _unit_lower_inverse(lower: Tensor, work: Workspace) -> Tensor:
    """(I + L)^-1, L the strictly lower triangle of `lower` `[n, C, C]`."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    room = work("inverse", *lower.shape)
    # Either side, of it or its transpose, gives the inverse. These are the fastest with MKL, 0.45 of the time of the slowest.
    if room is None:
        return torch.linalg.solve_triangular(lower, identity, upper=False, left=False, unitriangular=True)
    return torch.linalg.solve_triangular(lower.mT, identity, upper=True, unitriangular=True, out=room).mT


def _chunk_length(form: Recurrence, tokens: Tokens, segments: Segments) -> int:
    """A power of two near the mean segment, no longer than the longest segment needs or than pays.

    On a CPU arithmetic is what costs: a token pays in proportion to C for its chunk and to K for the state, so C = K is
    measured best; K / 2 with erase, which has three more products and an inverse in a chunk, and with a decay a channel,
    which is faster the less it fades within a chunk. On a GPU the steps of the walk are what costs.
    """
    longest = LONGEST_CHUNK
    if tokens.k.device.type == "cpu":
        costly = form.erase is Erase.DELTA or form.decay is Decay.VECTOR
        longest = min(longest, tokens.k.shape[-1] // (2 if costly else 1))
    mean = -(-segments.num_tokens // max(segments.count, 1))
    wanted = min(max(min(mean, longest), SHORTEST_CHUNK), max(segments.max_length, 1))
    return 1 << (wanted - 1).bit_length()
