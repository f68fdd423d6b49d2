"""The shipped configurations: all build, the small ones train as they are and the large ones shrunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml

from linear_moe.layers import MoMLayer
from linear_moe.models import ModelConfig, build_model, load_config, shipped_configs
from linear_moe.models.library import CONFIG_FOLDER

SMALL = ["recall-mom", "recall-single", "recall-wide", "text-hybrid", "text-small"]
LARGE = ["hybrid-mixed-rules", "hybrid-moe", "hybrid-mom-attention", "mom-1.3b", "mom-380m"]
SHRUNK = {"hidden_size": 16, "vocab_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "head_value_dim": 4}
SHRUNK |= {"width": 8, "window": 3}


def shrink(config: ModelConfig) -> ModelConfig:
    """The same kinds of layers, tiny, each block once."""

    def smaller(data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {key: SHRUNK.get(key, smaller(value)) for key, value in data.items()}

    data = smaller(yaml.safe_load(config.to_yaml()))
    assert isinstance(data, dict)
    for block in data["blocks"].values():
        # Where a size is not given, it is the default, which is large.
        block["mixer"] |= {"head_dim": 4}
        if "ratio" in block["ffn"]:
            block["ffn"] = {"type": "swiglu", "width": 8}
    return ModelConfig.from_dict(data | {"layers": " ".join(config.blocks)})


def step(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.randint(config.vocab_size, (2, 12))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_these_are_all() -> None:
    assert shipped_configs() == sorted(SMALL + LARGE)


@pytest.mark.parametrize("name", shipped_configs())
def test_builds_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.description
    assert build_model(config, device="meta").num_parameters() > 0
    assert (CONFIG_FOLDER / f"{name}.yaml").read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_train(name: str) -> None:
    step(load_config(name))


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_train_when_shrunk(name: str) -> None:
    step(shrink(load_config(name)))


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("mom-380m", 545_119_424, 444_062_912), ("mom-1.3b", 1_618_419_904, 1_416_306_880)],
)
def test_the_papers_counts(name: str, parameters: int, active: int) -> None:
    model = build_model(load_config(name), device="meta")
    assert (model.num_parameters(), model.num_active_parameters()) == (parameters, active)


def test_the_balance_weights_are_the_papers_coefficient() -> None:
    for name in ("recall-mom", "text-small", "text-hybrid", "mom-380m", "mom-1.3b", "hybrid-mom-attention"):
        model = build_model(load_config(name), device="meta")
        for _, layer in model.memory_layers():
            expected = 0.01 * layer.top_k / len(model.blocks)
            assert layer.router.balance_weight == pytest.approx(expected, rel=1e-4)


def test_the_recall_study_compares_what_it_says() -> None:
    single, wide, mixture = (build_model(load_config(f"recall-{name}")) for name in ("single", "wide", "mom"))
    assert len(mixture.memory_layers()) == 1

    def numbers(model: torch.nn.Module) -> int:
        """In the states that one token touches."""
        total = 0
        for block in model.blocks:  # type: ignore[union-attr]
            state = block.mixer.new_state(1)
            uses = block.mixer.top_k + 1 if isinstance(block.mixer, MoMLayer) else 1
            total += uses * state.memory[0, 0].numel()
        return total

    assert numbers(wide) == numbers(mixture) == 3 * numbers(single)
