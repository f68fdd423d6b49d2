"""Attention and the model around it never wait for the device: on meta, where nothing has a value, all of it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hybrids import PATTERNS, model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linear_moe.models import DecodeStep, ModelConfig, Sampling, build_model

TEXT = """\
hidden_size: 16
vocab_size: 11
blocks:
  full: {mixer: {type: attention, num_heads: 2, num_kv_heads: 1}, ffn: {type: none}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: swiglu, width: 8}}
layers: full near
"""


class OnTheDeviceOnly(TorchDispatchMode):
    """Refuses an operation on a tensor of the host that has a size: on a GPU it would be a transfer."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim()), (
                f"{func} touches the host"
            )
        return result


def test_nothing_is_read_back_on_meta() -> None:
    model = build_model(ModelConfig.from_yaml(TEXT), device="meta")
    tokens = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    borders = torch.zeros(4, dtype=torch.int32, device="meta")
    with OnTheDeviceOnly():
        model(tokens, padding_mask=mask).sum().backward()
        model(tokens[:1], cu_seqlens=borders).sum().backward()
        state = model.new_state(2)
        model(tokens, state=state)
        model(tokens, padding_mask=mask, state=state.detach()).sum().backward()
        with torch.no_grad():
            documents = model.new_state(3)
            model(tokens[:1], cu_seqlens=borders, state=documents)
            state = model.new_state(2)
            model(tokens, state=state)
            assert model(tokens[:, :1], state=state.select(tokens[:, 0])).shape == (2, 1, 11)


@pytest.mark.filterwarnings("ignore:.*Triton kernel:RuntimeWarning")
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_step_of_decoding_reads_nothing_back_on_meta(pattern: str) -> None:
    """What can't be read on meta can't be captured in a graph either."""
    model = build_model(model_of(pattern).config, device="meta").eval()
    step = DecodeStep(model, model.new_state(2))
    tokens = torch.zeros(2, dtype=torch.int64, device="meta")
    step(tokens)
    with OnTheDeviceOnly():
        for _ in range(3):
            assert step(Sampling(0.7, top_k=5, top_p=0.9).draw(step(tokens))).shape == (2, 11)
