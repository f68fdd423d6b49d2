"""The chunked form of every declared recurrence in PyTorch: parallel inside a chunk, one state handed on between chunks.

Inside a chunk that starts from state S_0, with G_t the sum of the log decays up to token t (2312.06635, section 4;
2412.06464, section 3.3 for the erase):

    o_t = (q_t * e^G_t)^T S_0 + sum_{j <= t} <q_t, k_j>_{t,j} u_j^T           <q, k>_{t,j} = sum_c q_c k_c e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j * e^(G_C - G_j)) u_j^T
    u_t = v_t                                                                 without erase
    u_t = beta_t (v_t - (k_t * e^G_t)^T S_0 - sum_{j < t} <k_t, k_j>_{t,j} u_j)   with the delta erase

No exponent is ever positive, so a decay of 1e-6 a token is as right as one of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.forms import Erase, Recurrence
from linear_moe.rules.base import Tokens
from linear_moe.rules.segments import ChunkLayout, Segments, chunk_layout

LONGEST_CHUNK = 64
SHORTEST_CHUNK = 16


def chunked(form: Recurrence, tokens: Tokens, segments: Segments, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Run a declared recurrence chunk by chunk.

    Args:
        form: the declared form.
        tokens: flattened tokens `[S, H, *]` in the state's dtype, q scaled, key heads repeated to the value heads;
            `log_decay` `[S, H, 1]` or `[S, H, K]` or None, `beta` `[S, H]` or None.
        segments: how the tokens fall into segments.
        initial_state: `[N, H, K, V]`.

    Returns:
        The reads `[S, H, V]` and the final state `[N, H, K, V]`.
    """
    layout = chunk_layout(segments, _chunk_length(segments))
    q, k, v = (_heads_first(layout.split(x)) for x in (tokens.q, tokens.k, tokens.v))
    if tokens.log_decay is None:
        q_in, k_in, k_out, carry = q, k, k, None
        decays = None
    else:
        decays = _heads_first(layout.split(tokens.log_decay)).cumsum(-2)
        last = decays[..., -1:, :]
        from_start = decays.exp()
        q_in, k_in = q * from_start, k * from_start
        k_out = k * (last - decays).exp()
        carry = last.exp().mT
    reads = decayed_products(q, k, decays)

    if form.erase is Erase.DELTA:
        assert tokens.beta is not None
        beta = _heads_first(layout.split(tokens.beta[..., None]))
        # u = (I + L)^-1 beta (v - k_in S_0), L the strictly lower triangle of beta <k, k>. The inverse and two products are
        # measured at half the time of solving for both terms: their 2 K columns are wider than C.
        inverse = _unit_lower_inverse(beta * decayed_products(k, k, decays)) * beta.mT
        starts, written, final_state = _walk_erasing(layout, k_out, inverse @ k_in, inverse @ v, carry, initial_state)
    else:
        written = v
        starts, final_state = _walk_adding(layout, k_out.mT @ v, carry, initial_state)
    output = torch.baddbmm((q_in @ starts).flatten(0, 1), reads.flatten(0, 1), written.flatten(0, 1))
    return layout.merge(output.unflatten(0, v.shape[:2]).transpose(1, 2)), final_state


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1, L the strictly lower triangle of `lower` `[..., C, C]`."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


def decayed_products(rows: Tensor, columns: Tensor, decays: Tensor | None) -> Tensor:
    """sum_c rows[t, c] columns[j, c] e^(G_tc - G_jc) for j <= t, else 0.

    Args:
        rows: `[..., C, K]`.
        columns: `[..., C, K]`.
        decays: G, `[..., C, 1]` (one decay for all channels), `[..., C, K]` (one a channel), or None (no decay).

    Returns:
        `[..., C, C]`.
    """
    if decays is None:
        return (rows @ columns.mT).tril_()
    if decays.shape[-1] == 1 != rows.shape[-1]:
        later = torch.ones(rows.shape[-2], rows.shape[-2], dtype=torch.bool, device=rows.device).triu(1)
        # -inf before the exp: masking an overflowed exp afterwards would leave 0 * inf in its gradient
        return (rows @ columns.mT) * (decays - decays.mT).masked_fill(later, -torch.inf).exp()
    return _decayed_products_per_channel(rows, columns, decays)


def _decayed_products_per_channel(rows: Tensor, columns: Tensor, decays: Tensor) -> Tensor:
    """The same with a decay a channel, by halving.

    The pair (t, j) is made at the one level at which t and j lie in the two halves of a block: both refer to the later
    half's first row r, so that e^(G_t - G_r) and e^(G_r - G_j) are both at most 1, and log2(C) exponentials a row do for
    C pairs.
    """
    length = rows.shape[-2]
    products = (rows * columns).sum(-1)[..., None, None]
    width = 1
    while width < length:
        halves = (length // (2 * width), 2, width)
        row, column, decay = (x.unflatten(-2, halves) for x in (rows, columns, decays))
        reference = decay[..., 1, :1, :]
        later = row[..., 1, :, :] * (decay[..., 1, :, :] - reference).exp()
        earlier = column[..., 0, :, :] * (reference - decay[..., 0, :, :]).exp()
        cross = later @ earlier.mT
        first, second = products.unflatten(-3, halves[:2]).unbind(-3)
        products = torch.cat((torch.cat((first, torch.zeros_like(cross)), -1), torch.cat((cross, second), -1)), -2)
        width *= 2
    return products.squeeze(-3)


def _walk_adding(
    layout: ChunkLayout, increments: Tensor, carry: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk `[NC, H, K, V]` and after the last, without erase."""
    starts = []
    carries = layout.by_step(carry) if carry is not None else None
    for j, increment in enumerate(layout.by_step(increments)):
        starts.append(state)
        kept = state if carries is None else carries[j] * state
        state = _where_exists(layout, j, kept + increment, state)
    return layout.by_chunk(starts), state


def _walk_erasing(
    layout: ChunkLayout, k_out: Tensor, erased: Tensor, written: Tensor, carry: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the delta erase, and what every chunk writes, which depends on the state it starts from."""
    starts, writes = [], []
    carries = layout.by_step(carry) if carry is not None else None
    steps = zip(*(layout.by_step(x) for x in (k_out.mT, erased, written)), strict=True)
    for j, (k_step, erased_step, written_step) in enumerate(steps):
        starts.append(state)
        writes.append(written_step - erased_step @ state)
        kept = state if carries is None else carries[j] * state
        state = _where_exists(layout, j, kept + k_step @ writes[-1], state)
    return layout.by_chunk(starts), layout.by_chunk(writes), state


def _where_exists(layout: ChunkLayout, step: int, new: Tensor, old: Tensor) -> Tensor:
    """A segment without a chunk at this step keeps its state, bit for bit."""
    if layout.exists is None:
        return new
    return torch.where(layout.exists[step, :, None, None, None], new, old)


def _heads_first(x: Tensor) -> Tensor:
    """`[NC, C, H, *]` to `[NC, H, C, *]`, laid out so: each of the products that follow would copy a view again."""
    return x.transpose(1, 2).contiguous()


def _chunk_length(segments: Segments) -> int:
    """A power of two near the mean segment, within the measured range, and no longer than the longest segment needs."""
    mean = -(-segments.num_tokens // max(segments.count, 1))
    wanted = min(max(mean, SHORTEST_CHUNK), LONGEST_CHUNK, max(segments.max_length, 1))
    return 1 << (wanted - 1).bit_length()
