"""The scalar scan of wide heads, K or V above 128, where nothing is kept for a backward pass: one walk.

`linear_moe.kernels.parallel_scan` stores states in a walk and reads from them after it: keys and values come from memory twice,
and states go there and back. Here a program walks with its state in registers; what makes 256 keys of it fit there is in
`linear_moe.kernels.turned_scan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels import piece_reads
from linear_moe.kernels.blocks import Direction, new_states, wants_factors, zero_uncovered
from linear_moe.kernels.descriptors import describable
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.parallel_scan import plan_of, starts_of
from linear_moe.kernels.results import Forward
from linear_moe.kernels.splits import Ragged
from linear_moe.kernels.turned_scan import Launch, turned_scan


def choose_launch(dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H200 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H4 K = V = 256).

    0.117 without a decay, 0.143 with one a head and 0.148 with one a token, if they are mild. With an exponential of every
    factor in the walk 0.161, 0.172; with factors in registers from a chunk's start 0.163, 0.200, for they spill.
    On an H100 the two steps of `parallel_scan` take 0.207 to 0.216; of prototypes, with 2 stages 0.184, 0.203, 0.215; with
    faded pairs 0.205, 0.211; on 8 warps with chunks of 128 and 1 stage 0.241, 0.279, 0.310.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=16, value_tile=16, num_warps=4, num_stages=1)
    return Launch(chunk=64, value_tile=64, num_warps=4, num_stages=3)


TABLE = LaunchTable(
    "wide_scan",
    lambda decay, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda decay, key_dim, value_dim, dtype: {
        "num_warps": (4, 8),
        "num_stages": (1, 2) if dtype == torch.float32 else (2, 3),
    },
)
"""By the decay, K, V and the dtype."""


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads are wide, and descriptors can describe what they are in."""
    return piece_reads.takes(k.shape[2], v.shape[2], k.dtype) and describable(q, k, v)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_final: bool,
) -> Forward:
    """As `linear_moe.kernels.parallel_scan.forward`, without `starts` and `sums`."""
    launch = TABLE.pick(v.device, decay.value, k.shape[2], v.shape[2], k.dtype)
    factors: Direction | None = "forwards" if wants_factors(k.dtype) else None
    plan = plan_of(k, v, log_decay, decay, ragged, chunk=launch.chunk, factors=factors)
    starts = starts_of(plan, k, v, initial_state)
    ends = new_states(plan.walks.num_pieces, k, v) if want_final else None
    output = torch.empty_like(v)
    turned_scan(
        q, k, v, plan.inner if decay is Decay.SCALAR else plan.pieces.decays, plan.factors, output, kind=plan.pieces.kind,
        heads=plan.pieces.heads, starts=starts, final=ends, walked=plan.walks.all, launch=launch, scale=scale,
        in_full=plan.pieces.in_full,
    )  # fmt: skip
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    return Forward(output, None if ends is None else plan.walks.ends(ends), None, None)
