"""The attention model of the same size: of attention only, and of the same size."""

from __future__ import annotations

import pytest

from linear_moe.evaluation import attention_twin
from linear_moe.models import ModelConfig, build_model, load_config, shipped_configs


@pytest.mark.parametrize("name", shipped_configs())
def test_it_has_the_size_and_no_other_memory(name: str) -> None:
    config = load_config(name)
    twin = attention_twin(config)
    assert twin.layer_names() == config.layer_names()
    for block, before in zip(twin.blocks.values(), config.blocks.values(), strict=True):
        assert block.mixer.type == "attention" and block.mixer.window is None
        if before.mixer.type == "attention" and before.mixer.window is None:
            assert block == before
    size, wanted = (build_model(c, device="meta").num_active_parameters() for c in (twin, config))
    if all(block.ffn.type != "moe" for block in config.blocks.values()):
        # In every layer half of a row of a feed-forward's three matrices, or one of a narrow attention's four.
        assert abs(size - wanted) <= 4 * config.hidden_size * len(config.layer_names())
    assert twin.name == f"{config.name}-attention"


def test_a_width_that_has_no_heads_is_named() -> None:
    text = "hidden_size: 7\nvocab_size: 9\nblocks: {m: {mixer: {type: memory, num_heads: 1, head_dim: 4}}}\nlayers: m\n"
    with pytest.raises(ValueError, match="hidden_size = 7 must be even for attention"):
        attention_twin(ModelConfig.from_yaml(text))
