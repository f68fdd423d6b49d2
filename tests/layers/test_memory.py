"""`MemoryLayer` as a module. That it computes what it should is the business of test_layer_laws.py."""

from __future__ import annotations

import pytest
import torch

from linear_moe import MemoryLayer, MoMLayer


def test_its_names_are_those_of_a_mixture_without_a_router() -> None:
    one = MemoryLayer(8, num_heads=2, head_dim=4)
    mixture = MoMLayer(8, num_memories=1, top_k=1, shared_memory=False, num_heads=2, head_dim=4)
    loaded = mixture.load_state_dict(one.state_dict(), strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["router.weight"], [])


def test_gated_deltanets_layer_of_the_comparison_has_5_3_million_parameters() -> None:
    layer = MemoryLayer(1024, device="meta")
    assert round(sum(p.numel() for p in layer.parameters()) / 1e6, 1) == 5.3


def test_there_is_no_auxiliary_loss() -> None:
    layer = MemoryLayer(8, num_heads=2, head_dim=4)
    assert not hasattr(layer, "router")
    assert not list(layer.buffers())


@pytest.mark.parametrize("scope, channels", [("memory", 24), ("sequence", 8)])
def test_the_conv_is_as_wide_as_what_it_runs_on(scope: str, channels: int) -> None:
    layer = MemoryLayer(8, num_heads=2, head_dim=4, conv_scope=scope, conv_width=3)
    assert layer.conv_weight is not None
    assert layer.conv_weight.shape == (channels, 3)


def test_a_decoding_step_writes_into_the_state_it_was_given() -> None:
    layer = MemoryLayer(8, num_heads=2, head_dim=4)
    with torch.no_grad():
        state = layer.new_state(2)
        places = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        layer(torch.randn(2, 1, 8), state=state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == places
    assert state.tokens_seen.tolist() == [1, 1]
