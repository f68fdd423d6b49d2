"""The scans as torch library operators: differentiable, and usable under `torch.compile`, fake tensors and graph capture.

An operator takes and returns tensors, numbers and strings. What is not made is an empty tensor there, None outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels import delta_forward, gated_deltanet, gla, parallel_scan, piece_reads, scalar_scan, wide_scan
from linear_moe.kernels.blocks import new_sums
from linear_moe.kernels.compile_ahead import compile_ahead
from linear_moe.kernels.operator import differentiable, operator, wants_gradients
from linear_moe.kernels.splits import Ragged

Tensors = tuple[Tensor, ...]

NARROW_KEYS = 16
"""Of keys of fewer channels the delta rules are computed in float32."""
NARROW_VALUES = 4
"""So they are of values of fewer."""


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _states_like(k: Tensor, v: Tensor, count: int | None, columns: int | None = None) -> Tensor:
    """`[count, H, K, columns]` float32, or empty without a count."""
    if count is None:
        return v.new_empty(0, dtype=torch.float32)
    return v.new_empty(count, v.shape[1], k.shape[2], v.shape[2] if columns is None else columns, dtype=torch.float32)


def _pieces(v: Tensor, ragged: Ragged, length: int | None) -> int | None:
    return None if length is None else ragged.num_pieces(v.shape[0], length)


def _kind(
    name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, ragged: Ragged,
    *given: object,
) -> tuple[object, ...]:  # fmt: skip
    """What a call's kernels are compiled for: of tensors the dtype and the sizes but for the number of tokens or segments."""
    tensors = (
        None if x is None else (x.dtype, x.shape[1:], x.requires_grad) for x in (q, k, v, log_decay, initial_state)
    )
    return (name, *tensors, ragged.dense, ragged.grain(v.shape[0]), *given)


