"""The contracts of the ops: what they take, what they return, and what they say of input that doesn't fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import ops
from linear_moe.ops import RuleOutput

B, T, H, K, V = 2, 5, 3, 4, 6

Op = Callable[..., RuleOutput]


def arguments(name: str, dtype: torch.dtype = torch.float32, heads: int = H) -> dict[str, Tensor]:
    """Fitting tensors of an op, by name, in its order."""
    q, k, v = (torch.randn(B, T, *shape, dtype=dtype) for shape in ((heads, K), (heads, K), (H, V)))
    log_decay, beta = -torch.rand(B, T, H), torch.rand(B, T, H)
    if name == "mamba2":
        return {"C": q, "B": k, "x": v, "dt": torch.rand(B, T, H), "A": -torch.rand(H), "D": torch.randn(H)}
    gates = {
        "linear_attention": {},
        "retnet": {},
        "gla": {"log_decay": -torch.rand(B, T, H, K)},
        "deltanet": {"beta": beta},
        "gated_deltanet": {"log_decay": log_decay, "beta": beta},
    }
    return {"q": q, "k": k, "v": v} | gates[name]


NAMES = [name for name in ops.__all__ if name != "RuleOutput"]
every_op = pytest.mark.parametrize("name", NAMES)


@every_op
def test_tensors_by_position_and_the_rest_by_name(name: str) -> None:
    op: Op = getattr(ops, name)
    tensors = arguments(name)
    by_position, by_name = op(*tensors.values()), op(**tensors)
    assert isinstance(by_position, RuleOutput)
    assert torch.equal(by_position.output, by_name.output)
    keywords = [p for p in inspect.signature(op).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in keywords if p.name != "normalize"] == [
        "scale",
        "initial_state",
        "cu_seqlens",
        "return_final_state",
        "impl",
    ]
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in (op.__doc__ or "")


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    result = getattr(ops, name)(**arguments(name, dtype), return_final_state=True)
    assert result.output.shape == (B, T, H, V)
    assert result.output.dtype == dtype
    assert result.final_state.shape == (B, H, K, V)
    assert result.final_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_op
def test_the_final_state_comes_when_asked_for(name: str) -> None:
    assert getattr(ops, name)(**arguments(name)).final_state is None


@every_op
def test_no_initial_state_is_one_of_zeros(name: str) -> None:
    tensors, zeros = arguments(name), torch.zeros(B, H, K, V)
    op: Op = getattr(ops, name)
    assert torch.equal(op(**tensors).output, op(**tensors, initial_state=zeros).output)


@every_op
def test_the_scale_multiplies_reads(name: str) -> None:
    """K^-0.5 unless given, and 1 for mamba2."""
    op: Op = getattr(ops, name)
    tensors = arguments(name, torch.float64)
    if name == "mamba2":
        tensors["D"] = torch.zeros(H)
    usual = op(**tensors).output
    torch.testing.assert_close(op(**tensors, scale=1 if name == "mamba2" else K**-0.5).output, usual)
    torch.testing.assert_close(op(**tensors, scale=3.0).output, usual * (3 if name == "mamba2" else 3 * K**0.5))


@every_op
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_documents_are_separate(name: str, integers: torch.dtype) -> None:
    op: Op = getattr(ops, name)
    tensors = arguments(name)
    alone = op(**tensors, return_final_state=True)
    packed = {n: x.reshape(1, B * T, *x.shape[2:]) if x.dim() > 1 else x for n, x in tensors.items()}
    together = op(**packed, cu_seqlens=torch.tensor([0, T, 2 * T], dtype=integers), return_final_state=True)
    torch.testing.assert_close(together.output.reshape(alone.output.shape), alone.output)
    torch.testing.assert_close(together.final_state, alone.final_state)


@every_op
@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
def test_nothing_in_nothing_out(name: str, shape: tuple[int, int]) -> None:
    tensors = {n: x.new_zeros(*shape, *x.shape[2:]) if x.dim() > 1 else x for n, x in arguments(name).items()}
    state = torch.randn(shape[0], H, K, V)
    result = getattr(ops, name)(**tensors, initial_state=state, return_final_state=True)
    assert result.output.shape == (*shape, H, V)
    assert torch.equal(result.final_state, state)


@pytest.mark.parametrize("name", ["gla", "mamba2", "gated_deltanet"])
def test_the_arguments_are_left_alone(name: str) -> None:
    tensors = arguments(name) | {"initial_state": torch.randn(B, H, K, V)}
    before = {n: x.clone() for n, x in tensors.items()}
    getattr(ops, name)(**tensors, return_final_state=True)
    for n, x in tensors.items():
        assert torch.equal(x, before[n]), n


def test_more_value_heads_than_key_heads() -> None:
    tensors = arguments("gla", heads=1)
    repeated = tensors | {n: tensors[n].expand(B, T, H, K) for n in ("q", "k")}
    torch.testing.assert_close(ops.gla(**tensors).output, ops.gla(**repeated).output)


def _bad(name: str, message: str, *, key: str | None = None, **changes: Any) -> Any:
    words = key or "-".join(changes)
    return pytest.param(name, changes, message, id=f"{name}-{words}")


def _one(value: float, *last: int) -> Tensor:
    """Zeros `[B, T, H, *last]` but for one number."""
    tensor = torch.zeros(B, T, H, *last)
    tensor.view(-1)[7] = value
    return tensor


BAD_INPUT = [
    _bad("gla", r"q must be \[B, T, heads, dim\], got shape \[5, 3, 4\]", q=torch.zeros(T, H, K)),
    _bad(
        "gla",
        r"k must be shaped like q, \[B, T, H, K\] = \[2, 5, 3, 4\], got .*\[2, 4, 3, 4\]",
        k=torch.zeros(B, 4, H, K),
    ),
    _bad("gla", r"v must be \[B, T, H, V\] with B, T = 2, 5, got shape \[1, 5, 3, 6\]", v=torch.zeros(1, T, H, V)),
    _bad("gla", r"v must have a multiple of q's 3 heads, got 4", v=torch.zeros(B, T, 4, V)),
    _bad(
        "gla",
        r"q must be of dtype float64, float32, bfloat16, float16, got torch\.int64",
        q=torch.zeros(B, T, H, K).long(),
    ),
    _bad(
        "gla", r"v must have the dtype of q, torch\.float32, got torch\.bfloat16", v=torch.zeros(B, T, H, V).bfloat16()
    ),
    _bad("gla", r"v must be on the device of q, cpu, got meta", v=torch.zeros(B, T, H, V, device="meta"), key="device"),
    _bad(
        "gla",
        r"log_decay must be \[B, T, H, K\] = \[2, 5, 3, 4\], got shape \[2, 5, 3\]",
        log_decay=torch.zeros(B, T, H),
    ),
    _bad("gla", r"log_decay must be at most 0 .* got 0\.5", log_decay=torch.full((B, T, H, K), 0.5), key="above 0"),
    _bad("gla", r"log_decay must be at most 0 and finite .* got nan", log_decay=_one(torch.nan, K), key="nan"),
    _bad("gla", r"log_decay must be at most 0 and finite .* got -inf", log_decay=_one(-torch.inf, K), key="inf"),
    _bad("gated_deltanet", r"log_decay must be at most 0 and finite .* got nan", log_decay=_one(torch.nan), key="nan"),
    _bad("gla", r"log_decay must be of dtype .* got torch\.int64", log_decay=torch.zeros(B, T, H, K).long(), key="int"),
    _bad("gated_deltanet", r"log_decay must be \[B, T, H\] = \[2, 5, 3\], got", log_decay=torch.zeros(B, T, H, K)),
    _bad(
        "gated_deltanet",
        r"log_decay must be at most 0 .* got 0\.1",
        log_decay=torch.full((B, T, H), 0.1),
        key="above 0",
    ),
    _bad("gated_deltanet", r"beta must be \[B, T, H\] = \[2, 5, 3\], got shape \[2, 5, 1\]", beta=torch.zeros(B, T, 1)),
    _bad("deltanet", r"beta must be \[B, T, H\] = \[2, 5, 3\], got shape \[2, 3, 5\]", beta=torch.zeros(B, H, T)),
    _bad("mamba2", r"x must be \[B, T, H, V\], got shape \[5, 3, 6\]", x=torch.zeros(T, H, V)),
    _bad("mamba2", r"dt must be \[B, T, H\] = \[2, 5, 3\], got shape \[2, 5\]", dt=torch.zeros(B, T)),
    _bad("mamba2", r"A must be \[H\] = \[3\], got shape \[4\]", A=torch.zeros(4)),
    _bad("mamba2", r"D must be \[H\] = \[3\], got shape \[1\]", D=torch.zeros(1)),
    _bad(
        "mamba2", r"x must have a multiple of C's 2 heads, got 3", C=torch.zeros(B, T, 2, K), B=torch.zeros(B, T, 2, K)
    ),
    _bad("mamba2", r"B must be shaped like C", B=torch.zeros(B, T, H, K + 1)),
    _bad("linear_attention", r"impl must be one of auto, triton, chunked, recurrent, got 'cuda'", impl="cuda"),
    _bad(
        "linear_attention",
        r"impl='triton' can't run here: .*; available: auto, chunked, recurrent",
        key="triton",
        impl="triton",
        **{name: x.double() for name, x in arguments("linear_attention").items()},
    ),
    _bad(
        "linear_attention",
        r"initial_state must be \[N, H, K, V\] = \[2, 3, 4, 6\], got shape \[3, 3, 4, 6\]",
        initial_state=torch.zeros(3, H, K, V),
    ),
    _bad("retnet", r"q and v need at least one channel a head, got K = 4, V = 0", v=torch.zeros(B, T, H, 0)),
    _bad("retnet", r"packed input \(cu_seqlens\) must have B = 1, got B = 2", cu_seqlens=torch.tensor([0, 5])),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD_INPUT)
def test_bad_input_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    """The argument, what came, and what is allowed."""
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**arguments(name) | changes)


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([1, 5], r"cu_seqlens must start at 0, got 1"),
        ([0, 3, 2, 5], r"cu_seqlens must not fall, got cu_seqlens\[1\] = 3 before cu_seqlens\[2\] = 2"),
        ([0, 4], r"cu_seqlens must end at T = 5, got 4"),
        ([0, 6], r"cu_seqlens must end at T = 5, got 6"),
        ([0], r"cu_seqlens must be int32 or int64 of shape \[N \+ 1\] with N >= 1, got torch\.int64 of shape \[1\]"),
        ([0.0, 5.0], r"cu_seqlens must be int32 or int64 .* got torch\.float32"),
        ([[0, 5]], r"cu_seqlens must be int32 or int64 of shape .* got torch\.int64 of shape \[1, 2\]"),
    ],
)
def test_bad_borders_are_named(borders: list[Any], message: str) -> None:
    q, k, v = (torch.zeros(1, 5, 1, 2) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(q, k, v, cu_seqlens=torch.tensor(borders))


def test_a_state_for_each_document() -> None:
    q, k, v = (torch.zeros(1, 5, 1, 2) for _ in range(3))
    with pytest.raises(ValueError, match=r"initial_state must be .* = \[3, 1, 2, 2\], got shape \[1, 1, 2, 2\]"):
        ops.linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 2, 2, 5]), initial_state=torch.zeros(1, 1, 2, 2))
