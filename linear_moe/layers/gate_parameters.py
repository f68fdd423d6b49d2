"""The parameters of a rule that are no projections: decays, time biases, skips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.layers.precision import HALF_DTYPES, KeepsFloat32
from linear_moe.rules.base import Parameter


class GateParameters(KeepsFloat32):
    """A rule's own parameters, one for all memories or stacked `[M + shared, ...]`.

    Those declared `fp32` stay float32 when the module is cast to a 16-bit dtype.
    """

    def __init__(
        self,
        declared: Mapping[str, Parameter],
        num_memories: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.declared = dict(declared)
        self.num_memories = num_memories
        for name, spec in self.declared.items():
            shape = (num_memories, *spec.shape) if spec.per_memory else spec.shape
            wide = spec.fp32 and (dtype or torch.get_default_dtype()) in HALF_DTYPES
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32 if wide else dtype))
            self.register_parameter(name, parameter)
        self._mark()
        self.reset_parameters()

    def _mark(self) -> None:
        """Say on each parameter whether it decays, for the optimiser's grouping. Moves and copies drop attributes."""
        for name, spec in self.declared.items():
            self.get_parameter(name).no_weight_decay = not spec.weight_decay  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateParameters:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each as its rule declares; per memory, each memory's own."""
        for name, spec in self.declared.items():
            parameter = self.get_parameter(name)
            if parameter.is_meta:
                continue
            if spec.per_memory:
                parameter.copy_(torch.stack([spec.init(spec.shape) for _ in range(self.num_memories)]))
            else:
                parameter.copy_(spec.init(spec.shape))

    def of_slots(self, memory_of_slots: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Each parameter by name; those per memory as a row a slot, whose memories `[B, R]` are asked for if there are any."""
        stacked = any(spec.per_memory for spec in self.declared.values())
        memory = memory_of_slots() if stacked else None
        return {
            name: self.get_parameter(name)[memory] if spec.per_memory else self.get_parameter(name)
            for name, spec in self.declared.items()
        }

    def _stays_wide(self, name: str) -> bool:
        return self.declared[name].fp32

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(self.get_parameter(name).shape)}" for name in self.declared)
