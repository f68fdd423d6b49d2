"""One token of any declared form, in one kernel, with the state updated in place.

A program holds all K rows of a tile of value channels of one (slot, head)'s state in registers: the state is read once and
written once, which is nearly all that a token costs. A tile needs nothing of another, erase included: S'^T k and q^T S are
sums over rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels.blocks import block_of, state_offsets
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.operator import operator


class Launch(NamedTuple):
    """Launch parameters of a token."""

    value_tile: int
    num_warps: int


# By the largest K. Nothing here is measured on a GPU yet. Derived: a row of a tile is one or two whole lines of 128 bytes, and
# a tile takes 32 float32 a thread. Compiled for Hopper (triton 3.6 and 3.9) nothing spills, and scalar decay with delta at
# K = V = 256 takes at most 78 registers a thread: 3 programs fit a multiprocessor, with 96 KiB of states in flight.
LAUNCHES = {32: Launch(64, 2), 64: Launch(64, 4), 128: Launch(32, 4), 256: Launch(32, 8)}
LARGEST_KEY_DIM = max(LAUNCHES)


def choose_launch(key_dim: int) -> Launch:
    """From the frozen table."""
    return LAUNCHES[min(largest for largest in LAUNCHES if key_dim <= largest)]


TABLE = LaunchTable(
    "decode",
    lambda decay, erase, key_dim, value_dim, dtype: choose_launch(key_dim),
    lambda decay, erase, key_dim, value_dim, dtype: {"value_tile": (16, 32, 64, 128), "num_warps": (2, 4, 8)},
)
"""By the form, K, V and the dtype of the values."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    state_ptr,
    index_ptr,
    output_ptr,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    ERASE: tl.constexpr,
):
    NUM_TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    slot = (program // (NUM_TILES * HEADS)).to(tl.int64)
    slot_head = slot * HEADS + head
    slot_key_head = slot * KEY_HEADS + head // (HEADS // KEY_HEADS)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    in_values = values < V
    output = tl.zeros((V_TILE,), tl.float32)
    row = tl.load(index_ptr + slot).to(tl.int64)
    # A branch, not a mask: 0 * NaN of what a slot without memory holds would be NaN.
    if row >= 0:
        keys = tl.arange(0, K_BLOCK)
        in_keys = keys < K
        in_state = in_keys[:, None] & in_values[None, :]
        state_at = state_ptr + state_offsets(row, head, HEADS, keys, values, K, V, TRANSPOSED=False)
        state = tl.load(state_at, mask=in_state, other=0.0)
        q = tl.load(q_ptr + slot_key_head * K + keys, mask=in_keys, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + slot_key_head * K + keys, mask=in_keys, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + slot_head * V + values, mask=in_values, other=0.0).to(tl.float32)
        if DECAY == "head":
            state *= tl.exp(tl.load(decay_ptr + head))
        elif DECAY == "scalar":
            state *= tl.exp(tl.load(decay_ptr + slot_head))
        elif DECAY == "vector":
            state *= tl.exp(tl.load(decay_ptr + slot_head * K + keys, mask=in_keys, other=0.0))[:, None]
        if ERASE == "delta":
            v = tl.load(beta_ptr + slot_head).to(tl.float32) * (v - tl.sum(state * k[:, None], 0))
        state += k[:, None] * v[None, :]
        tl.store(state_at, state, mask=in_state)
        output = scale * tl.sum(state * q[:, None], 0)
    tl.store(output_ptr + slot_head * V + values, output.to(output_ptr.dtype.element_ty), mask=in_values)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    index: Tensor,
    decay: str,
    erase: str,
    scale: float,
) -> Tensor:
    slots, heads, value_dim = v.shape
    key_heads, key_dim = q.shape[1:]
    output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if output.numel() == 0:
        return output
    launch = TABLE.pick(v.device, decay, erase, key_dim, value_dim, v.dtype)
    value_tile = block_of(value_dim, launch.value_tile)
    # In one dimension, since the others end at 65,535.
    launch_kernel(
        decode_kernel,
        slots * heads * triton.cdiv(value_dim, value_tile),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        None if beta is None else beta.contiguous(),
        state,
        index.contiguous(),
        output,
        scale,
        HEADS=heads,
        KEY_HEADS=key_heads,
        K=key_dim,
        V=value_dim,
        K_BLOCK=block_of(key_dim),
        V_TILE=value_tile,
        DECAY=decay,
        ERASE=erase,
        num_warps=launch.num_warps,
    )
    return output


