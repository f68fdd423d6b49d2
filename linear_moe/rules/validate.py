"""Checks of what a user passes to an op or a layer. Every failure is a ValueError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linear_moe.rules.looks import may_look

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_count(name: str, value: object) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_coefficient(name: str, value: object) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise unless `tensor` has the shape `expected`, described to the user as `meaning`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {meaning} = {list(expected)}, got shape {list(tensor.shape)}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is of a supported floating dtype."""
    if tensor.dtype not in _FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")


def check_padding_mask(padding_mask: object, batch: int, length: int) -> None:
    """Raise unless `padding_mask` is a bool tensor `[B, T]`."""
    if not isinstance(padding_mask, Tensor):
        got = f"a {type(padding_mask).__name__}, not a tensor"
    elif padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != (batch, length):
        got = f"{padding_mask.dtype} of shape {list(padding_mask.shape)}"
    else:
        return
    raise ValueError(f"padding_mask must be bool of shape {[batch, length]} (true on real tokens), got {got}")


def check_cu_seqlens(cu_seqlens: Tensor, length: int, max_length: int | None = None) -> None:
    """Check the borders of packed sequences, and a bound on their lengths; values only on a CPU, where looking costs no
    synchronisation.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 or int64 tensor [N + 1], got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape [N + 1] with N >= 1, "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, or None for T, got {max_length}")
    if not may_look(cu_seqlens.device):
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
    falls = cu_seqlens.diff() < 0
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not fall, got cu_seqlens[{at}] = {int(cu_seqlens[at])} "
            f"before cu_seqlens[{at + 1}] = {int(cu_seqlens[at + 1])}"
        )
    if int(cu_seqlens[-1]) != length:
        raise ValueError(f"cu_seqlens must end at T = {length}, got {int(cu_seqlens[-1])}")
    longest = int(cu_seqlens.diff().max())
    if max_length is not None and longest > max_length:
        raise ValueError(f"max_length must bound every packed sequence, got {max_length} and one of {longest} tokens")


def check_scan_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> None:
    """Check the transformed tensors of an op against each other. Shapes and dtypes only: nothing waits for a device.

    A `log_decay` above 0, NaN or -inf is refused where looking is free, on a CPU.
    """
    q_name, k_name, v_name = names
    for name, tensor in ((q_name, q), (k_name, k), (v_name, v)):
        check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, T, heads, dim], got shape {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of {q_name}, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of {q_name}, {q.device}, got {tensor.device}")
    batch, length, key_heads, key_dim = q.shape
    check_shape(k_name, k, (batch, length, key_heads, key_dim), f"shaped like {q_name}, [B, T, H, K]")
    heads = v.shape[2]
    if tuple(v.shape[:2]) != (batch, length):
        raise ValueError(f"{v_name} must be [B, T, H, V] with B, T = {batch}, {length}, got shape {list(v.shape)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(
            f"{v_name} must have a multiple of {q_name}'s {key_heads} heads, got {heads} (value heads share key heads evenly)"
        )
    if key_dim < 1 or v.shape[3] < 1:
        raise ValueError(f"{q_name} and {v_name} need at least one channel a head, got K = {key_dim}, V = {v.shape[3]}")
    if log_decay is not None:
        check_float("log_decay", log_decay)
        if log_decay.device != q.device:
            raise ValueError(f"log_decay must be on the device of {q_name}, {q.device}, got {log_decay.device}")
        if may_look(log_decay.device) and log_decay.numel():
            lowest, highest = (float(x) for x in log_decay.detach().aminmax())  # NaN if any is
            if not -math.inf < lowest <= highest <= 0:
                wrong = lowest if lowest == -math.inf else highest
                raise ValueError(
                    "log_decay must be at most 0 and finite (it is the natural log of a decay in (0, 1]), "
                    f"got {wrong:.4g}"
                )
    if beta is not None:
        check_float("beta", beta)
        check_shape("beta", beta, (batch, length, heads), "[B, T, H]")
        if beta.device != q.device:
            raise ValueError(f"beta must be on the device of {q_name}, {q.device}, got {beta.device}")
