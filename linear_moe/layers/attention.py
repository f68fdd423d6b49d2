"""Softmax attention as a sequence mixer, beside the recurrent ones: what a hybrid recalls with."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.checks import check_input, check_length, check_state
from linear_moe.layers.initialization import normal_init_
from linear_moe.layers.packed_attention import attend_packed, flash_takes
from linear_moe.layers.sequences import Sequences, describe_sequences
from linear_moe.rules.looks import may_look
from linear_moe.rules.segments import Segments, pad_segments, segments_of, unpad_segments
from linear_moe.rules.transforms import rotary_of


class _Rows(NamedTuple):
    """Tokens laid out in rows that look at no other row: sequences, or one row of packed documents."""

    q: Tensor
    """`[B, T, H, K]`"""
    k: Tensor
    """`[B, T, H_kv, K]`"""
    v: Tensor
    """`[B, T, H_kv, K]`"""
    positions: Tensor
    """`[B, T]`"""
    valid: Tensor
    """`[B, T]`"""
    document: Tensor | None
    """`[B, T]` the document of each token, None where a row is one sequence."""


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions: `[B, T, D]` to `[B, T, D]`.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s over the real tokens s <= t of the same sequence (1706.03762, eq. 1),
    the last `window` of them in a sliding window; q and k rotated to the text's positions (2104.09864).

    Args:
        hidden_size: D.
        num_heads: query heads H.
        num_kv_heads: heads of k and v, a divisor of `num_heads`, which is what it is unless given (2305.13245).
        head_dim: K, even; D / H unless given.
        window: tokens that a token sees, itself included; all before it if None. The cache then holds `window` tokens.
        rope_base: longest rotary wavelength over 2 pi.
        max_length: tokens that a sequence may have, those in its state counted; a longer one is refused, on a GPU as far as
            that is known without waiting. No limit if None.
        layer_index: which layer of the model this is, from 0.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_base: float = 10000.0,
        max_length: int | None = None,
        layer_index: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"num_heads must divide hidden_size = {hidden_size} where no head_dim is given, got {num_heads}"
                )
            head_dim = hidden_size // num_heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary turns pairs of channels) and at least 2, got {head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, or None for no window, got {window}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, or None for no limit, got {max_length}")
        if rope_base <= 1:
            raise ValueError(f"rope_base must be above 1, got {rope_base}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.rope_base = rope_base
        self.max_length = max_length
        self.layer_index = layer_index
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False, **factory)
        # The class as it was written: wrappers (of adapters, of sharded training) change the class of a built module.
        self._owner = f"{type(self).__name__} {layer_index}"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02)."""
        for projection in (self.qkv_proj, self.out_proj):
            normal_init_(projection.weight)

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: AttentionState | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence, after those in the state if one is given.

        Args:
            x: `[B, T, D]`.
            padding_mask: `[B, T]` bool, true on real tokens; pads may stand anywhere, are not looked at and read 0.
            cu_seqlens: `[N + 1]` borders of packed documents, with B = 1. Not together with `padding_mask`. A document costs
                what it costs alone, but for float32 on a GPU, where reading the borders would be a wait: there all T^2 pairs
                of the row are masked.
            max_length: a bound on the tokens of a packed document, T unless given; on a GPU, where looking would wait, it is
                taken on trust. Not the layer's limit, which is on what a state has seen, too.
            state: from `new_state`, for B sequences or N documents; this call's tokens are added to it.

        Returns:
            `[B, T, D]` in the dtype of x.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        sequences = describe_sequences(x, padding_mask, cu_seqlens, max_length)
        self._check(x, sequences, state)
        lengths = None if padding_mask is None and cu_seqlens is None else sequences.lengths
        seen = None if state is None else state.tokens_seen
        check_length(self.max_length, self._owner, lengths, x.shape[1], seen)
        if x.shape[0] == 0 or x.shape[1] == 0:
            return torch.zeros_like(x)
        if padding_mask is not None:
            x = torch.where(sequences.valid.view(x.shape[:2])[..., None], x, 0)
        segments = None
        if cu_seqlens is not None and state is not None:
            # Each document has a cache of its own, so each gets a row of its own.
            segments = segments_of(1, x.shape[1], cu_seqlens, sequences.max_length, x.device)
        rows = self._project(x, sequences, state, segments, packed=cu_seqlens is not None)
        columns = AttentionState(rows.k, rows.v, rows.positions, rows.valid, sequences.lengths, self._owner)
        if state is not None:
            add = state.extended if state.used is None else state.filled
            columns = add(rows.k, rows.v, rows.positions, rows.valid)
        alone = columns.num_columns == x.shape[1] and padding_mask is None and cu_seqlens is None
        if cu_seqlens is not None and state is None and may_look(x.device):
            output = self._attend_documents(rows, cu_seqlens)
        elif cu_seqlens is not None and state is None and flash_takes(rows.q, self.window):
            k, v = self._shared(rows.k[0], 1), self._shared(rows.v[0], 1)
            output = attend_packed(rows.q[0], k, v, cu_seqlens, sequences.max_length, self.window)[None]
        else:
            causal = alone and (self.window is None or x.shape[1] <= self.window)
            mask = None if causal else self._mask(rows, columns)
            keys, values = columns.keys.to(rows.k.dtype), columns.values.to(rows.v.dtype)
            output = self._attend(rows.q, keys, values, mask)
        if state is not None:
            state.update(columns if self.window is None else columns.last(self.window), sequences.lengths)
        if segments is not None:
            output = unpad_segments(output, segments)[None]
        output = self.out_proj(output.flatten(2)).to(x.dtype)
        return output if padding_mask is None else torch.where(padding_mask.to(x.device)[..., None], output, 0)

    def _project(
        self,
        x: Tensor,
        sequences: Sequences,
        state: AttentionState | None,
        segments: Segments | None,
        *,
        packed: bool,
    ) -> _Rows:
        """Rotated queries and keys, and values, in rows."""
        positions = sequences.position
        if state is not None:
            positions = positions + state.tokens_seen[sequences.index.clamp_max(sequences.num_sequences - 1)]
        positions = positions.view(x.shape[:2])
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 2)
        rotate = rotary_of(q, positions, self.rope_base)
        q, k = rotate(q), rotate(k)
        valid = sequences.valid.view(x.shape[:2])
        if segments is None:
            return _Rows(q, k, v, positions, valid, sequences.index[None] if packed else None)
        q, k, v, positions = (pad_segments(part[0], segments) for part in (q, k, v, positions))
        valid = torch.arange(segments.max_length, device=x.device) < sequences.lengths[:, None]
        return _Rows(q, k, v, positions, valid, None)

    def _mask(self, rows: _Rows, columns: AttentionState) -> Tensor:
        """`[B, 1, T, L]` bool: what each token may look at."""
        at, of = rows.positions[:, :, None], columns.positions[:, None, :]
        allowed = columns.valid[:, None, :] & (of <= at)
        if self.window is not None:
            allowed = allowed & (of > at - self.window)
        if rows.document is not None:
            allowed = allowed & (rows.document[:, :, None] == rows.document[:, None, :])
        # A pad looks at itself, or its softmax would be over nothing: 0 / 0 in some backends. It is zeroed in the end.
        end = columns.num_columns if columns.used is None else columns.used
        own = torch.arange(rows.q.shape[1], device=at.device) + end - rows.q.shape[1]
        itself = own[:, None] == torch.arange(columns.num_columns, device=at.device)
        return (allowed | (itself & ~rows.valid[:, :, None]))[:, None]

    def _attend_documents(self, rows: _Rows, cu_seqlens: Tensor) -> Tensor:
        """`[1, T, H, K]`: every packed document on its own, those of a length at once. Reads the borders: for a CPU."""
        starts: dict[int, list[int]] = {}
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            if stop > start:
                starts.setdefault(stop - start, []).append(start)
        outputs, indices = [], []
        for length, group in starts.items():
            at = torch.arange(length)
            mask = None
            if self.window is not None and length > self.window:
                mask = (at <= at[:, None]) & (at > at[:, None] - self.window)
            index = (torch.tensor(group)[:, None] + at).flatten()
            q, k, v = (x[0].index_select(0, index).unflatten(0, (-1, length)) for x in (rows.q, rows.k, rows.v))
            outputs.append(self._attend(q, k, v, mask).flatten(0, 1))
            indices.append(index)
        return torch.cat(outputs).index_select(0, torch.cat(indices).argsort())[None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, T, H, K]`; causal over equally many keys without a mask."""
        # Not `enable_gqa`: with a mask it leaves the fused backends and stores all scores.
        k, v = self._shared(k.transpose(1, 2), 1), self._shared(v.transpose(1, 2), 1)
        output = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
        return output.transpose(1, 2)

    def _shared(self, x: Tensor, dim: int) -> Tensor:
        """Key heads repeated to the query heads that share them."""
        shared_by = self.num_heads // self.num_kv_heads
        return x if shared_by == 1 else x.repeat_interleave(shared_by, dim)

    def new_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> AttentionState:
        """The state of `batch_size` sequences before their first token: no columns, or `window` empty ones.

        Args:
            batch_size: B, or the number of packed documents.
            dtype: of the keys and values; the layer's unless given.
            device: the layer's unless given.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        weight = self.out_proj.weight
        device, dtype = weight.device if device is None else device, dtype or weight.dtype
        columns = (batch_size, self.window or 0)
        heads = (*columns, self.num_kv_heads, self.head_dim)
        return AttentionState(
            keys=torch.zeros(heads, dtype=dtype, device=device),
            values=torch.zeros(heads, dtype=dtype, device=device),
            positions=torch.zeros(columns, dtype=torch.int64, device=device),
            valid=torch.zeros(columns, dtype=torch.bool, device=device),
            tokens_seen=torch.zeros(batch_size, dtype=torch.int64, device=device),
            owner=self._owner,
        )

    def _check(self, x: Tensor, sequences: Sequences, state: AttentionState | None) -> None:
        check_input(x, self.hidden_size, self.out_proj.weight.dtype)
        if state is None:
            return
        check_state(state, AttentionState, self._owner)
        shape = (sequences.num_sequences, state.num_columns, self.num_kv_heads, self.head_dim)
        if tuple(state.keys.shape) != shape:
            raise ValueError(
                f"state.keys must be [B, columns, H_kv, K] = {list(shape)} for this call, got {list(state.keys.shape)}"
            )
        if self.window is not None and state.num_columns != self.window:
            raise ValueError(f"state must have window = {self.window} columns, got {state.num_columns}")

    def extra_repr(self) -> str:
        window = "all" if self.window is None else str(self.window)
        limit = "" if self.max_length is None else f"max_length={self.max_length}, "
        return (
            f"hidden_size={self.hidden_size}, heads={self.num_heads}, kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, window={window}, rope_base={self.rope_base:g}, {limit}"
            f"parameters={sum(parameter.numel() for parameter in self.parameters()):,}"
        )
