"""Options that can't be represented: each is refused by its name, its value, and what can be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linear_moe.models.convert import FAMILIES, backbone, read_checkpoint
from linear_moe.models.convert.options import WITHOUT_EFFECT, Options

HYBRID = {"layers": [1], "num_heads": 4}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mom", {"topk": 1}, "topk = 1 can't be represented: its weight would be 1 there"),
        ("mom", {"topk": 4}, "topk = 4 must be at most num_memories = 3"),
        ("mom", {"mom_backend": "gla"}, "mom_backend = 'gla' can't be represented; 'gated_deltanet' can"),
        ("mom", {"use_short_conv": False}, "use_short_conv = false can't be represented; true can"),
        ("mom", {"attn": HYBRID}, "attn = {'layers': [1], 'num_heads': 4} can't be represented; null can"),
        ("mom", {"aux_loss_scale": "big"}, "aux_loss_scale = 'big' must be a number of at least 0"),
        ("mom", {"num_memories": 2.5}, "num_memories = 2.5 must be a whole number of at least 1"),
        ("mom", {"shared_mem": 1}, "shared_mem = 1 must be true or false"),
        ("gated_deltanet", {"output_gate_activation": "tanh"}, "= 'tanh' can't be represented; 'swish' or 'silu' or 'sig"),
        ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads = 3 must be a multiple of num_heads = 2"),
        ("gated_deltanet", {"expand_v": 0.3}, "expand_v = 0.3 must make a whole number of 8 channels"),
        ("gated_deltanet", {"hidden_act": "powlu"}, "hidden_act = 'powlu' can't be represented; 'swish' or 'silu' can"),
        ("gated_deltanet", {"attnres_block_size": 2}, "attnres_block_size = 2 can't be represented; null can"),
        ("gated_deltanet", {"norm_first": True}, "norm_first = true can't be represented; false can"),
        ("gated_deltanet", {"attn": 3}, "attn = 3 must be null, a mapping or a list of mappings"),
        ("gated_deltanet", {"attn": HYBRID | {"layers": [2]}}, "attn: layers = [2] must list layers from 0 to 1, each once"),
        ("gated_deltanet", {"attn": [HYBRID, HYBRID]}, "attn: layers = [1] must list layers from 0 to 1, each once"),
        ("gated_deltanet", {"attn": HYBRID | {"qkv_bias": True}}, "attn: qkv_bias = true can't be represented; false can"),
        ("gated_deltanet", {"attn": HYBRID | {"alibi": True}}, "attn: unknown key alibi"),
        ("gated_deltanet", {"attn": HYBRID | {"window_sise": 3}}, "unknown key window_sise; did you mean 'window_size'?"),
        ("gated_deltanet", {"attn": {"layers": [1]}}, "attn: num_heads = null (the default) must be a whole number"),
        ("gla", {"clamp_min": -1.0}, "clamp_min = -1.0 can't be represented; null can"),
        ("gla", {"feature_map": "relu"}, "feature_map = 'relu' can't be represented; null can"),
        ("gla", {"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 2"),
        ("gla", {"expand_k": 0.03125}, "expand_k = 0.03125 must make a width that num_heads = 2 divides, not 1"),
        ("retnet", {"feature_map": "elu"}, "feature_map = 'elu' can't be represented; null can"),
        ("retnet", {"expand_k": 0.0625}, "expand_k = 0.0625 makes heads of 1 channels, of which rotary turns pairs"),
        ("mamba2", {"rmsnorm": False}, "rmsnorm = false can't be represented; true can"),
        ("mamba2", {"use_bias": True}, "use_bias = true can't be represented; false can"),
        ("mamba2", {"D_has_hdim": True}, "D_has_hdim = true can't be represented; false can"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' can't be represented; 'silu' or 'swish' can"),
        ("mamba2", {"dt_limit": [0.0, 1.0]}, "dt_limit = [0.0, 1.0] can't be represented; [0, Infinity] can"),
        ("mamba2", {"dt_limit": 3}, "dt_limit = 3 can't be represented"),
        ("mamba2", {"n_groups": 3}, "n_groups = 3 must divide the 4 heads"),
        ("mamba2", {"head_dim": 24}, "head_dim = 24 must divide expand * hidden_size = 64"),
        ("mamba2", {"num_heads": 5}, "num_heads = 5 must be expand * hidden_size / head_dim = 4"),
        ("mamba2", {"layer_norm_epsilon": 1e-5}, "unknown key layer_norm_epsilon = 1e-05;"),
        ("transformer", {"qk_norm": True}, "qk_norm = true can't be represented; false can"),
        ("transformer", {"qkv_bias": True}, "qkv_bias = true can't be represented; false can"),
        ("transformer", {"rope_theta": None}, "rope_theta = null must be a number above 0"),
        ("transformer", {"num_heads": 3}, "num_heads = 3 must make heads of an even number of the 32 channels"),
        ("transformer", {"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 2"),
        ("transformer", {"rope_thetas": 3.0}, "unknown key rope_thetas = 3.0; did you mean 'rope_theta'? if it changes"),
        ("transformer", {"quantization_config": {"bits": 4}}, "unknown key quantization_config = {'bits': 4};"),
        ("transformer", {"model_type": "transfomer"}, "unknown model_type 'transfomer'; did you mean 'transformer'?"),
        ("transformer", {"model_type": ...}, "model_type is required; allowed: mom"),
        ("transformer", {"norm_eps": 0}, "norm_eps = 0 must be a number above 0"),
        ("transformer", {"vocab_size": 24}, "model.embeddings.weight must be [24, 32] by its config.json, got [23, 32]"),
        ("transformer", {"num_hidden_layers": 1}, "holds model.layers.1.attn.k_proj.weight, model.layers.1.attn.o_proj.weight"),
        ("transformer", {"num_hidden_layers": 3}, "has no tensor model.layers.2.attn_norm.weight, which its config.json asks"),
    ],
)  # fmt: skip
def test_it_is_refused_by_name(
    saved: dict[str, Path],
    tmp_path: Path,
    altered: Callable[..., Path],
    family: str,
    options: dict[str, Any],
    message: str,
) -> None:
    source = altered(saved[family], tmp_path / "source", options)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_checkpoint(source)
    assert str(tmp_path / "source") in str(caught.value)


def test_an_unknown_key_can_be_ignored_and_a_known_one_can_not(
    saved: dict[str, Path], tmp_path: Path, altered: Callable[..., Path]
) -> None:
    source = altered(saved["gla"], tmp_path / "source", {"remark": "trained on Tuesday"})
    with pytest.raises(ValueError, match=r"unknown key remark = 'trained on Tuesday'; .*: --ignore remark"):
        read_checkpoint(source)
    assert read_checkpoint(source, ignore=["remark"]).model_type == "gla"
    with pytest.raises(ValueError, match="clamp_min can't be ignored: the conversion reads it"):
        read_checkpoint(source, ignore=["remark", "clamp_min"])
    with pytest.raises(ValueError, match="remrak can't be ignored: there is no such key"):
        read_checkpoint(source, ignore=["remark", "remrak"])


@pytest.mark.parametrize("family", ["mom", "gated_deltanet", "gla", "retnet", "mamba2", "transformer"])
def test_every_option_that_is_known_is_read(
    saved: dict[str, Path], tmp_path: Path, altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Known and not read would be ignored in silence; having an effect and being listed as without would be, too."""
    read: set[str] = set()
    value = Options.value

    def recorded(options: Options, name: str) -> Any:
        read.add(name)
        return value(options, name)

    monkeypatch.setattr(Options, "value", recorded)
    read_checkpoint(saved[family])
    feed_forward = set() if family == "mamba2" else backbone.FEED_FORWARD_DEFAULTS.keys()
    declared = FAMILIES[family]
    known = backbone.DEFAULTS.keys() | feed_forward | declared.defaults.keys()
    assert read == known
    assert not known & (WITHOUT_EFFECT | set(declared.without_effect))
