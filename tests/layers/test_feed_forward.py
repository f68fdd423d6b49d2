"""SwiGLU: its definition and its width."""

from __future__ import annotations

import pytest
import torch

from linear_moe.layers.feed_forward import SwiGLU, swiglu_width


@pytest.mark.parametrize(
    ("hidden_size", "ratio", "width"), [(1024, 3, 2048), (2048, 4, 5632), (1024, 4, 2816), (64, 1, 256)]
)
def test_the_width_is_that_of_the_published_settings(hidden_size: int, ratio: float, width: int) -> None:
    assert swiglu_width(hidden_size, ratio) == width


def test_equals_its_definition() -> None:
    layer = SwiGLU(6, width=5, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = layer.in_proj.weight.chunk(2)
    inner = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(layer(x), inner @ layer.out_proj.weight.T, rtol=0, atol=1e-14)


def test_default_width_and_repr() -> None:
    assert repr(SwiGLU(96)).startswith("SwiGLU(\n  hidden_size=96, width=256")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 3.0, "width": 8}, r"ratio and width were both given \(3.0 and 8\)"),
        ({"ratio": 0.0}, "ratio must be above 0, got 0.0"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwiGLU(8, **options)  # type: ignore[arg-type]
