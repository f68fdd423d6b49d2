"""The configuration: what is read, and what a user is told of what can't be."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from linear_moe.models import ConfigError, ModelConfig, build_model, load_config, shipped_configs

GOOD = """\
hidden_size: 32
vocab_size: 64
blocks:
  memory:
    mixer: {type: mom, rule: {type: gla, gate_rank: 8}, num_heads: 2, head_dim: 8}
    ffn: {type: moe, num_experts: 4, top_k: 2, width: 16}
  recall:
    mixer: {type: attention, num_heads: 4}
    ffn: {type: swiglu, ratio: 3}
layers: "(memory*2 recall)*2"
"""


def said(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_yaml(text, source="my.yaml")
    return str(caught.value)


def test_a_configuration_survives_writing() -> None:
    config = ModelConfig.from_yaml(GOOD)
    again = ModelConfig.from_yaml(config.to_yaml())
    assert again == config
    assert again.model_fields_set == config.model_fields_set
    assert again.fingerprint() == config.fingerprint()
    assert config.layer_names() == ["memory", "memory", "recall"] * 2
    assert config.fingerprint() != ModelConfig.from_yaml(GOOD.replace("*2", "*3")).fingerprint()
    assert config.fingerprint() == ModelConfig.from_yaml("name: x\n" + GOOD).fingerprint()


@pytest.mark.parametrize("rule", ["gla", "{type: gla}"])
def test_a_rule_is_a_name_or_a_mapping(rule: str) -> None:
    config = ModelConfig.from_yaml(GOOD.replace("{type: gla, gate_rank: 8}", rule))
    assert config.blocks["memory"].mixer.rule.type == "gla"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # unknown keys
        ("top_k: 2", "topk: 2", "blocks.memory.ffn.topk (line 6): unknown key; did you mean 'top_k'? allowed: type, ratio"),
        ("layers:", "layer:", "layer (line 10): unknown key; did you mean 'layers'?"),
        ("gate_rank", "gate_rang", "blocks.memory.mixer.rule.gate_rang (line 5): unknown key; did you mean 'gate_rank'?"),
        ("    ffn: {type: swiglu", "    fnn: {type: swiglu", "blocks.recall.fnn (line 9): unknown key; did you mean 'ffn'?"),
        # types and values
        ("hidden_size: 32", "hidden_size: '32'", "hidden_size (line 1): must be a valid integer, got text '32'"),
        ("vocab_size: 64", "vocab_size: 0", "vocab_size (line 2): must be greater than 0, got 0"),
        ("num_heads: 2", "num_heads: true", "blocks.memory.mixer.num_heads (line 5): must be a valid integer, got a truth"),
        ("gate_rank: 8", "gate_rank: 8.5", "blocks.memory.mixer.rule.gate_rank (line 5): must be a valid integer, got 8.5"),
        ("gate_rank: 8", "gate_rank: 0", "blocks.memory.mixer.rule (line 5): gate_rank must be at least 1, got 0"),
        ("ratio: 3", "ratio: .inf", "blocks.recall.ffn.ratio (line 9): must be a finite number, got inf"),
        ("ratio: 3", "ratio: -1", "blocks.recall.ffn.ratio (line 9): must be greater than 0, got -1"),
        ("vocab_size: 64\n", "", "vocab_size: is required"),
        ("vocab_size: 64", "vocab_size: 64\nformat: 2", "format (line 3): must be 1, got 2"),
        ("  recall:", "  re call:", "blocks (line 3): 're call' is no name"),
        ("  recall:", "  7:", "blocks (line 3): 7 is no name"),
        # kinds
        ("type: attention", "type: atention", "blocks.recall.mixer.type (line 8): unknown type 'atention'; did you mean 'att"),
        ("type: swiglu, ", "", "blocks.recall.ffn.type (line 9): is required; allowed: swiglu, moe, none"),
        ("{type: swiglu, ratio: 3}", "swiglu", "blocks.recall.ffn (line 9): must be a mapping, got text 'swiglu'"),
        ("type: gla", "type: glaa", "blocks.memory.mixer.rule (line 5): unknown rule 'glaa'; did you mean 'gla'?"),
        ("{type: gla, gate_rank: 8}", "3", "blocks.memory.mixer.rule (line 5): must be the name of a rule, or a mapping"),
        ("{type: gla, gate_rank: 8}", "{gate_rank: 8}", "blocks.memory.mixer.rule.type (line 5): is required; allowed: "),
        ("{type: gla, gate_rank: 8}", "os.path:join", "unknown rule 'os.path:join'"),
        # what does not go together
        ("num_heads: 2", "num_heads: 2, top_k: 5", "mixer.top_k (line 5): must be at most num_memories = 4, got 5"),
        ("num_heads: 2", "num_heads: 2, num_memories: 1", "top_k (line 5): must be at most num_memories = 1, got 2 (its def"),
        ("top_k: 2, w", "top_k: 6, w", "blocks.memory.ffn.top_k (line 6): must be at most num_experts = 4, got 6"),
        ("num_heads: 2", "num_heads: 2, num_value_heads: 3", "must be a multiple of num_heads = 2, got 3"),
        ("num_heads: 4", "num_heads: 4, num_kv_heads: 3", "num_kv_heads (line 8): must divide num_heads = 4, got 3"),
        ("num_heads: 4", "num_heads: 3", "must be an even number where no head_dim is given, got 32 / 3"),
        ("num_heads: 4", "head_dim: 7", "blocks.recall.mixer.head_dim (line 8): must be even"),
        ("{type: gla, gate_rank: 8}, num_heads: 2, head_dim: 8", "retnet, head_dim: 7", "rule (line 5): head_dim must be even"),
        ("num_heads: 2", "num_heads: 2, norm_groups: 3", "norm_groups (line 5): must divide the 16 value channels, got 3"),
        ("*2 recall", "*2 recal", "layers (line 10): unknown block 'recal'; did you mean 'recall'?"),
        # what would be ignored
        ("num_heads: 2", "num_heads: 2, conv_width: 3", "conv_width (line 5): would be ignored: the rule 'gla' has no"),
        ("num_heads: 2", "num_heads: 2, conv_scope: memory", "conv_scope (line 5): would be ignored: the rule 'gla' has no"),
        ("num_heads: 2", "num_heads: 2, output_gate: none, gate_before_norm: true", "gate_before_norm (line 5): would be ign"),
        ("ratio: 3", "ratio: 3, width: 64", "blocks.recall.ffn.ratio (line 9): would be ignored beside width = 64"),
        ("*2 recall", "*2", "blocks.recall (line 7): would be ignored: layers = '(memory*2)*2' does not use it"),
        ("num_heads: 2", "num_heads: 2, top_k: 1, renormalize: true", "renormalize (line 5): would be ignored: with top_k = 1"),
        ("top_k: 2, w", "top_k: 4, balance_weight: 0.1, w", "balance_weight (line 6): would be ignored: top_k = num_experts"),
        ("num_heads: 2", "num_heads: 2, top_k: 4, balance_bias_rate: 0.1", "balance_bias_rate (line 5): would be ignored"),
    ],
)  # fmt: skip
def test_errors_name_the_key_what_came_and_what_is_allowed(old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = said(GOOD.replace(old, new))
    assert text.startswith("my.yaml: ")
    assert message in text


def test_options_that_have_an_effect_are_not_refused() -> None:
    for new in (
        "num_heads: 2, conv_width: 3, conv_scope: sequence",
        "num_heads: 2, top_k: 4",
        "num_heads: 2, top_k: 1, renormalize: false",
        "num_heads: 2, top_k: 1, num_memories: 1",
    ):
        ModelConfig.from_yaml(GOOD.replace("num_heads: 2", new))
    convolved = GOOD.replace("gate_rank: 8}", "short_conv: true}, conv_width: 3")
    assert build_model(ModelConfig.from_yaml(convolved), device="meta").num_parameters() > 0


def test_every_problem_is_told_at_once() -> None:
    text = said(GOOD.replace("num_heads: 2", "num_head: 2").replace("ratio: 3", "ratios: 3"))
    head, *lines = text.split("\n")
    assert head == "my.yaml: 2 problems"
    assert [line.split()[0] for line in lines] == ["blocks.memory.mixer.num_head", "blocks.recall.ffn.ratios"]


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    assert "must be a mapping with the keys hidden_size, vocab_size, blocks, layers; got" in said(text)


def test_the_pattern_error_keeps_its_caret() -> None:
    *_, pattern, caret = said(GOOD.replace(")*2", ")*2)")).split("\n")
    assert pattern[caret.index("^")] == ")"


def test_from_python() -> None:
    block = {"mixer": {"type": "attention", "num_heads": 2}}
    data = {"hidden_size": 8, "vocab_size": 4, "blocks": {"a": block}, "layers": "a"}
    assert ModelConfig.from_dict(data) == ModelConfig.model_validate(data)
    assert ModelConfig.from_dict(data).blocks["a"].ffn.type == "swiglu"
    with pytest.raises(ConfigError, match="the configuration: hidden_size: must be greater than 0, got 0"):
        ModelConfig.from_dict(data | {"hidden_size": 0})
    with pytest.raises(ValidationError):
        ModelConfig(hidden_size=0, vocab_size=4, blocks={}, layers="a")


def test_loading(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert load_config(file) == load_config(str(file)) == ModelConfig.from_yaml(GOOD)
    assert load_config("recall-mom") == load_config("recall-mom.yaml")
    assert "mom-380m" in shipped_configs()
    with pytest.raises(ConfigError, match=r"nor a shipped configuration of that name; did you mean 'recall-mom'\?"):
        load_config("recall-mon")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text: byte 6 can't be decoded"):
        load_config(file)