_decode = operator("decode_step", mutates=("state",))(_launch)


@torch.library.register_fake("linear_moe::decode_step")
def _(q, k, v, log_decay, beta, state, index, decay, erase, scale):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    index: Tensor,
    *,
    form: Recurrence,
    scale: float,
) -> Tensor:
    """S' = Diag(exp(log_decay)) S; S = S' + k v^T or S' + beta k (v - S'^T k)^T; o = scale q^T S. In float32, no gradients.

    Nothing waits for the device, so the values of `index` are not checked.

    Args:
        q: `[R, H_k, K]`, float32, bfloat16 or float16, K at most 256.
        k: `[R, H_k, K]`.
        v: `[R, H, V]`, H a multiple of H_k.
        log_decay: natural log of the decay, float32, as `form.decay` says: None, `[H]`, `[R, H]` or `[R, H, K]`.
        beta: `[R, H]` with `Erase.DELTA`, else None.
        state: `[N, H, K, V]` float32, contiguous; updated in place.
        index: `[R]` int64 or int32, below N: the row of `state` that a slot uses. A slot with a negative one has no memory: it
            touches no state and its output is 0. No two slots may use one row: their programs would race.
        form: the recurrence.
        scale: factor on the read.

    Returns:
        The output `[R, H, V]` in v's dtype.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(q, k, v, log_decay, beta, state, index, form)
    return _decode(q, k, v, log_decay, beta, state, index, form.decay.value, form.erase.value, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    index: Tensor,
    form: Recurrence,
) -> None:
    for name, token, meaning in (("q", q, "[R, H_k, K]"), ("v", v, "[R, H, V]")):
        if token.dim() != 3:
            raise ValueError(f"{name} must be {meaning}, got shape {list(token.shape)}")
    slots, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[1:]
    if not 1 <= key_dim <= LARGEST_KEY_DIM:
        raise ValueError(f"q must have a K of 1 to {LARGEST_KEY_DIM}, got {key_dim}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"v must have a multiple of q's {key_heads} heads, got {heads}")
    for name, gate, wanted in (
        ("log_decay", log_decay, form.decay is not Decay.NONE),
        ("beta", beta, form.erase is Erase.DELTA),
    ):
        if (gate is not None) != wanted:
            verb = "needs a" if wanted else "takes no"
            raise ValueError(f"the form ({form}) {verb} {name}, got {'none' if wanted else 'one'}")
    decay_shape, decay_meaning = {
        Decay.NONE: ((), ""),
        Decay.HEAD: ((heads,), "[H]"),
        Decay.SCALAR: ((slots, heads), "[R, H]"),
        Decay.VECTOR: ((slots, heads, key_dim), "[R, H, K]"),
    }[form.decay]
    for name, tensor, shape, meaning, dtypes in (
        ("q", q, (slots, key_heads, key_dim), "[R, H_k, K]", _FLOATS),
        ("k", k, (slots, key_heads, key_dim), "[R, H_k, K]", _FLOATS),
        ("v", v, (slots, heads, value_dim), "[R, H, V]", _FLOATS),
        ("log_decay", log_decay, decay_shape, decay_meaning, (torch.float32,)),
        ("beta", beta, (slots, heads), "[R, H]", (torch.float64, *_FLOATS)),
        ("state", state, (*state.shape[:1], heads, key_dim, value_dim), "[N, H, K, V]", (torch.float32,)),
        ("index", index, (slots,), "[R]", (torch.int64, torch.int32)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {meaning} = {list(shape)}, got shape {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {list(state.stride())}")
