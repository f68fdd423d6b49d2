"""Weights in: checkpoints in the format of flash-linear-attention, read as models of ours."""

from linear_moe.models.convert.conversion import Conversion, convert_checkpoint, read_checkpoint
from linear_moe.models.convert.families import FAMILIES

__all__ = ["FAMILIES", "Conversion", "convert_checkpoint", "read_checkpoint"]
