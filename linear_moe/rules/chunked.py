"""The chunked form of every declared recurrence in PyTorch: parallel inside a chunk, one state handed on between chunks.

Inside a chunk that starts from state S_0, with G_t the sum of the log decays up to token t (2312.06635, section 4;
2412.06464, section 3.3 for the erase):

    o_t = (q_t * e^G_t)^T S_0 + sum_{j <= t} <q_t, k_j>_{t,j} u_j^T           <q, k>_{t,j} = sum_c q_c k_c e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j * e^(G_C - G_j)) u_j^T
    u_t = v_t                                                                 without erase
    u_t = beta_t (v_t - (k_t * e^G_t)^T S_0 - sum_{j < t} <k_t, k_j>_{t,j} u_j)   with the delta erase

Where looking at the decays is free, on a CPU, and e^-G stays in range, <q, k> is one product of q * e^G and k * e^-G. A decay
that is one number a token leaves k as it is instead: then v_t e^-G_t obeys the recurrence without decay, and e^G_t times what
is read of it is right. With erase it may so go on through a run of chunks, after which the state fades once.
Everywhere else no exponent is ever positive, so a decay of 1e-6 a token is as right as one of 1.

With erase, u = T x with T = (I + L)^-1 Diag(beta), L the strictly lower triangle of beta <k, k>, x = v - k_in S_0 and
k_in_t = k_t * e^G_t. So it is the form without erase that writes x instead of v, with T^T k for k and <q, k> T for <q, k>,
which are made for all chunks at once. What is left for the walk is to read a state with k_in and with q, one above the other
in one matrix, and to write x to it: two products a step.
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
from linear_moe.rules.segments import Chunks, DenseChunks, Segments, cut
from linear_moe.rules.workspace import Workspace
from linear_moe.static_tensors import static

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
    # On a GPU parts, which are small, would leave it waiting for calls.
    reuses = segments.dense and not torch.is_grad_enabled() and tokens.v.device.type == "cpu"
    chunks = cut(segments, _chunk_length(form, tokens, segments, recorded=not reuses), tokens.v.shape[1])
    work = Workspace(tokens.v, TENSORS_A_PART * min(NUMBERS_A_PART, tokens.v.numel()) if reuses else None)
    state = initial_state.flatten(0, 1)
    if not reuses:
        reads, state = _Scan(form, tokens, chunks, work, scale).run(slice(None), slice(None), state)
        return chunks.merge(reads), state.view_as(initial_state)
    assert isinstance(chunks, DenseChunks)
    runs = chunks.parts(NUMBERS_A_PART // tokens.v[0].numel())
    scan = _Scan(form, tokens, chunks, work, scale, steps_a_run=runs[0][0].stop)
    # The walk writes into the state that it is given, and may leave the last one in the workspace.
    state, output = state.clone(), chunks.room(tokens.v)
    places = chunks.split(output)
    for steps, matrices in runs:
        _, state = scan.run(steps, matrices, state, places[steps])
    return chunks.taken(output), state.clone().view_as(initial_state)


class _Fading(NamedTuple):
    """What the decays leave within each chunk, or within each run of them, `[NC * H, ...]`."""

    sums: Tensor
    """`[C, K or 1]` G, in float32 where that is enough."""
    from_start: Tensor
    """`[C, K or 1]` e^G."""
    to_start: Tensor | None
    """`[C, K or 1]` e^-G; None where it may be out of range."""
    carry: Tensor | None
    """`[1, K or 1]` e^G_C; None where G goes on through a run, after which the state fades, and not between its chunks."""

    @property
    def one_a_token(self) -> bool:
        """Not one a channel."""
        return self.sums.shape[-1] == 1

    def of(self, matrices: slice) -> _Fading:
        """The same of some of the chunks."""
        to_start = None if self.to_start is None else self.to_start[matrices]
        carry = None if self.carry is None else self.carry[matrices]
        return _Fading(self.sums[matrices], self.from_start[matrices], to_start, carry)


class _Inside(NamedTuple):
    """What a chunk needs of q, k, the decays and the strengths, `[NC * H, ...]`."""

    rows: Tensor
    """`[C, K]` q_in, what reads the state that the chunk starts from; with erase `[2 C, K]`, below k_in."""
    k_out: Tensor
    """`[C, K]` what writes to the state that the chunk ends with."""
    carry: Tensor | None
    """`[K or 1, 1]` e^G_C: what is left of the state; None without decay."""
    reads: Tensor
    """`[C, C]` how token t reads what token j <= t writes."""


class _Scan:
    """One call of `chunked`: its tokens cut into chunks, and the decays and strengths that all of its runs share."""

    def __init__(
        self, form: Recurrence, tokens: Tokens, chunks: Chunks, work: Workspace, scale: float, steps_a_run: int = 1
    ) -> None:
        self.chunks, self.work, self.scale, self.steps_a_run = chunks, work, scale, steps_a_run
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
        inside = self.inside(self.q[steps], self.k[steps], None if self.beta is None else self.beta[matrices], fading)
        v, grown = self.v[steps], fading.to_start if fading is not None and fading.one_a_token else None
        spare = work("spare", inside.rows.shape[0], length, v.shape[-1])
        if self.beta is None:
            v = _matrices(v, grown, work, "v")
            starts, state = self.walk_adding(inside, v, state)
            reads = torch.bmm(inside.rows, starts, out=spare).baddbmm_(
                inside.reads, v, beta=self.scale, alpha=self.scale
            )
            return reads if place is None else place.copy_(reads.view(place.shape)), state
        made = work("made", inside.rows.shape[0], 2 * length, v.shape[-1])
        if made is None:
            made = F.pad(_matrices(v, grown), (0, 0, 0, length))
        else:
            _fill(made[:, :length], v, grown)
            made[:, length:].zero_()
        made, state = self.walk_erasing(inside, made, state)
        if fading is not None and fading.carry is None:
            state = state * fading.from_start[-state.shape[0] :, -1:]
        reads, unread = torch.bmm(inside.reads, made[:, :length], out=spare), made[:, length:]
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
        goes_on, in_range = False, lowest > -SAFE_EXPONENT
        # Without erase a step is one call with a decay too. What leaves the range in a chunk leaves it in a run.
        if in_range and shape[-1] == 1 and self.beta is not None and self.steps_a_run > 1:
            longer = self.through_runs(sums)
            goes_on = _lowest(longer) > -SAFE_EXPONENT
            sums = longer if goes_on else sums
        from_start = torch.exp(sums, out=work("from_start", *shape)).to(dtype)
        to_start = None
        if in_range:
            # A reciprocal is cheaper, but its gradient takes its square, which is out of range.
            room = work("to_start", *shape)
            to_start = (-sums).exp().to(dtype) if room is None else torch.reciprocal(from_start, out=room)
        return _Fading(sums, from_start, to_start, None if goes_on else from_start[:, -1:])

    def through_runs(self, sums: Tensor) -> Tensor:
        """G of every chunk `[NC * H, C, 1]` as from the start of its run."""
        totals = torch.stack(self.chunks.by_step(sums[:, -1:]))
        before = totals.cumsum(0) - totals
        at_start = before[:: self.steps_a_run].repeat_interleave(self.steps_a_run, 0)[: len(totals)]
        return sums + (before - at_start).flatten(0, 1)

    def inside(self, q: Tensor, k: Tensor, beta: Tensor | None, fading: _Fading | None) -> _Inside:
        """What the module's equations take from within each chunk; with erase q is scaled."""
        work, length = self.work, self.chunks.length
        # e^G can be taken to what reads and e^-G to what is written: to the values where it is one number a token, else to k.
        faded = grown = faded_k = None
        if fading is not None and fading.to_start is not None:
            faded = fading.from_start
            if not fading.one_a_token:
                grown, faded_k = fading.to_start, faded
        if beta is None:
            rows = _matrices(q, faded, work, "rows")
        else:
            rows = self.rows(k, faded_k, q, self.scale if faded is None else faded * self.scale)
        own = beta is None or grown is not None
        columns = _matrices(k, grown, work, "columns") if own else rows[:, :length]
        k_room = work.over(columns) if own else work("k_out", *columns.shape)
        products = work("products", *rows.shape[:2], length)
        if fading is None or fading.to_start is not None:
            products = torch.bmm(rows, columns.mT, out=products)
            reads = earlier(products[:, -length:], work)
            k_out = columns if fading is None or fading.carry is None else torch.mul(columns, fading.carry, out=k_room)
        else:
            sums, both = fading.sums, rows.unflatten(1, (-1, length))
            if fading.one_a_token:
                products = torch.bmm(rows, columns.mT, out=products).unflatten(1, (-1, length))
                products = products * pair_decays(sums).to(rows.dtype)[:, None]
            else:
                products = decayed_products(both, columns[:, None], sums[:, None])
            products = products.flatten(1, 2)
            reads = products[:, -length:]
            k_out = torch.mul(columns, (sums[:, -1:] - sums).exp().to(rows.dtype), out=k_room)
            rows = torch.mul(both, fading.from_start[:, None], out=work.over(both)).flatten(1, 2)
        if beta is not None:
            overlaps = torch.mul(products[:, :length], beta, out=work("overlaps", *reads.shape))
            inverse = _unit_lower_inverse(overlaps, work)
            inverse = torch.mul(inverse, beta.mT, out=work.over(inverse))
            k_out = torch.bmm(inverse.mT, k_out, out=work("k_erased", *k_out.shape))
            reads = torch.bmm(reads, inverse, out=work("reads", *reads.shape))
        return _Inside(rows, k_out, None if fading is None or fading.carry is None else fading.carry.mT, reads)

    def rows(self, k: Tensor, k_factor: Tensor | None, q: Tensor, q_factor: Tensor | float) -> Tensor:
        """Of every chunk k above q, each times its factor."""
        length = self.chunks.length
        room = self.work("rows", k.shape[:-2].numel(), 2 * length, k.shape[-1])
        if room is None:
            return torch.cat((_matrices(k, k_factor), _matrices(q, q_factor)), 1)
        _fill(room[:, :length], k, k_factor)
        _fill(room[:, length:], q, q_factor)
        return room

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

    def walk_erasing(self, inside: _Inside, made: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """`made` minus what the rows read from the start of every chunk, `[NC * H, 2 C, V]`; the last state."""
        chunks, length = self.chunks, self.chunks.length
        if self.work.reused:
            if self.walked is None:
                # The same in every part, all being in the workspace; the last part may have fewer steps.
                self.walked = [chunks.by_step(x) for x in (inside.rows, made, made[:, :length], inside.k_out.mT)]
            steps = zip(*self.walked, self.carries(inside), strict=False)
            for row, less, written, k_out, carry in itertools.islice(steps, made.shape[0] // state.shape[0]):
                less.baddbmm_(row, state, alpha=-1)
                kept = state if carry is None else state.mul_(carry)
                state = kept.baddbmm_(k_out, written)
            return made, state
        done = []
        recorded = (chunks.by_step(x) for x in (inside.rows, made, inside.k_out.mT))
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


def earlier(pairs: Tensor, work: Workspace) -> Tensor:
    """Of the pairs (t, j) `[n, C, C]` those of j <= t, else 0."""
    return torch.tril(pairs, out=work.over(pairs))


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
    ones = identity(lower.shape[-1], lower.dtype, lower.device).expand_as(lower)
    room = work("inverse", *lower.shape)
    # Either side, of it or its transpose, gives the inverse. These are the fastest with MKL, 0.45 of the time of the slowest.
    if room is None:
        return torch.linalg.solve_triangular(lower, ones, upper=False, left=False, unitriangular=True)
    return torch.linalg.solve_triangular(lower.mT, ones, upper=True, unitriangular=True, out=room).mT


@static
def identity(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """I `[length, length]`."""
    return torch.eye(length, dtype=dtype, device=device)


def _chunk_length(form: Recurrence, tokens: Tokens, segments: Segments, *, recorded: bool) -> int:
    """A power of two near the mean segment, no longer than the longest segment needs or than pays.

    On a CPU arithmetic is what costs: a token pays in proportion to C for its chunk and to K for the state, so C = K is
    measured best; K / 2 with a decay a channel, which is faster the less it fades within a chunk; K / 4 with erase, which has
    two more products and an inverse in a chunk, but K / 2 where a step of the walk costs more, as it is recorded or gathered.
    On a GPU the steps of the walk are what costs.
    """
    longest = LONGEST_CHUNK
    if tokens.k.device.type == "cpu":
        share = 1
        if form.erase is Erase.DELTA:
            share = 2 if recorded else 4
        elif form.decay is Decay.VECTOR:
            share = 2
        longest = min(longest, tokens.k.shape[-1] // share)
    mean = -(-segments.num_tokens // max(segments.count, 1))
    wanted = min(max(min(mean, longest), SHORTEST_CHUNK), max(segments.max_length, 1))
    return 1 << (wanted - 1).bit_length()
