"""From a rule's tokens to its output: contracts, dtypes and the choice of implementation, once for every rule."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings

import torch
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import RuleOutput, Tokens, UpdateRule
from linear_moe.rules.chunked import chunked
from linear_moe.rules.recurrent import Step, recurrent
from linear_moe.rules.segments import Segments, segments_of
from linear_moe.rules.validate import check_cu_seqlens, check_scan_inputs, check_shape

IMPLS = ("auto", "triton", "chunked", "recurrent")
LARGEST_KERNEL_DIM = 256
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRUSTED_KERNEL_DTYPES = (torch.bfloat16,)
"""In which `auto` takes the kernels; in the others they run by name. In float32 their products are exact, outside the tensor
cores: forward and backward `retnet` takes an H100 45 ms at B4 T2048 H8 K = V = 128, and the chunked form 4.8. With an erase
float32 is at times 1.2 times, float16 1.1 times over the error budget on drawn shapes."""
_told: set[str] = set()


def implementations(form: Recurrence | None) -> tuple[str, ...]:
    """The implementations a rule of this form has, best first."""
    if form is None:
        return ("recurrent",)
    return ("triton", "chunked", "recurrent") if _has_kernel(form) else ("chunked", "recurrent")


def scan(
    tokens: Tokens,
    *,
    form: Recurrence | None,
    step: Step,
    scale: float,
    state_shape: tuple[int, int] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    covered: bool = False,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """Run a recurrence over `tokens`.

    Args:
        tokens: `[B, T, H, *]`, B = 1 with `cu_seqlens`. q and k may have fewer heads than v (a divisor).
        form: the declared form; None runs `step`.
        step: the rule's recurrence for one token.
        scale: factor on every read.
        state_shape: rows and columns of a head's state, (K, V) unless given.
        initial_state: `[N, H, K, V]`, zeros unless given.
        cu_seqlens: `[N + 1]` borders of packed segments; tokens past the last border are in none and read 0.
        max_length: a static bound on the tokens of a packed segment, to spare empty work on a GPU.
        covered: whether it is known, without a look, that every token is in a packed segment.
        return_final_state: whether to return the final state.
        impl: "auto", "triton", "chunked" or "recurrent". A named one is used or raises.

    Returns:
        The output in v's dtype, and the final state in float32 (float64 for float64 input).

    Raises:
        ValueError: if shapes disagree or `impl` can't run here.
    """
    batch, length = tokens.v.shape[:2]
    if form is not None:
        check_form(form, tokens)
    output, final_state = scan_segments(
        without_batch(tokens),
        segments_of(batch, length, cu_seqlens, max_length, tokens.q.device),
        form=form,
        step=step,
        scale=scale,
        state_shape=state_shape,
        initial_state=initial_state,
        covered=covered,
        return_final_state=return_final_state,
        impl=impl,
    )
    return RuleOutput(output.unflatten(0, (batch, length)), final_state)


def scan_segments(
    tokens: Tokens,
    segments: Segments,
    *,
    form: Recurrence | None,
    step: Step,
    scale: float,
    state_shape: tuple[int, int] | None = None,
    initial_state: Tensor | None = None,
    covered: bool = False,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """`scan` of the tokens `[S, H, *]` of segments, whose gates are those of the form. The output is `[S, H, V]`."""
    heads, value_dim = tokens.v.shape[1:]
    impl = choose_impl(form, impl, tokens)
    dtype = torch.float64 if tokens.v.dtype == torch.float64 else torch.float32
    shape = (segments.count, heads, *(state_shape or (tokens.k.shape[-1], value_dim)))
    if initial_state is not None:
        check_shape("initial_state", initial_state, shape, "[N, H, K, V]")
        initial_state = initial_state.to(dtype)

    def start() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=tokens.v.device) if initial_state is None else initial_state

    final_state: Tensor | None

    # Explicit casts do not stop autocast from choosing 16-bit contractions.
    with _without_autocast(tokens.q.device):
        if segments.num_tokens == 0 or segments.count == 0:
            output, final_state = _nothing(tokens), start().clone()
        elif impl == "triton":
            assert form is not None
            output, final_state = _run_kernel(
                form, tokens, segments, initial_state, scale, segments.dense or covered, return_final_state
            )
        else:
            wide = _widened(tokens, dtype)
            if impl == "chunked":
                assert form is not None
                output, final_state = chunked(form, wide, segments, start(), scale)
            else:
                output, final_state = recurrent(step, wide._replace(q=wide.q * scale), segments, start())
    return RuleOutput(output.to(tokens.v.dtype), final_state if return_final_state else None)


def without_batch(tokens: Tokens) -> Tokens:
    """`[B, T, H, *]` to `[B * T, H, *]`."""
    q, k, v = (x.flatten(0, 1) for x in (tokens.q, tokens.k, tokens.v))
    decay, beta = tokens.log_decay, tokens.beta
    return Tokens(
        q, k, v,
        # One a head stays.
        decay if decay is None or decay.dim() == 1 else decay.flatten(0, 1),
        None if beta is None else beta.flatten(0, 1),
        {name: x.flatten(0, 1) for name, x in tokens.extras.items()},
    )  # fmt: skip


def run_op(
    rule: type[UpdateRule],
    tokens: Tokens,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_final_state: bool,
    impl: str,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> RuleOutput:
    """What every rule's op does: check the user's tensors, then `scan` by the rule's form and step.

    `names` are what the op calls q, k and v. The rule's `step` must be a static method.
    """
    check_scan_inputs(tokens.q, tokens.k, tokens.v, tokens.log_decay, tokens.beta, names)
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number other than 0, got {scale}")
    if cu_seqlens is not None:
        if tokens.q.shape[0] != 1:
            raise ValueError(f"packed input (cu_seqlens) must have B = 1, got B = {tokens.q.shape[0]}")
        check_cu_seqlens(cu_seqlens, tokens.q.shape[1])
    return scan(
        tokens,
        form=rule.form,
        step=rule.step,  # type: ignore[arg-type]
        scale=tokens.q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )


def choose_impl(form: Recurrence | None, impl: str, tokens: Tokens) -> str:
    """The implementation that `impl` names or, for "auto", the first of triton, chunked and recurrent that can run
    and is trusted.

    Raises:
        ValueError: if a named one is unknown or can't run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    able = implementations(form)
    obstacle = _kernel_obstacle(form, tokens)
    on_cpu = tokens.q.device.type == "cpu"
    if impl == "auto":
        # On a CPU kernels are interpreted, for tests.
        if obstacle is None and not on_cpu and tokens.v.dtype in TRUSTED_KERNEL_DTYPES:
            return "triton"
        chosen = next(name for name in able if name != "triton")
        # In float32 this is the plain choice, and nothing to tell.
        if not on_cpu and obstacle:
            _say_once(f"no Triton kernel takes this: {obstacle}; running impl={chosen!r}")
        elif not on_cpu and tokens.v.dtype == torch.float16:
            _say_once(f"in float16 Triton kernels run by name only (impl='triton'); running impl={chosen!r}")
        return chosen
    if impl == "triton" and obstacle is not None:
        others = ", ".join(name for name in ("auto", *able) if name != "triton")
        raise ValueError(f"impl='triton' can't run here: {obstacle}; available: {others}")
    if impl not in able and impl != "triton":
        raise ValueError(
            f"impl={impl!r} can't run here: the rule declares no form; available: {', '.join(('auto', *able))}"
        )
    return impl


