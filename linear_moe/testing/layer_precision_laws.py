"""The layer laws of 16 bits: a layer in bfloat16 and a layer under autocast, against the definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.layers.mom import MoMLayer
from linear_moe.testing.laws import Case, Law, require, require_finite, require_same_bits
from linear_moe.testing.layer_cases import dense_input, gradients, mixture, present
from linear_moe.testing.mom_reference import mom_reference

EPS = torch.finfo(torch.bfloat16).eps


def _require_within_budget(layer: MoMLayer, x: Tensor, output: Tensor, what: str) -> None:
    """error(layer) <= 2 (error(definition in bfloat16) + eps max |definition in float64|), as root mean squares.

    Not by the worst element, as kernels are held: the output norm divides by the size of the reads, and where they nearly
    cancel, the worst elements of two ways of rounding have nothing to do with each other.
    """
    if not x.numel():
        return
    exact = mom_reference(layer, x).output.detach()
    rounded = mom_reference(layer, x, dtype=torch.bfloat16).output.detach()
    error, allowed = (
        _rms(output.detach().double() - exact),
        _rms(rounded.double() - exact) + EPS * float(exact.abs().amax()),
    )
    require(error <= 2 * allowed, f"{what} is off by {error:.3g} (root mean square), allowed {2 * allowed:.3g}")


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _bfloat16(case: Case) -> None:
    layer = mixture(case).to(torch.bfloat16)
    x = dense_input(case).to(torch.bfloat16).requires_grad_()
    state = layer.new_state(x.shape[0])
    output = layer(x, state=state)
    require(output.dtype == torch.bfloat16, f"the output of a bfloat16 layer is {output.dtype}")
    require(state.memory.dtype == torch.float32, f"the memory of a bfloat16 layer is {state.memory.dtype}")
    assert layer.routing is not None
    require(layer.routing.weights.dtype == torch.float32, f"routing weights are {layer.routing.weights.dtype}")
    _require_within_budget(layer, x, output, "the output in bfloat16")
    for name, gradient in present(gradients(layer, x, output.float().square().sum())).items():
        require_finite(f"gradient of {name}", gradient)


def _autocast(case: Case) -> None:
    layer = mixture(case).float()
    x = dense_input(case).float().requires_grad_()
    plain = layer(x)
    assert layer.routing is not None
    weights, indices = layer.routing.weights, layer.routing.indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        require_same_bits("routing weights under autocast", layer.routing.weights, weights)
        require_same_bits("picks under autocast", layer.routing.indices, indices)
        with torch.no_grad():
            state = layer.new_state(x.shape[0])
            layer(x, state=state)
            layer(x[:, :1], state=state)
    require(output.dtype == plain.dtype, f"the output under autocast is {output.dtype}, the input {x.dtype}")
    _require_within_budget(layer, x, output, "the output under autocast")
    for name, gradient in present(gradients(layer, x, output.square().sum())).items():
        require_finite(f"gradient of {name} under autocast", gradient)
        require(gradient.dtype == torch.float32, f"the gradient of {name} under autocast is {gradient.dtype}")


PRECISION_LAWS: list[Law] = [
    Law("layer-bfloat16", "in bfloat16 a layer is as near its definition as the definition in bfloat16 is", _bfloat16),
    Law("layer-autocast", "autocast leaves the router its bits and the layer near its definition", _autocast),
]
