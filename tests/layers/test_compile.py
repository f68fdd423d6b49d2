"""Layers traced into one graph by torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from linear_moe.layers import MemoryLayer, MoMLayer

LAYERS: dict[str, Any] = {
    "a mixture": lambda **options: MoMLayer(16, num_memories=3, top_k=2, num_heads=1, head_dim=8, **options),
    "one memory": lambda **options: MemoryLayer(16, num_heads=1, head_dim=8, **options),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# torch traces its autograd functions so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("rule", "impl"), [("gated_deltanet", "chunked"), ("gla", "chunked"), ("gated_deltanet", "triton")]
)
def test_a_layer_is_one_graph_and_the_same(layer: str, rule: str, impl: str) -> None:
    """Forward and backward; warnings are errors."""
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = LAYERS[layer](rule=rule, impl=impl).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 16, device=device, requires_grad=True)
    seed = torch.randn_like(x)
    learned = [x, *module.parameters()]
    for padded in (False, True):
        mask = (torch.arange(9, device=device) < torch.tensor([[9], [5]], device=device)) if padded else None
        expected, made = (run(x, padding_mask=mask) for run in (module, compiled))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(y, learned, seed) for y in (made, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
