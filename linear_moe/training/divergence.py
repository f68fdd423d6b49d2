"""When training stops making numbers: where it began, and with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.data.batch import Batch
from linear_moe.layers.balance import BalanceBias
from linear_moe.training.distributed import ALONE, World, own_part
from linear_moe.training.files import full_disk_named


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number.

    Attributes:
        step: the step that could not be done, from 1.
        layer: the name of the first module whose output is not finite, or where the gradient first was not; None if every
            output is finite.
        batches: what the step was to learn from.
    """

    def __init__(self, message: str, *, step: int, layer: str | None, batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.step = step
        self.layer = layer
        self.batches = list(batches)


def first_not_finite(model: nn.Module, run: Callable[[], None]) -> str | None:
    """The name of the first module of `model`, in the order of the arithmetic, whose output is not finite while `run()`.

    A module counts when it is done, after those it is made of: the name is that of the smallest part that can be named. The
    model's own output is called "the head".
    """
    found: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(hook_of(name or "the head")) for name, module in model.named_modules()]
    try:
        # To its end even if it is found early: other processes may be waiting for their parts of later layers.
        run()
    finally:
        for hook in hooks:
            hook.remove()
        # The forward above counted loads of a step that was not done.
        for module in model.modules():
            if isinstance(module, BalanceBias):
                module.pending.zero_()
    return found[0] if found else None


def first_bad_gradient(model: nn.Module) -> str | None:
    """The name of the parameter nearest to the loss whose gradient is not finite."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return next((name for name, gradient in reversed(named) if not _finite(gradient)), None)


def first_bad_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter that is not finite itself."""
    return next((name for name, parameter in model.named_parameters() if not _finite(parameter)), None)


def save_batches(error: DivergedError, folder: Path, world: World = ALONE) -> Path:
    """Write this process's batches of a diverged step, and what is known of it, to a file that `torch.load` reads."""
    suffix = f"-rank{world.rank}" if world.size > 1 else ""
    path = folder / f"diverged-step-{error.step:08d}{suffix}.pt"
    content = {
        "step": error.step,
        "layer": error.layer,
        "message": str(error),
        "batches": [batch._asdict() for batch in error.batches],
    }
    with full_disk_named("the batch of a diverged step", folder, str(error)), path.open("wb") as file:
        torch.save(content, file)
    return path


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(own_part(tensor.detach())).all())
