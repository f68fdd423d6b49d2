"""Initial values that published rules share."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from linear_moe.rules.base import Initializer

DT_RANGE = (1e-3, 0.1)
"""Range of the initial time step (2312.00752, section 3.6)."""
DT_FLOOR = 1e-4


def log_uniform_matrix(low: float, high: float) -> Initializer:
    """`A_log`: the logarithm of a number drawn uniformly from (low, high)."""
    return functools.partial(_log_uniform, low, high)  # and no closure: a layer can be pickled


def _log_uniform(low: float, high: float, shape: tuple[int, ...]) -> Tensor:
    # A draw of exactly 0 would be log 0; the smallest normal number is a decay of 1 just as well.
    return torch.empty(shape).uniform_(low, high).clamp_min(torch.finfo(torch.float32).tiny).log()


def inverse_softplus_time_step(shape: tuple[int, ...]) -> Tensor:
    """`dt_bias`: softplus of it is log-uniform in `DT_RANGE`."""
    low, high = (math.log(x) for x in DT_RANGE)
    dt = torch.empty(shape).uniform_(low, high).exp().clamp_min(DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
