"""Layers: sequence mixers with one memory or many, attention, feed-forwards and what they share."""

from linear_moe.layers.auxiliary import collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.layers.memory import MemoryLayer
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.routing import Router, Routing
from linear_moe.layers.state import MemoryState

__all__ = [
    "MemoryLayer",
    "MemoryState",
    "MoMLayer",
    "Router",
    "Routing",
    "collect_auxiliary_losses",
    "set_auxiliary_scale",
]
