"""Kernels that are compiled side by side before the first call of their kind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")

from seeding import in_the_interpreter

from linear_moe import MoMLayer
from linear_moe.kernels import compile_ahead, mixing, operator, router_operator
from linear_moe.kernels.launch import FUSION, compiling, launch_kernel


class Kernel:
    """Keeps what is done to it, in place of a compiled kernel."""

    params = ()

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def warmup(self, *arguments: Any, **options: Any) -> None:
        self.compiled.append((arguments, options))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


def test_a_launch_is_compiled_and_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, x = Kernel(), torch.zeros(3)
    with compiling():
        launch_kernel(kernel, 5, x, 7, num_warps=4)
        assert kernel.compiled == [((x, 7), {"grid": (5,), "num_warps": 4} | FUSION)] and not kernel.launched
        # What others look up has to be there.
        launch_kernel(kernel, 2, x, 8)
    assert kernel.launched == [((2,), (x, 8), FUSION)]
    launch_kernel(kernel, 5, x, 7, num_warps=4)
    assert len(kernel.launched) == 2 and len(kernel.compiled) == 1


def test_an_error_ends_the_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="of the pass"), compiling():
        raise ValueError("of the pass")
    kernel = Kernel()
    launch_kernel(kernel, 1, 3, num_warps=4)
    assert kernel.launched and not kernel.compiled


def test_each_kind_is_gone_through_once_and_none_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(compile_ahead, "_seen", set())
    gpu, done = torch.device("cuda", 0), []
    capturing = True
    compile_ahead.compile_ahead(gpu, "a", lambda: done.append("captured"))
    capturing = False
    for device, key in ((torch.device("cpu"), "a"), (gpu, "a"), (gpu, "a"), (gpu, "b"), (torch.device("cuda", 1), "a")):
        compile_ahead.compile_ahead(device, key, lambda key=key: done.append(key))  # type: ignore[misc]
    assert done == ["a", "b", "a"]


def mixture() -> MoMLayer:
    return MoMLayer(16, num_memories=3, num_heads=2, head_dim=8, impl="triton")


@in_the_interpreter
def test_a_layers_operators_go_through_both_passes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they go through is complete, changes nothing, and is no part of autograd's graph."""
    layer = mixture()
    x = torch.randn(2, 5, 16)

    def gradients() -> list[torch.Tensor]:
        output = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), [*layer.parameters()])]

    wanted, gone_through = gradients(), []

    def go(device: torch.device, key: Any, passes: Callable[[], object]) -> None:
        with warnings.catch_warnings():
            # Numbers that nothing has made yet overflow.
            warnings.simplefilter("ignore", RuntimeWarning)
            passes()
        gone_through.append(key._schema.name.removeprefix("linear_moe::"))

    for module in (operator, router_operator, mixing):
        monkeypatch.setattr(module, "compile_ahead", go)
    for made, same in zip(gradients(), wanted, strict=True):
        assert torch.equal(made, same)
    assert gone_through == ["route", "slot_plan", "slot_convs", "combine"]


# torch traces its autograd functions so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@in_the_interpreter
def test_a_trace_compiles_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are fake, and it may be the first that happens to an operator."""
    layer = mixture()
    x = torch.randn(2, 5, 16)
    wanted = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
    passes: list[Any] = []
    for module in (operator, router_operator):
        monkeypatch.setattr(module, "compile_ahead", lambda *arguments: passes.append(arguments))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for made, same in zip(torch.autograd.grad(compiled(x).square().sum(), [*layer.parameters()]), wanted, strict=True):
        torch.testing.assert_close(made, same)
    assert not passes
    torch._dynamo.reset()


def printed(code: str, cache: Path) -> list[str]:
    """The words that code prints in a fresh process, with what was compiled before in `cache` alone."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.gpu
def test_a_layers_backward_kernels_are_compiled_before_its_forward_pass_ends(tmp_path: Path) -> None:
    code = """
import torch, triton
from linear_moe import MoMLayer
compiled = []
triton.knobs.compilation.listener = lambda **event: compiled.append(event["metadata"]["name"])
layer = MoMLayer(256, num_heads=2, head_dim=64, device="cuda", dtype=torch.bfloat16)
output = layer(torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True))
forward = list(compiled)
output.sum().backward()
print(len(forward), *compiled[len(forward):])
"""
    first, *later = printed(code, tmp_path)
    assert int(first) >= 20
    assert not [name for name in later if name.endswith("backward_kernel")]


FIRST_CALL = """
import torch, triton
from linear_moe import ops
compiled = []
triton.knobs.compilation.listener = lambda **event: compiled.append(event["metadata"]["name"])
torch.manual_seed(0)
def draw(*shape):
    return torch.randn(2, 300, 2, *shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
q, k, v = draw(WIDTH), draw(WIDTH), draw(WIDTH)
gates = {
    "retnet": lambda: (), "linear_attention": lambda: (),
    "gla": lambda: (-draw(WIDTH).float().detach().abs().requires_grad_(),),
    "gated_deltanet": lambda: (-draw().float().detach().abs().requires_grad_(), draw().sigmoid().detach().requires_grad_()),
}["RULE"]()
output = ops.RULE(q, torch.nn.functional.normalize(k, dim=-1), v, *gates, impl="triton").output
forward = list(compiled)
output.backward(torch.randn_like(output))
print(len(forward), *compiled[len(forward):])
"""


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rule", ["retnet", "linear_attention", "gla", "gated_deltanet"])
def test_a_backward_pass_compiles_nothing_of_its_own(rule: str, width: int, tmp_path: Path) -> None:
    """But small kernels, which are run as they are come to."""
    code = FIRST_CALL.replace("RULE", rule).replace("WIDTH", str(width))
    first, *later = printed(code, tmp_path)
    assert int(first) >= 3
    assert not later
