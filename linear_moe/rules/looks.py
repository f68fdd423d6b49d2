"""Where a look at a tensor's values is free."""

from __future__ import annotations

import torch


def may_look(device: torch.device) -> bool:
    """On a CPU, but not while a graph is traced: it must serve other values too. On a GPU a look waits for the device."""
    return device.type == "cpu" and not torch.compiler.is_compiling()
