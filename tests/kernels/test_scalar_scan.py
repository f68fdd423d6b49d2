"""The scalar scan's kernels against the chunked form in float64, and the bugs that this must catch.

On a machine without a GPU they run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import scalar_scan, splits
from linear_moe.rules.base import Tokens
from linear_moe.rules.scan import scan
from linear_moe.testing.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
KINDS = (Decay.NONE, Decay.HEAD, Decay.SCALAR)


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> None:
    assert DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", (
        "tests/conftest.py sets it before triton is imported"
    )


def _draw(
    decay: Decay,
    lengths: list[int],
    heads: int,
    key_heads: int,
    K: int,
    V: int,
    *,
    rate: float,
    dtype: torch.dtype,
    spare: int,
) -> dict[str, Tensor]:
    """Inputs in `dtype`, with `spare` tokens behind the last segment."""
    total = sum(lengths) + spare
    inputs = {
        "q": torch.randn(total, key_heads, K).to(dtype),
        "k": torch.randn(total, key_heads, K).to(dtype),
        "v": torch.randn(total, heads, V).to(dtype),
        "initial_state": torch.randn(len(lengths), heads, K, V),
    }
    if decay is Decay.SCALAR:
        inputs["log_decay"] = -rate * torch.rand(total, heads)
    elif decay is Decay.HEAD:
        inputs["log_decay"] = -rate * torch.rand(heads)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def _run(
    run: Callable[..., tuple[Tensor, Tensor]], decay: Decay, inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of `run` at the inputs, wide ones at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    learned = {
        name: tensor.to(dtype if name in ("q", "k", "v") else wide, copy=True).requires_grad_(
            not (name == "log_decay" and decay is Decay.HEAD)
        )
        for name, tensor in inputs.items()
    }
    output, final_state = run(**learned)
    generator = torch.Generator().manual_seed(1)
    seeds = [
        torch.randn(x.shape, generator=generator).to(x.device, inputs["v"].dtype).to(x.dtype)
        for x in (output, final_state)
    ]
    wanted = {name: tensor for name, tensor in learned.items() if tensor.requires_grad}
    # Without a token the output depends on nothing.
    made = [(result, seed) for result, seed in zip((output, final_state), seeds, strict=True) if result.requires_grad]
    results, seeds = zip(*made, strict=True)
    gradients = torch.autograd.grad(results, list(wanted.values()), seeds, allow_unused=True, materialize_grads=True)
    return {"output": output, "final_state": final_state} | dict(zip(wanted, gradients, strict=True))


def check_against_chunked(
    kernels: Any, decay: Decay, lengths: list[int], heads: int = 1, key_heads: int = 1, K: int = 16, V: int = 16, *,
    rate: float = 1.0, dtype: torch.dtype = torch.float32, spare: int = 0,
) -> None:  # fmt: skip
    """The kernel's outputs and gradients are within the error budget."""
    inputs = _draw(decay, lengths, heads, key_heads, K, V, rate=rate, dtype=dtype, spare=spare)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, log_decay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = kernels.scalar_scan(
            q, k, v, log_decay, decay=decay, scale=K**-0.5, initial_state=initial_state, cu_seqlens=cu_seqlens,
            max_length=q.shape[0],
        )  # fmt: skip
        return result

    def chunked(
        q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, log_decay: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        gate = log_decay[None] if log_decay is not None and log_decay.dim() == 2 else log_decay
        result = scan(
            Tokens(q[None], k[None], v[None], gate), form=Recurrence(decay), step=lambda state, token: (state, token.v),
            scale=K**-0.5, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=True, impl="chunked",
        )  # fmt: skip
        assert result.final_state is not None
        return result.output[0], result.final_state

    exact = _run(chunked, decay, inputs, torch.float64)
    reference, candidate = _run(chunked, decay, inputs, dtype), _run(kernel, decay, inputs, dtype)
    assert_within_budget(candidate, reference, exact, dtype)


@pytest.mark.parametrize("decay", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6 if DEVICE == "cpu" else 30)
@given(data=st.data())
def test_drawn_shapes_are_within_the_budget(decay: Decay, dtype: torch.dtype, data: st.DataObject) -> None:
    largest = 40 if DEVICE == "cpu" else 500
    check_against_chunked(
        scalar_scan,
        decay,
        data.draw(st.lists(st.integers(0, largest), min_size=1, max_size=4), label="lengths"),
        *data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]), label="heads"),
        K=data.draw(st.integers(1, 24 if DEVICE == "cpu" else 256), label="K"),
        V=data.draw(st.integers(1, 40 if DEVICE == "cpu" else 256), label="V"),
        rate=data.draw(st.sampled_from([0.0, 0.05, 1.0, 13.8]), label="rate"),
        spare=data.draw(st.integers(0, 5), label="spare"),
        dtype=dtype,
    )


