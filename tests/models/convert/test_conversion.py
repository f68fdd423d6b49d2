"""What a conversion writes: dtypes, names, settings of released models, and nothing where it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.models import ModelConfig, build_model, load_config
from linear_moe.models.convert import FAMILIES, convert_checkpoint, read_checkpoint
from linear_moe.models.convert.backbone import read_config, read_options
from linear_moe.models.model_folder import read_model_folder

Alter = Callable[..., Path]
FAMILY_NAMES = ["mom", "gated_deltanet", "gla", "retnet", "mamba2", "transformer"]


def settings(**config: Any) -> ModelConfig:
    """Our configuration of a `config.json` alone."""

    class Folder:
        def __init__(self) -> None:
            self.config, self.config_path = config, "config.json"

    family = FAMILIES[config["model_type"]]
    options = read_options(family, Folder())  # type: ignore[arg-type]
    read = read_config(family, options, "released")
    options.finish()
    return read


def test_the_released_1_3b_mixture_is_the_shipped_configuration() -> None:
    ours = settings(
        model_type="mom", hidden_size=2048, num_heads=4, head_dim=256, expand_v=1, conv_size=4,
        hidden_ratio=4, num_hidden_layers=24, num_memories=4, topk=2, shared_mem=True, single_kv_proj=False,
        aux_loss_scale=0.01, capacity=1.0, use_layer_wise_balance=True, vocab_size=32000, norm_eps=1e-6,
    )  # fmt: skip
    shipped = build_model(load_config("mom-1.3b"), device="meta")
    model = build_model(ours, device="meta")
    assert model.num_parameters() == 1_618_419_904 and model.num_active_parameters() == 1_416_306_880
    shapes = [{name: t.shape for name, t in one.state_dict().items()} for one in (model, shipped)]
    assert shapes[0] == shapes[1]
    mixer = ours.blocks["memory"].mixer
    assert mixer.balance_weight == pytest.approx(
        load_config("mom-1.3b").blocks["memory"].mixer.balance_weight, rel=1e-5
    )  # type: ignore[union-attr]


def test_the_released_380m_settings_in_the_papers_own_format() -> None:
    ours = settings(
        model_type="mom_gated_deltanet", attn_mode="chunk", bos_token_id=1, expand_v=1, hidden_ratio=3,
        hidden_size=1024, intermediate_size=None, num_heads=4, head_dim=256, num_hidden_layers=24, norm_eps=1e-6,
        tie_word_embeddings=True, use_cache=True, vocab_size=32000, use_short_conv=True, num_experts=4, topk=2, capacity=1.0,
        use_layer_wise_balance=True, aux_loss_scale=0.01, shared_mem=True, single_expert=False, hidden_act="swish",
    )  # fmt: skip
    assert build_model(ours, device="meta").num_parameters() == 545_119_424 - 32000 * 1024


@pytest.mark.parametrize("hidden, heads, ratio", [(1024, 4, 3), (2048, 4, 4)])
def test_the_released_gated_deltanets_are_representable(hidden: int, heads: int, ratio: int) -> None:
    ours = settings(
        model_type="gated_deltanet", hidden_size=hidden, num_heads=heads, head_dim=256, expand_v=1,
        hidden_ratio=ratio, num_hidden_layers=24, vocab_size=32000, norm_first=False,
    )  # fmt: skip
    mixture = build_model(load_config("mom-380m" if hidden == 1024 else "mom-1.3b"), device="meta")
    one = build_model(ours, device="meta")
    # As many parameters as a mixture that keeps of its five memories one, and no router.
    memory_rows = 2 * heads * 256 + 2 * heads
    assert mixture.num_parameters() - one.num_parameters() == 24 * hidden * (4 * memory_rows + 4)


def test_attention_stands_where_a_hybrid_lists_it() -> None:
    sizes = {"model_type": "gla", "hidden_size": 32, "num_heads": 2, "vocab_size": 9, "num_hidden_layers": 6}
    kinds = [
        {"layers": [1, 2], "num_heads": 4},
        {"layers": [5], "num_heads": 2, "window_size": 7, "rope_theta": 50000.0},
    ]
    ours = settings(**sizes, attn=kinds)
    assert ours.layers == "memory recall*2 memory*2 recall_2"
    assert [ours.blocks[name].mixer.num_heads for name in ("recall", "recall_2")] == [4, 2]  # type: ignore[union-attr]
    assert (ours.blocks["recall_2"].mixer.window, ours.blocks["recall_2"].mixer.rope_base) == (7, 50000.0)  # type: ignore[union-attr]
    # Of one kind throughout, or of none.
    assert list(settings(**sizes, attn={"layers": list(range(6)), "num_heads": 4}).blocks) == ["recall"]
    assert settings(**sizes, attn={"layers": [], "num_heads": 4}).layers == "memory*6"


def papers_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the paper's own code stores it: gate and up in one matrix, and a skip that nobody reads."""
    result = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    for name in [name for name in tensors if "gate_proj" in name]:
        result[name] = torch.cat((tensors[name], tensors[name.replace("gate_proj", "up_proj")]))
    return result | {name.replace("A_log", "D"): torch.ones(2) for name in tensors if "A_log" in name}