def _has_kernel(form: Recurrence) -> bool:
    return form.erase is Erase.NONE or form.decay in (Decay.NONE, Decay.SCALAR)


def _kernel_obstacle(form: Recurrence | None, tokens: Tokens) -> str | None:
    """Why no kernel takes these tokens, or None."""
    if form is None:
        return "the rule declares no form"
    if not _has_kernel(form):
        return f"there is no kernel yet for the form ({form})"
    if not TRITON_INSTALLED:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tokens.q.device.type not in ("cuda", "cpu") or (tokens.q.device.type == "cpu" and not interpreted):
        return f"triton does not run on {tokens.q.device.type} (on a CPU only with TRITON_INTERPRET=1)"
    if tokens.v.dtype == torch.float64:
        return "kernels take float32, bfloat16 and float16, not float64"
    if max(tokens.k.shape[-1], tokens.v.shape[-1]) > LARGEST_KERNEL_DIM:
        return f"kernels take K and V up to {LARGEST_KERNEL_DIM}, got {tokens.k.shape[-1]} and {tokens.v.shape[-1]}"
    if form.decay is Decay.HEAD and tokens.log_decay is not None and tokens.log_decay.requires_grad:
        # The sum of a scalar decay's gradients over all tokens: in 16 bits nothing is left of it but noise.
        return "the kernel makes no gradient for a decay that is constant a head"
    return None


