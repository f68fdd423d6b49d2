"""AdamW, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from linear_moe.training.distributed import ALONE, World, like, whole_tensors
from linear_moe.training.settings import TrainSettings


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is decayed: matrices are; norms, biases and what a rule declares without decay are not.

    A mixture stacks one vector a memory to a matrix: its biases are told by their name.
    """
    if parameter.dim() < 2 or getattr(parameter, "no_weight_decay", False):
        return False
    return not any(part == "bias" or part.endswith("_bias") for part in name.split("."))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The model's trainable parameters as AdamW takes them: decayed and not."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters; one kernel for all of them, which small models gain from."""
    groups = parameter_groups(model, settings.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it in every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE) -> dict[str, Any]:
    """What the optimiser has gathered, by the names of the model's parameters: `{parameter: {"exp_avg": tensor, ...}}`.

    Whole tensors: of a sharded model all processes must ask, and the main one gets them.
    """
    named = ((name, optimizer.state.get(parameter)) for name, parameter in model.named_parameters())
    return {name: whole_tensors(state, world) for name, state in named if state}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` gave, to the optimiser of a model that is sharded in any way or not at all.

    Raises:
        ValueError: if it belongs to another model.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(saved.keys() - parameters.keys())
    if unknown:
        raise ValueError(f"the optimiser's state names {unknown[0]!r}, which the model does not have")
    places = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    content = optimizer.state_dict()
    content["state"] = {
        places[parameters[name]]: {key: like(value, parameters[name]) for key, value in values.items()}
        for name, values in saved.items()
    }
    optimizer.load_state_dict(content)
