"""What `explain` counts is what the built model has and does."""

from __future__ import annotations

import json
import re

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from linear_moe.models import ModelConfig, build_model, explain, load_config, shipped_configs

TEXT = """\
name: mixed
hidden_size: 16
vocab_size: 11
blocks:
  mixture: {mixer: {type: mom, num_heads: 2, head_dim: 4}, ffn: {type: moe, num_experts: 4, width: 8}}
  plain: {mixer: {type: memory, rule: gla, num_heads: 2, head_dim: 4}, ffn: {type: none}}
  full: {mixer: {type: attention, num_heads: 2, num_kv_heads: 1}, ffn: {type: swiglu, width: 8}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: swiglu, width: 8}}
layers: mixture plain*2 full near
"""


@pytest.mark.parametrize("name", shipped_configs())
def test_the_rows_sum_to_the_totals(name: str) -> None:
    config = load_config(name)
    found = explain(config)
    model = build_model(config, device="meta")
    final_norm = config.hidden_size
    rest = found.embedding_parameters + final_norm
    assert found.parameters == sum(row.parameters for row in found.layers) + rest == model.num_parameters()
    assert found.active_parameters == sum(row.active_parameters for row in found.layers) + rest
    assert [row.block for row in found.layers] == config.layer_names()


def test_state_bytes_are_those_of_a_state_that_was_used() -> None:
    config = ModelConfig.from_yaml(TEXT)
    found, model = explain(config), build_model(config)
    state = model.new_state(3)
    with torch.no_grad():
        model(torch.randint(11, (3, 7)), state=state)
    assert state.nbytes == 3 * (found.state_bytes + 7 * found.state_bytes_per_token)
    half = explain(config, dtype=torch.bfloat16)
    assert half.state_bytes < found.state_bytes
    assert half.state_bytes_per_token == 2 * (2 * 8) + 8 + 1


def test_flops_of_matrices_are_those_that_torch_counts() -> None:
    full = ModelConfig.from_yaml(TEXT)
    blocks = {name: full.blocks[name] for name in ("full", "near")}
    config = ModelConfig(hidden_size=16, vocab_size=11, blocks=blocks, layers="full near*2")
    model = build_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(11, (1, 1)))
    # At one token of context attention is one score and one read a head. Torch counts it on some backends only.
    attention = 3 * 4 * 2 * 8
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(flops for operator, flops in counts.items() if "attention" not in str(operator))
    assert explain(config, context=1).flops_per_token - attention == matrices


def test_flops_by_hand() -> None:
    rows = explain(ModelConfig.from_yaml(TEXT), context=10).layers
    width, heads, key, value, uses = 16, 2, 4, 4, 3
    projections = uses * width * (heads * key + heads * value + 2 * heads) + width * heads * key
    mixer = projections + 2 * width * heads * value + 4 * width
    experts = 2 * 3 * width * 8 + 4 * width
    conv = uses * 3 * heads * key * 4
    scan = uses * heads * key * value * (1 + 2 + 2 + 2)
    assert rows[0].flops_per_token == 2 * (mixer + experts + conv) + scan
    matrices = 2 * (rows[3].parameters - 2 * width)
    assert rows[3].flops_per_token == matrices + 4 * heads * 8 * (sum(range(1, 11))) // 10
    assert rows[4].flops_per_token == 2 * (rows[4].parameters - 2 * width) + 4 * heads * 8 * (1 + 2 + 8 * 3) // 10


def test_it_prints_and_is_plain_data() -> None:
    found = explain(ModelConfig.from_yaml(TEXT))
    assert json.loads(json.dumps(found.as_dict()))["layers"][3]["block"] == "full"
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(found)
    text = capture.get()
    assert re.search(r"3 │ full\s+│", text)
    assert "mixture: mom of gated_deltanet, 2 of 4 + shared, 2 heads of 4; feed-forward:" in text
    assert f"parameters        {found.parameters:,}, of them 352 in embeddings and head" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_bad_context() -> None:
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        explain(load_config("recall-mom"), context=0)