def _run_kernel(
    form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor | None, scale: float, covered: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # Only here: the package works without triton.
    from linear_moe.kernels import library

    # q and k stay 16-bit beside a wider v (linear attention's normaliser): the kernels take one dtype.
    q, k = (x.to(tokens.v.dtype) for x in (tokens.q, tokens.k))
    return library.scan(
        q,
        k,
        tokens.v,
        tokens.log_decay,
        tokens.beta,
        decay=form.decay,
        scale=scale,
        initial_state=state,
        cu_seqlens=segments.cu_seqlens,
        max_length=segments.max_length,
        dense=covered,
        return_final_state=return_final_state,
    )


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def _nothing(tokens: Tokens) -> Tensor:
    """The output without a token to scan, still in the graph: what made the tokens gets gradients of 0, not None."""
    made = [x for x in (tokens.q, tokens.k, tokens.log_decay, tokens.beta) if x is not None and x.numel() == 0]
    return torch.zeros_like(tokens.v) + sum(x.sum() for x in (tokens.v[:0], *made))


def _say_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def check_form(form: Recurrence, tokens: Tokens) -> None:
    """The gates a form declares are there, with their shapes, and no others."""
    batch, length, heads = tokens.v.shape[:3]
    key_dim = tokens.k.shape[-1]
    expected = {
        Decay.NONE: None,
        Decay.HEAD: ((heads,), "[H]"),
        Decay.SCALAR: ((batch, length, heads), "[B, T, H]"),
        Decay.VECTOR: ((batch, length, heads, key_dim), "[B, T, H, K]"),
    }[form.decay]
    if (tokens.log_decay is None) != (expected is None):
        verb = "needs a" if expected else "takes no"
        raise ValueError(f"the form ({form}) {verb} log_decay, got {'none' if expected else 'one'}")
    if tokens.log_decay is not None and expected is not None:
        check_shape("log_decay", tokens.log_decay, *expected)
    if (tokens.beta is None) != (form.erase is Erase.NONE):
        verb = "takes no" if form.erase is Erase.NONE else "needs a"
        raise ValueError(f"the form ({form}) {verb} beta, got {'one' if tokens.beta is not None else 'none'}")


def _widened(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """Everything in `dtype`, key heads repeated to the value heads, decays `[S, H, 1 or K]`."""
    num_tokens, heads = tokens.v.shape[:2]
    q, k, v = (x.to(dtype) for x in (tokens.q, tokens.k, tokens.v))
    shared_by = heads // q.shape[1]
    if shared_by > 1:
        q, k = q.repeat_interleave(shared_by, 1), k.repeat_interleave(shared_by, 1)
    decay = tokens.log_decay
    if decay is not None:
        decay = decay.to(dtype)
        if decay.dim() == 1:
            decay = decay.expand(num_tokens, heads)
        decay = decay[..., None] if decay.dim() == 2 else decay
    beta = None if tokens.beta is None else tokens.beta.to(dtype)
    return Tokens(q, k, v, decay, beta, {name: x.to(dtype) for name, x in tokens.extras.items()})
