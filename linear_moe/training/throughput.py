"""How fast a run is: tokens a second, and the part of what the device could do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from linear_moe.models.explain import explain
from linear_moe.models.schema import ModelConfig

TRAINING_FLOPS = 3
"""Of a forward pass: the backward is two."""

# TFLOP/s without sparsity, by the makers' data sheets: in bfloat16, and in float32 without tensor cores, which is what torch
# takes for float32 unless told otherwise. The first name that the device's contains counts.
_PEAKS = (
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 35.0),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


class Speed:
    """Tokens a second since the last time it was asked."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted: what is not training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def restart(self) -> float:
        """The speed since the last restart."""
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        return speed


class Utilisation:
    """Model FLOPs utilisation: what the model's arithmetic takes, as a part of the devices' peak.

    The arithmetic is what `linear-moe explain` counts, three times for training; what an implementation does beside it
    (recomputing, the work of a chunked form) does not count.

    Args:
        config: of the model.
        context: tokens of a sequence, for the cost of attention.
        device: to train on.
        precision: "float32" or "bfloat16".
        num_devices: of them.
    """

    def __init__(
        self, config: ModelConfig, context: int, device: torch.device, precision: str, num_devices: int = 1
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name, precision)
        self._peak = None if peak is None else peak * num_devices
        # Counted only where it is of use: that builds the model once more, if without memory.
        self._flops = 0 if peak is None else TRAINING_FLOPS * explain(config, context=context).flops_per_token

    def of(self, tokens_per_second: float) -> float | None:
        """The part of the peak, 0 to 1; None for a device whose peak is not known."""
        return None if self._peak is None else self._flops * tokens_per_second / self._peak


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device in "bfloat16" or "float32"; None if it is not in the table."""
    for name, bfloat16, float32 in _PEAKS:
        if name in device_name:
            return 1e12 * (bfloat16 if precision == "bfloat16" else float32)
    return None
