"""The short convolutions of q, k and v, which several families have."""

from __future__ import annotations

from torch import Tensor

from linear_moe.models.convert.family import Weights, constant
from linear_moe.models.convert.options import Options


def conv_width(options: Options) -> int:
    """Taps of the convolution; 1 where there is only the activation.

    Without its convolution the peer still applies SiLU. A single tap of weight 1 is exactly that.
    """
    width = options.integer("conv_size")
    return width if options.truth("use_short_conv") else 1


def take_convs(weights: Weights, options: Options, widths: dict[str, int]) -> dict[str, Tensor]:
    """`[C, W]` of each of q, k and v, of so many channels."""
    taps = conv_width(options)
    if options.truth("use_short_conv"):
        return {name: weights.take_conv(f"{name}_conv1d.weight", width, taps) for name, width in widths.items()}
    return {name: constant(1, width, 1) for name, width in widths.items()}