def test_the_papers_own_format_is_read(saved: dict[str, Path], tmp_path: Path, altered: Alter) -> None:
    old = {
        "model_type": "mom_gated_deltanet",
        "num_experts": 3,
        "single_expert": False,
        "use_gate": True,
        "norm_first": False,
    }
    gone = dict.fromkeys(
        ("num_memories", "single_kv_proj", "use_output_gate", "mom_backend", "attnres_block_size"), ...
    )
    source = altered(saved["mom"], tmp_path / "old", old | gone, papers_own)
    came, wanted = read_checkpoint(source), read_checkpoint(saved["mom"])
    assert came.config.blocks == wanted.config.blocks
    assert came.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(came.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_stays_bfloat16_and_gates_float32(
    saved: dict[str, Path], tmp_path: Path, family: str, altered: Alter
) -> None:
    def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        gates = ("A_log", "dt_bias", ".D")
        return {name: t if name.endswith(gates) else t.bfloat16() for name, t in tensors.items()}

    source = altered(saved[family], tmp_path / "source", {}, narrow)
    conversion = convert_checkpoint(source, tmp_path / "ours")
    model = read_model_folder(tmp_path / "ours")
    wanted = read_checkpoint(saved[family]).tensors
    assert conversion.narrowed == []
    for name, tensor in model.state_dict().items():
        if name.startswith("gate_parameters") or ".gate_parameters." in name:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name])
        else:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted[name].bfloat16())
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_another_dtype_and_what_it_rounds(saved: dict[str, Path], tmp_path: Path, altered: Alter) -> None:
    conversion = read_checkpoint(saved["mom"], dtype=torch.bfloat16)
    kept = {name for name in conversion.tensors if ".gate_parameters." in name}
    assert kept and set(conversion.narrowed) == conversion.tensors.keys() - kept
    mixed = altered(
        saved["gla"],
        tmp_path / "mixed",
        {},
        lambda tensors: {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()},
    )
    assert all("norm" in name for name in read_checkpoint(mixed).narrowed)
    assert len(read_checkpoint(mixed).narrowed) == 7
    assert read_checkpoint(mixed, dtype=torch.float32).narrowed == []
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch.int8"):
        read_checkpoint(mixed, dtype=torch.int8)


@pytest.mark.parametrize(
    "family, options, gone",
    [
        ("gated_deltanet", {"use_short_conv": False}, "conv1d"),
        ("gla", {"elementwise_affine": False}, "g_norm"),
        ("mamba2", {"use_conv_bias": False}, "conv1d.bias"),
    ],
)
def test_what_stands_for_a_missing_parameter_rounds_nothing(
    saved: dict[str, Path], tmp_path: Path, altered: Alter, family: str, options: dict[str, Any], gone: str
) -> None:
    def without(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items() if gone not in name}

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        source = altered(
            saved[family], tmp_path / str(dtype), options, lambda tensors, dtype=dtype: without(tensors, dtype)
        )
        conversion = read_checkpoint(source)
        assert conversion.narrowed == []
        stored = {tensor.dtype for name, tensor in conversion.tensors.items() if "gate_parameters" not in name}
        assert stored == {dtype}
    assert read_checkpoint(tmp_path / "torch.float16", dtype=torch.bfloat16).narrowed, "neither holds the other"


def test_a_tied_head_is_checked(peer: Any, tmp_path: Path, altered: Alter) -> None:
    torch.manual_seed(0)
    source = peer.save(peer.model("gla", tie_word_embeddings=True, num_hidden_layers=1), tmp_path / "tied")
    assert "head.weight" not in read_checkpoint(source).tensors
    # Some writers store both.
    twice = altered(
        source, tmp_path / "twice", {}, lambda t: t | {"lm_head.weight": t["model.embeddings.weight"].clone()}
    )
    assert read_checkpoint(twice).config.tie_embeddings
    other = altered(source, tmp_path / "other", {}, lambda t: t | {"lm_head.weight": t["model.embeddings.weight"] + 1})
    with pytest.raises(
        ValueError, match=r"lm_head.weight is not model.embeddings.weight, though tie_word_embeddings = true"
    ):
        read_checkpoint(other)
    unsaid = altered(source, tmp_path / "unsaid", {"tie_word_embeddings": ...})
    with pytest.raises(ValueError, match=r"has no lm_head.weight, and tie_word_embeddings is not in its config.json"):
        read_checkpoint(unsaid)
    untied = altered(source, tmp_path / "untied", {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"has no tensor lm_head.weight, which its config.json asks for"):
        read_checkpoint(untied)


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(
    saved: dict[str, Path], tmp_path: Path, altered: Alter
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"there' is already there"):
        convert_checkpoint(saved["gla"], tmp_path / "there")
    broken = altered(saved["gla"], tmp_path / "broken", {"clamp_min": -1.0})
    with pytest.raises(ValueError, match="clamp_min"):
        convert_checkpoint(broken, tmp_path / "ours")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "there"]
    (tmp_path / "empty").mkdir()
    convert_checkpoint(saved["gla"], tmp_path / "empty")
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == ["config.yaml", "model.safetensors"]
