"""The chunked form of every declared recurrence in PyTorch: parallel inside a chunk, one state handed on between chunks.

Inside a chunk that starts from state S_0, with G_t the sum of the log decays up to token t (2312.06635, section 4;
2412.06464, section 3.3 for the erase):

    o_t = (q_t * e^G_t)^T S_0 + sum_{j <= t} <q_t, k_j>_{t,j} u_j^T           <q, k>_{t,j} = sum_c q_c k_c e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j * e^(G_C - G_j)) u_j^T
    u_t = v_t                                                                 without erase
    u_t = beta_t (v_t - (k_t * e^G_t)^T S_0 - sum_{j < t} <k_t, k_j>_{t,j} u_j)   with the delta erase

Where looking at the decays is free, on a CPU, and e^-G stays in range, <q, k> is one product of q * e^G and k * e^-G.
Everywhere else no exponent is ever positive, so a decay of 1e-6 a token is as right as one of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import Tokens
from linear_moe.rules.segments import Chunks, Segments, cut

LONGEST_CHUNK = 64
SHORTEST_CHUNK = 16

NUMBERS_A_PART = 2**17
"""Numbers of v that are worked on at a time where nothing is kept for a backward pass. At K = V = 64 in float32, 512 KB a
tensor: half of that spends as much on calls as it saves, four times that leaves the caches (2x slower)."""

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
    limit = None if torch.is_grad_enabled() else NUMBERS_A_PART // tokens.v[0].numel()
    state, outputs = initial_state.flatten(0, 1), []
    for part in chunks.parts(limit):
        output, state = _run_part(form, tokens, chunks, part, state, scale)
        outputs.append(output)
    return chunks.merge(outputs), state.view_as(initial_state)


def _run_part(
    form: Recurrence, tokens: Tokens, chunks: Chunks, part: slice, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The equations above for a run of steps: the reads `[NC * H, C, V]` and the state after them `[N * H, K, V]`."""
    q, k, v = (chunks.split(x, part) for x in (tokens.q, tokens.k, tokens.v))
    decays = None if tokens.log_decay is None else _summed(chunks.split(tokens.log_decay, part))
    erases = form.erase is Erase.DELTA
    inside = _inside(q, k, decays, erases)
    if erases:
        assert tokens.beta is not None and inside.overlaps is not None
        beta = chunks.split(tokens.beta[..., None], part)
        # u = (I + L)^-1 beta (v - k_in S_0), L the strictly lower triangle of beta <k, k>. The inverse and two products are
        # measured at half the time of solving for both terms: their K + V columns are wider than C.
        inverse = _unit_lower_inverse(beta * inside.overlaps) * beta.mT
        erased, fresh = torch.bmm(inverse, inside.k_in), torch.bmm(inverse, v)
        starts, written, state = _walk_erasing(chunks, inside, erased, fresh, state)
    else:
        written = v
        starts, state = _walk_adding(chunks, inside, v, state)
    return torch.bmm(inside.q_in, starts).baddbmm_(inside.reads, written, beta=scale, alpha=scale), state


def _summed(log_decay: Tensor) -> Tensor:
    """G, in float64: a pair's decay is a small difference of sums that reach hundreds, and 1e-5 off in float32.

    A decay a channel that fades little in a chunk, as one does at the start of training, is summed in float32 where a look is
    free: its exponentials are most of the work.
    """
    if log_decay.shape[-1] > 1 and log_decay.device.type == "cpu":
        sums = log_decay.cumsum(-2)
        if float(sums[:, -1:].detach().amin()) > -MILD_EXPONENT:
            return sums
    return log_decay.cumsum(-2, dtype=torch.float64)


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
    """`[C, C]` <k_t, k_j>, lower triangle; None without erase."""


def _inside(q: Tensor, k: Tensor, decays: Tensor | None, erases: bool) -> _Inside:
    if decays is None:
        reads = lower_products(q, k)
        return _Inside(q, k, k, None, reads, lower_products(k, k) if erases else None)
    from_start, last = decays.exp().to(q.dtype), decays[:, -1:]
    q_in, k_in, carry = q * from_start, k * from_start if erases else k, last.exp().to(q.dtype)
    if decays.device.type == "cpu" and float(last.detach().amin()) > -SAFE_EXPONENT:
        k_back = k * (-decays).exp().to(k.dtype)
        reads = lower_products(q_in, k_back)
        return _Inside(q_in, k_in, k_back * carry, carry.mT, reads, lower_products(k_in, k_back) if erases else None)
    k_out = k * (last - decays).exp().to(k.dtype)
    if decays.shape[-1] == 1:
        pairs = pair_decays(decays).to(q.dtype)
        reads, overlaps = torch.bmm(q, k.mT) * pairs, torch.bmm(k, k.mT) * pairs if erases else None
    else:
        reads, overlaps = decayed_products(q, k, decays), decayed_products(k, k, decays) if erases else None
    return _Inside(q_in, k_in, k_out, carry.mT, reads, overlaps)


def lower_products(rows: Tensor, columns: Tensor) -> Tensor:
    """<rows_t, columns_j> for j <= t, else 0: `[n, C, K]` twice to `[n, C, C]`."""
    return torch.bmm(rows, columns.mT).tril_()


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
    width = decays.shape[-2] if decays.device.type == "cpu" else 1
    while width > 1:
        blocks = decays.detach().unflatten(-2, (-1, width))
        if float((blocks[..., 0, :] - blocks[..., -1, :]).amax()) < SAFE_EXPONENT:
            break
        width //= 2
    return width


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1, L the strictly lower triangle of `lower` `[n, C, C]`."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    # Either side gives the inverse; MKL takes 0.45 of the time from the right.
    return torch.linalg.solve_triangular(lower, identity, upper=False, left=False, unitriangular=True)


def _walk_adding(chunks: Chunks, inside: _Inside, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk `[NC * H, K, V]` and after the last, without erase."""
    starts = []
    carries = None if inside.carry is None else chunks.by_step(inside.carry)
    for step, added in enumerate(chunks.by_step(torch.bmm(inside.k_out.mT, v))):
        starts.append(state)
        new = added + state if carries is None else torch.addcmul(added, carries[step], state)
        state = chunks.where_reached(step, new, state)
    return chunks.by_chunk(starts), state


def _walk_erasing(
    chunks: Chunks, inside: _Inside, erased: Tensor, fresh: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the delta erase, and what every chunk writes, which depends on the state it starts from."""
    starts, writes = [], []
    carries = None if inside.carry is None else chunks.by_step(inside.carry)
    steps = zip(*(chunks.by_step(x) for x in (inside.k_out, erased, fresh)), strict=True)
    for step, (k_out, erased_step, fresh_step) in enumerate(steps):
        starts.append(state)
        writes.append(torch.baddbmm(fresh_step, erased_step, state, alpha=-1))
        if carries is None:
            new = torch.baddbmm(state, k_out.mT, writes[-1])
        else:
            new = (carries[step] * state).baddbmm_(k_out.mT, writes[-1])
        state = chunks.where_reached(step, new, state)
    return chunks.by_chunk(starts), chunks.by_chunk(writes), state


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