def _given(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of the output and the final state, of which either may be missing."""
    if d_output is None:
        d_output = torch.zeros_like(ctx.saved_tensors[2])
    return d_output.contiguous(), d_final.contiguous() if ctx.want_final and d_final is not None else None


def _scan_of(k: Tensor, v: Tensor) -> Any:
    """The module that scans without erase by a scalar decay or none."""
    return parallel_scan if piece_reads.takes(k.shape[2], v.shape[2], k.dtype) else scalar_scan


def _scan_kept_like(k: Tensor, v: Tensor, ragged: Ragged, decay: Decay) -> tuple[Tensor, Tensor]:
    """The states from which its backward pass starts again, and the sums of log decays that it takes over."""
    if _scan_of(k, v) is parallel_scan:
        count = parallel_scan.most_pieces(k, v.shape[0], ragged)
        starts, keeps_sums = k.new_empty(count, v.shape[1], k.shape[2], v.shape[2]), True
    else:
        starts = _states_like(k, v, _pieces(v, ragged, scalar_scan.piece_length(k, v, ragged)))
        keeps_sums = not scalar_scan.takes_factors(k, v)
    if decay is not Decay.SCALAR or not keeps_sums:
        return starts, _or_empty(None, v)
    return starts, new_sums(v.shape[1], v.shape[0], v.device, exact=k.dtype == torch.float32)


@operator("scalar_scan")
def _scalar(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor,
    max_length: int, dense: bool, scale: float, want_final: bool, decay: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ragged, kernels = Ragged(cu_seqlens, max_length, dense), _scan_of(k, v)

    def forward() -> Any:
        # Of wide heads a walk that leaves nothing for a backward pass is the faster one.
        module = kernels if keep or not wide_scan.takes(q, k, v) else wide_scan
        return module.forward(
            q, k, v, log_decay, initial_state, ragged, decay=Decay(decay), scale=scale, want_final=want_final
        )

    def both() -> None:
        made = forward()
        if keep:
            want_decay = log_decay is not None and log_decay.requires_grad
            kernels.backward(
                torch.empty_like(v), None, q, k, v, log_decay, initial_state, made.starts, made.sums, ragged,
                decay=Decay(decay), scale=scale, want_decay=want_decay,
            )  # fmt: skip

    with torch.cuda.device_of(v):
        kind = _kind("scalar_scan", q, k, v, log_decay, initial_state, ragged, want_final, decay, keep)
        compile_ahead(v.device, kind, both)
        made = forward()
    starts, sums = (made.starts, made.sums) if keep else (None, None)
    return made.output, _or_empty(made.final_state, v), _or_empty(starts, v), _or_empty(sums, v)


@torch.library.register_fake("linear_moe::scalar_scan")
def _(q, k, v, log_decay, initial_state, cu_seqlens, max_length, dense, scale, want_final, decay, keep):
    ragged = Ragged(cu_seqlens, max_length, dense)
    starts, sums = _scan_kept_like(k, v, ragged, Decay(decay)) if keep else (None, None)
    return (
        torch.empty_like(v),
        _states_like(k, v, ragged.num_segments if want_final else None),
        _or_empty(starts, v),
        _or_empty(sums, v),
    )


@operator("scalar_scan_backward")
def _scalar_backward(
    d_output: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor, starts: Tensor, sums: Tensor, max_length: int, dense: bool,
    scale: float, want_decay: bool, decay: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        made = _scan_of(k, v).backward(
            d_output, d_final, q, k, v, log_decay, initial_state, _or_none(starts), _or_none(sums),
            Ragged(cu_seqlens, max_length, dense), decay=Decay(decay), scale=scale, want_decay=want_decay,
        )  # fmt: skip
    return made.q, made.k, made.v, _or_empty(made.log_decay, v), _or_empty(made.initial_state, v)


@torch.library.register_fake("linear_moe::scalar_scan_backward")
def _(
    d_output,
    d_final,
    q,
    k,
    v,
    log_decay,
    initial_state,
    cu_seqlens,
    starts,
    sums,
    max_length,
    dense,
    scale,
    want_decay,
    decay,
):
    return (
        *(torch.empty_like(x) for x in (q, k, v)),
        torch.empty_like(log_decay) if want_decay else _or_empty(None, v),
        _or_empty(None, v) if initial_state is None else torch.empty_like(initial_state),
    )


def _keep_for_scalar(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.max_length, ctx.dense, ctx.scale, ctx.want_final, ctx.decay, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _scalar_gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> Tensors:
    want_decay = ctx.needs_input_grad[3] and ctx.decay == Decay.SCALAR.value
    *dqkv, d_decay, d_initial = _scalar_backward(
        *_given(ctx, d_output, d_final), *ctx.saved_tensors, ctx.max_length, ctx.dense,
        ctx.scale, want_decay, ctx.decay,
    )  # fmt: skip
    return (*dqkv, _or_none(d_decay), _or_none(d_initial), *(None,) * 7)


differentiable(_scalar, _keep_for_scalar, _scalar_gradients, ahead=False)


@operator("gla")
def _vector(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor,
    max_length: int, dense: bool, scale: float, want_final: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ragged = Ragged(cu_seqlens, max_length, dense)

    def forward() -> Any:
        return gla.forward(q, k, v, log_decay, initial_state, ragged, scale=scale, want_final=want_final)

    def both() -> None:
        made = forward()
        if keep:
            gla.backward(
                torch.empty_like(v), None, q, k, v, log_decay, initial_state, made.starts, made.products, ragged, scale=scale
            )  # fmt: skip

    with torch.cuda.device_of(v):
        compile_ahead(v.device, _kind("gla", q, k, v, log_decay, initial_state, ragged, want_final, keep), both)
        made = forward()
    starts, products = (made.starts, made.products) if keep else (None, None)
    return made.output, _or_empty(made.final_state, v), _or_empty(starts, v), _or_empty(products, v)


@torch.library.register_fake("linear_moe::gla")
def _(q, k, v, log_decay, initial_state, cu_seqlens, max_length, dense, scale, want_final, keep):
    ragged = Ragged(cu_seqlens, max_length, dense)
    return (
        torch.empty_like(v),
        _states_like(k, v, ragged.num_segments if want_final else None),
        _states_like(k, v, _pieces(v, ragged, gla.piece_length(k, v, ragged)) if keep else None),
        k.new_empty(*v.shape[:2], gla.chunk_length(k, v)) if keep else _or_empty(None, v),
    )


@operator("gla_backward")
def _vector_backward(
    d_output: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor, starts: Tensor, products: Tensor, max_length: int, dense: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        made = gla.backward(
            d_output, d_final, q, k, v, log_decay, initial_state, _or_none(starts), products,
            Ragged(cu_seqlens, max_length, dense), scale=scale,
        )  # fmt: skip
    assert made.log_decay is not None
    return made.q, made.k, made.v, made.log_decay, _or_empty(made.initial_state, v)


@torch.library.register_fake("linear_moe::gla_backward")
def _(d_output, d_final, q, k, v, log_decay, initial_state, cu_seqlens, starts, products, max_length, dense, scale):
    return (
        *(torch.empty_like(x) for x in (q, k, v, log_decay)),
        _or_empty(None, v) if initial_state is None else torch.empty_like(initial_state),
    )


def _keep_for_vector(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.max_length, ctx.dense, ctx.scale, ctx.want_final, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _vector_gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> Tensors:
    *gradients, d_initial = _vector_backward(
        *_given(ctx, d_output, d_final), *ctx.saved_tensors, ctx.max_length, ctx.dense,
        ctx.scale,
    )  # fmt: skip
    return (*gradients, _or_none(d_initial), *(None,) * 6)


differentiable(_vector, _keep_for_vector, _vector_gradients, ahead=False)


@operator("gated_deltanet")
def _delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor, max_length: int, dense: bool, scale: float, want_final: bool, decay: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ragged = Ragged(cu_seqlens, max_length, dense)

    def forward() -> gated_deltanet.Forward:
        given = (q, k, v, log_decay, beta, initial_state, ragged)
        options: dict[str, Any] = {"decay": Decay(decay), "scale": scale, "want_final": want_final}
        module = delta_forward if delta_forward.takes(q, k, v, keep) else gated_deltanet
        return module.forward(*given, **options, keep=keep)

    def both() -> None:
        kept = forward().kept
        if kept is not None:
            gated_deltanet.backward(
                torch.empty_like(v),
                None,
                q,
                k,
                v,
                log_decay,
                beta,
                initial_state,
                kept,
                ragged,
                decay=Decay(decay),
                scale=scale,
            )

    with torch.cuda.device_of(v):
        kind = _kind("gated_deltanet", q, k, v, log_decay, initial_state, ragged, beta.dtype, want_final, decay, keep)
        compile_ahead(v.device, kind, both)
        made = forward()
    kept: tuple[Tensor | None, ...] = (None,) * 5 if made.kept is None else made.kept
    wrong, solved, starts, transitions, states = (_or_empty(x, v) for x in kept)
    return made.output, _or_empty(made.final_state, v), wrong, solved, starts, transitions, states


@torch.library.register_fake("linear_moe::gated_deltanet")
def _(q, k, v, log_decay, beta, initial_state, cu_seqlens, max_length, dense, scale, want_final, decay, keep):
    ragged = Ragged(cu_seqlens, max_length, dense)
    pieces = _pieces(v, ragged, gated_deltanet.piece_length(k, v, ragged)) if keep else None
    chunk, stored = gated_deltanet.chunk_length(k, v), gated_deltanet.stored_piece(k, v)
    none = _or_empty(None, v)
    return (
        torch.empty_like(v),
        _states_like(k, v, ragged.num_segments if want_final else None),
        torch.empty_like(v) if keep else none,
        gated_deltanet.new_solved(k, v) if keep else none.clone(),
        _states_like(k, v, pieces if stored is None else None),
        _states_like(k, v, pieces, k.shape[2]),
        gated_deltanet.new_stored_states(k, v, ragged.num_pieces(v.shape[0], stored or chunk))
        if keep
        else none.clone(),
    )


@operator("gated_deltanet_backward")
def _delta_backward(
    d_output: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor, wrong: Tensor, solved: Tensor, starts: Tensor,
    transitions: Tensor, states: Tensor, max_length: int, dense: bool, scale: float, decay: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = gated_deltanet.Kept(wrong, solved, _or_none(starts), _or_none(transitions), states)
    with torch.cuda.device_of(q):
        made = gated_deltanet.backward(
            d_output, d_final, q, k, v, log_decay, beta, initial_state, kept, Ragged(cu_seqlens, max_length, dense),
            decay=Decay(decay), scale=scale,
        )  # fmt: skip
    d_beta = made.beta.to(beta.dtype)
    return made.q, made.k, made.v, _or_empty(made.log_decay, q), d_beta, _or_empty(made.initial_state, q)


@torch.library.register_fake("linear_moe::gated_deltanet_backward")
def _(
    d_output, d_final, q, k, v, log_decay, beta, initial_state, cu_seqlens, wrong, solved, starts,
    transitions, states, max_length, dense, scale, decay,
):  # fmt: skip
    return (
        *(torch.empty_like(x) for x in (q, k, v)),
        _or_empty(None, q) if log_decay is None else torch.empty_like(log_decay),
        torch.empty_like(beta),
        _or_empty(None, q) if initial_state is None else torch.empty_like(initial_state),
    )


def _keep_for_delta(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.max_length, ctx.dense, ctx.scale, ctx.want_final, ctx.decay, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _delta_gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None, *_: None) -> Tensors:
    *dqkv, d_decay, d_beta, d_initial = _delta_backward(
        *_given(ctx, d_output, d_final), *ctx.saved_tensors, ctx.max_length, ctx.dense,
        ctx.scale, ctx.decay,
    )  # fmt: skip
    return (*dqkv, _or_none(d_decay), d_beta, _or_none(d_initial), *(None,) * 7)


differentiable(_delta, _keep_for_delta, _delta_gradients, ahead=False)


def _without_first_decays(
    log_decay: Tensor, initial_state: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Each token's log decays `[S, H, 1 or K]`, 0 at its segment's first one, and the states that have faded by those.

    The gradient of an initial state is a sum over tokens of reads weighted by all decays up to each, none of them more than the
    first one's. Without it the largest weight is 1: float16, in which walks multiply them, need not hold a first decay of 1e-6.
    """
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    by_token = (log_decay if log_decay.dim() == 3 else log_decay[..., None]).expand(num_tokens, -1, -1)
    # A segment without a token has no first one. Its border is where the next begins, or the row past the last.
    first = by_token[begins.clamp(max=num_tokens - 1)].masked_fill((ends == begins)[:, None, None], 0.0)
    is_first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=log_decay.device).index_fill(0, begins, True)[:-1]
    return by_token.masked_fill(is_first[:, None, None], 0.0), initial_state * first.exp()[..., None]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    *,
    decay: Decay,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    max_length: int,
    dense: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """S' = Diag(a_t) S_{t-1}; S_t = S' + k_t v_t^T, or S' + beta_t k_t (v_t - S'^T k_t)^T; o_t = scale q_t^T S_t.

    Args:
        q: `[S, H_k, K]` bfloat16, float16 or float32, K up to 256.
        k: `[S, H_k, K]` in the dtype of q.
        v: `[S, H, V]` in the dtype of q, V up to 256, H a multiple of H_k.
        log_decay: natural log, at most 0, float32: `[H]`, `[S, H]` or `[S, H, K]` as `decay` says, or None.
        beta: `[S, H]` of any floating dtype, or None: no erase.
        decay: the kind of decay. With `beta`, none or scalar.
        scale: factor on the read.
        initial_state: `[N, H, K, V]` float32, or None for zeros.
        cu_seqlens: `[N + 1]` int64 on the device; tokens past the last border are in no segment and read 0.
        max_length: a bound on the tokens of a segment.
        dense: whether the segments cover every token.
        return_final_state: whether to make the final state.

    Returns:
        The reads `[S, H, V]` in the dtype of v, and the final state `[N, H, K, V]` float32 or None. Differentiable in the
        tensors (in a decay that is constant a head: not); the same input gives the same bits.
    """
    dtype = v.dtype
    # Of what is erased from fewer keys the roundings of a chunk's 64 tokens meet in too few numbers for 16 bits, and of fewer
    # values a strength's gradient is a sum of too few. Nor would they fill a tensor core.
    narrow = beta is not None and (k.shape[2] < NARROW_KEYS or v.shape[2] < NARROW_VALUES)
    wide = torch.float32 if narrow else dtype
    q, k, v = (x.to(wide).contiguous() for x in (q, k, v))
    initial_state = None if initial_state is None else initial_state.contiguous()
    log_decay = None if log_decay is None else log_decay.float().contiguous()
    if wide == torch.float16 and log_decay is not None and len(v) and wants_gradients((initial_state,)):
        assert initial_state is not None
        log_decay, initial_state = _without_first_decays(log_decay, initial_state, cu_seqlens, len(v))
        if decay is not Decay.VECTOR:
            log_decay, decay = log_decay.squeeze(-1), Decay.SCALAR
    where = (cu_seqlens, max_length, dense, scale, return_final_state)
    keep = wants_gradients((q, k, v, log_decay, beta, initial_state))
    if beta is not None:
        assert decay in (Decay.NONE, Decay.SCALAR)
        given = (q, k, v, log_decay, beta.contiguous(), initial_state)
        output, final_state, *_ = _delta(*given, *where, decay.value, keep)
        output = output.to(dtype)
    elif decay is Decay.VECTOR:
        output, final_state, *_ = _vector(q, k, v, log_decay, initial_state, *where, keep)
    else:
        output, final_state, *_ = _scalar(q, k, v, log_decay, initial_state, *where, decay.value, keep)
    return output, final_state if return_final_state else None
