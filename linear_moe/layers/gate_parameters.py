"""The parameters of a rule that are no projections: decays, time biases, skips."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linear_moe.rules.base import Parameter

_HALVES = (torch.float16, torch.bfloat16)


class GateParameters(nn.Module):
    """A rule's own parameters, one for all memories or stacked `[M + shared, ...]`.

    Those declared `fp32` stay float32 when the module is cast to a 16-bit dtype: a decay of 0.999 has no bfloat16.
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
            wide = spec.fp32 and (dtype or torch.get_default_dtype()) in _HALVES
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32 if wide else dtype))
            # Read by the optimiser's grouping.
            parameter.no_weight_decay = not spec.weight_decay  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.reset_parameters()

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

    def of_slots(self, memory: Tensor) -> dict[str, Tensor]:
        """Each parameter by name, those per memory as one row a slot, `memory` `[B, R]` being each slot's memory."""
        return {
            name: self.get_parameter(name)[memory] if spec.per_memory else self.get_parameter(name)
            for name, spec in self.declared.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateParameters:
        kept = {id(self._parameters[name]) for name, spec in self.declared.items() if spec.fp32}
        kept |= {id(p.grad) for p in self._parameters.values() if p is not None and id(p) in kept and p.grad is not None}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = id(tensor) in kept and result.dtype in _HALVES and tensor.dtype not in _HALVES
            return tensor.to(result.device) if narrowed else result

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(self.get_parameter(name).shape)}" for name in self.declared)
