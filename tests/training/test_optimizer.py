"""Who is decayed."""

from __future__ import annotations

import pytest
import torch
from small_models import small_config, small_model

from linear_moe.models import build_model
from linear_moe.rules import rule_names
from linear_moe.training.optimizer import build_optimizer, decays, parameter_groups, set_learning_rate
from linear_moe.training.settings import TrainSettings


@pytest.mark.parametrize("rule", ["deltanet", "gated_deltanet", "gla", "linear_attention", "mamba2", "retnet"])
def test_matrices_are_decayed_and_gates_norms_and_biases_are_not(rule: str) -> None:
    assert rule in rule_names()
    model = build_model(small_config(rule=rule, learned_initial_memory=True))
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        plain = "norm" in name or last in ("A_log", "dt_bias", "D") or "bias" in name
        assert decays(name, parameter) == (not plain), name


def test_every_parameter_is_in_one_group() -> None:
    model = small_model(rule="gla")
    groups = parameter_groups(model, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    model.requires_grad_(False)
    assert parameter_groups(model, 0.3) == []


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(small_model(), TrainSettings())
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert isinstance(optimizer, torch.optim.AdamW)
