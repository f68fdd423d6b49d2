"""The layers never wait for the device: no `.item()`, no data-dependent shape, no transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linear_moe import MemoryLayer, MoMLayer, rule_names
from linear_moe.layers.mixture_of_experts import MixtureOfExperts

OPTIONS: list[dict[str, Any]] = [
    {},
    {"memory_projections": "shared", "query_projection": "memory", "conv_scope": "sequence", "num_value_heads": 4},
    {"router_score": "sigmoid", "top_k": 1, "balance_bias_rate": 0.1, "learned_initial_memory": True},
    {"shared_memory": False, "z_loss_weight": 0.1},
]
PARAMETERS = [
    pytest.param(rule, options, id=f"{rule}-{i}") for rule in rule_names() for i, options in enumerate(OPTIONS)
]
SIZES = {"num_heads": 2, "head_dim": 16}
D = 32

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Triton kernel:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


class OnTheDeviceOnly(TorchDispatchMode):
    """Refuses an operation on a tensor of the host that has a size: on a GPU it would be a transfer."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim()), (
                f"{func} touches the host"
            )
        return result


def exercise(layer: MoMLayer | MemoryLayer, draw: Callable[..., Tensor], device: str) -> None:
    """Training on dense, padded and packed input, prefill, decoding, and truncated backpropagation."""
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    borders = torch.arange(0, 28, 9, device=device, dtype=torch.int32)
    x = draw(2, 20, D).requires_grad_()
    layer(x, padding_mask=mask).sum().backward()
    layer(draw(1, 27, D).requires_grad_(), cu_seqlens=borders).sum().backward()
    state = layer.new_state(2)
    layer(x, state=state)
    layer(x, state=state.detach()).sum().backward()
    if isinstance(layer, MoMLayer):
        layer.update_balance_bias()
    with torch.no_grad():
        state = layer.new_state(2)
        layer(x, state=state)
        layer(x[:, :1], state=state.select(torch.zeros(2, dtype=torch.int64, device=device)))


@pytest.mark.parametrize("rule, options", PARAMETERS)
def test_nothing_is_read_back_on_meta(rule: str, options: dict[str, Any]) -> None:
    """A meta tensor has a shape and no values: whatever would wait for a GPU's values raises there."""
    layer = MoMLayer(D, rule, device="meta", **SIZES | options)
    with OnTheDeviceOnly():
        exercise(layer, lambda *shape: torch.empty(*shape, device="meta"), "meta")


@pytest.mark.parametrize("rule", rule_names())
def test_the_token_loop_reads_nothing_back_on_meta(rule: str) -> None:
    layer = MoMLayer(D, rule, impl="recurrent", device="meta", **SIZES)
    with OnTheDeviceOnly():
        exercise(layer, lambda *shape: torch.empty(*shape, device="meta"), "meta")


@pytest.mark.parametrize("rule", rule_names())
def test_one_memory_reads_nothing_back_on_meta(rule: str) -> None:
    layer = MemoryLayer(D, rule, device="meta", **SIZES)
    with OnTheDeviceOnly():
        exercise(layer, lambda *shape: torch.empty(*shape, device="meta"), "meta")


EXPERTS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 1, "num_shared_experts": 1, "router_score": "sigmoid", "balance_bias_rate": 0.1},
    {"top_k": 3, "z_loss_weight": 0.1},
]


def exercise_experts(layer: MixtureOfExperts, draw: Callable[..., Tensor], device: str) -> None:
    """Training on dense and padded input, and evaluation."""
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    for padding_mask in (None, mask):
        layer(draw(2, 20, D).requires_grad_(), padding_mask=padding_mask).sum().backward()
    layer.update_balance_bias()
    with torch.no_grad():
        layer(draw(2, 1, D))


@pytest.mark.parametrize("options", EXPERTS, ids=str)
def test_experts_read_nothing_back_on_meta(options: dict[str, Any]) -> None:
    layer = MixtureOfExperts(D, num_experts=4, width=16, device="meta", **options)
    with OnTheDeviceOnly():
        exercise_experts(layer, lambda *shape: torch.empty(*shape, device="meta"), "meta")


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: x + torch.arange(3).to("meta"),
    ],
)
def test_what_would_wait_raises_on_meta(offence: Callable[[Tensor], object]) -> None:
    x = torch.empty(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OnTheDeviceOnly():
        offence(x)


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule, options", PARAMETERS)
def test_nothing_waits_for_the_gpu(rule: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = MoMLayer(D, rule, device="cuda", dtype=dtype, **SIZES | options)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    # Once without: libraries wait once for themselves when first used.
    exercise(layer, draw, "cuda")
    with sync_is_an_error():
        exercise(layer, draw, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, impl", [(torch.float32, "triton"), (torch.bfloat16, "auto"), (torch.bfloat16, "chunked")]
)
@pytest.mark.parametrize("options", EXPERTS, ids=str)
def test_experts_do_not_wait_for_the_gpu(options: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    layer = MixtureOfExperts(D, num_experts=4, width=16, impl=impl, device="cuda", dtype=dtype, **options)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    # Once without: libraries wait once for themselves when first used.
    exercise_experts(layer, draw, "cuda")
    with sync_is_an_error():
        exercise_experts(layer, draw, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule, options", PARAMETERS)
def test_a_captured_graph_replays_on_new_input(rule: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = MoMLayer(D, rule, device="cuda", dtype=dtype, **SIZES | options).eval()
    with torch.no_grad():
        x, state = torch.randn(2, 20, D, device="cuda", dtype=dtype), layer.new_state(2)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x, state=state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x, state=state)
        replayed, eager = layer.new_state(2), layer.new_state(2)
        for name, tensor in state.tensors().items():
            tensor.copy_(replayed.tensors()[name])
        # Other picks, other lengths: two calls, the second from the state that the first left.
        for _ in range(2):
            x.copy_(torch.randn_like(x) * 3)
            graph.replay()
            assert torch.equal(captured, layer(x, state=eager))
        for name, tensor in eager.tensors().items():
            assert torch.equal(state.tensors()[name], tensor), name
