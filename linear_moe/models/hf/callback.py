"""What `Trainer` has to do for a model beside minimising its loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from linear_moe.layers.balance import BalanceBias


class BalanceBiasCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the selection biases of routers with a `balance_bias_rate` after each optimiser step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by `Trainer`."""
        for part in model.modules():
            if isinstance(part, BalanceBias):
                part.update_balance_bias()
