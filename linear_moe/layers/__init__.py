"""Layers: sequence mixers with one memory or many, attention, feed-forwards and what they share."""

from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.auxiliary import collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.layers.feed_forward import SwiGLU
from linear_moe.layers.memory import MemoryLayer
from linear_moe.layers.mixture_of_experts import MixtureOfExperts
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.routing import Router, Routing
from linear_moe.layers.state import MemoryState

__all__ = [
    "AttentionState",
    "MemoryLayer",
    "MemoryState",
    "MixtureOfExperts",
    "MoMLayer",
    "Router",
    "Routing",
    "SoftmaxAttention",
    "SwiGLU",
    "collect_auxiliary_losses",
    "set_auxiliary_scale",
]