@pytest.mark.parametrize("decay", KINDS)
def test_splits_change_nothing(decay: Decay, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    original = splits.cut
    monkeypatch.setattr(scalar_scan, "cut", lambda *arguments: pieces.append(original(*arguments)) or pieces[-1])
    monkeypatch.setattr(scalar_scan, "_num_processors", lambda device: 8)
    check_against_chunked(scalar_scan, decay, [0, 150, 1, 33], heads=1, K=16, V=16)
    assert pieces, "the case was meant to be split"
    assert pieces[0].num_pieces > 4


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    length=st.integers(1, 30),
    spare=st.integers(0, 7),
)
def test_pieces_cover_every_segment_once(lengths: list[int], length: int, spare: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    result = splits.cut(cu_seqlens, sum(lengths) + spare, length)
    first = result.first.tolist()
    assert first[-1] <= result.num_pieces
    for segment, size in enumerate(lengths):
        pieces = result.borders[first[segment] : first[segment + 1]].tolist()
        assert len(pieces) == max(1, -(-size // length))
        covered = [token for start, stop in pieces for token in range(start, stop)]
        assert covered == list(range(int(cu_seqlens[segment]), int(cu_seqlens[segment + 1])))
    assert all(start == stop for start, stop in result.borders[first[-1] :].tolist())


@pytest.mark.parametrize("decay", KINDS)
def test_same_bits_twice_and_poison_changes_nothing(decay: Decay) -> None:
    inputs = _draw(decay, [20, 0, 37], 2, 1, 8, 12, rate=1.0, dtype=torch.float32, spare=3)
    cu_seqlens = torch.tensor([0, 20, 20, 57]).to(DEVICE)

    def kernel(log_decay: Tensor | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        return scalar_scan.scalar_scan(
            **tensors, log_decay=log_decay, decay=decay, scale=1.0, cu_seqlens=cu_seqlens, max_length=40
        )

    once = _run(kernel, decay, inputs, torch.float32)
    twice = _run(kernel, decay, inputs, torch.float32)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    for name in ("q", "k", "v"):
        inputs[name][57:] = torch.nan
    if decay is Decay.SCALAR:
        inputs["log_decay"][57:] = torch.nan
    poisoned = _run(kernel, decay, inputs, torch.float32)
    assert all(torch.equal(once[name][:57], poisoned[name][:57]) for name in once)
    assert not poisoned["output"][57:].any()


SEEDED_BUGS = {
    "a mask dropped": (
        "valid = row < size\n        token = start + row\n        k_mask",
        "valid = row < size + 2\n        token = start + row\n        k_mask",
    ),
    "a causal mask dropped": ("products = tl.where(seen, products, 0.0)", "products = products"),
    "a stride swapped": ("token * V_HEADS + v_head", "token + v_head * V_HEADS"),
    "decay off by one position": ("from_start = tl.exp(summed", "from_start = tl.exp(summed - summed / (rows + 1)"),
    "a split's carry lost": (
        "state = tl.exp(total) * state + tl.load(increments",
        "state = 0.0 * state + tl.load(increments",
    ),
    "the decay's gradient one token late": ("tl.cumsum(amount, 0) - amount", "tl.cumsum(amount, 0)"),
}


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path) -> None:
    right, wrong = SEEDED_BUGS[bug]
    source = Path(scalar_scan.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1
    # A module of its own: triton reads a kernel's source from its file.
    file = tmp_path / "seeded.py"
    file.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"seeded_{abs(hash(bug))}", file)
    assert spec is not None
    assert spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = seeded
    spec.loader.exec_module(seeded)
    seeded._num_processors = lambda device: 8
    with pytest.raises(AssertionError, match="over the error budget"):
        check_against_chunked(seeded, Decay.SCALAR, [70, 90, 5], heads=2, K=16, V=16, spare=2)
