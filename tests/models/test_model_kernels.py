"""A model whose blocks run on kernels, against the same model in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.kernels import block_parts
from linear_moe.layers.feed_forward import SwiGLU
from linear_moe.layers.residual_norm import ResidualNorm
from linear_moe.models import LanguageModel, ModelConfig, build_model
from linear_moe.testing.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = """\
hidden_size: 32
vocab_size: 11
blocks:
  mixture: {mixer: {type: mom, num_heads: 2, head_dim: 16, num_memories: 3}, ffn: {type: swiglu, width: 24}}
  one: {mixer: {type: memory, num_heads: 2, head_dim: 16}, ffn: {type: swiglu, width: 24}}
  bound: {mixer: {type: memory, num_heads: 1, head_dim: 16, conv_scope: sequence}, ffn: {type: none}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: moe, num_experts: 3, width: 16}}
  far: {mixer: {type: attention, num_heads: 2}, ffn: {type: none}}
"""
EVERY = "mixture one near far"


def build(layers: str, impl: str, dtype: torch.dtype = torch.float32, **options: Any) -> LanguageModel:
    """The same weights for every `impl` and `dtype`."""
    torch.manual_seed(0)
    used = ("hidden_size", "vocab_size", "blocks", *layers.split())
    lines = [line for line in TEXT.splitlines() if line.split(":")[0].strip() in used]
    model = build_model(ModelConfig.from_yaml("\n".join([*lines, f"layers: {layers}"])), impl=impl, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        elif parameter.numel() == 32:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(DEVICE, dtype)


def measured(model: LanguageModel, tokens: Tensor, **given: Any) -> dict[str, Tensor]:
    """Logits and all gradients of one loss."""
    logits = model(tokens, **given)
    seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradients = torch.autograd.grad(logits, list(model.parameters()), seed.to(logits.dtype))
    names = [name for name, _ in model.named_parameters()]
    return {"logits": logits.detach()} | dict(zip(names, gradients, strict=True))


def check(layers: str, tokens: Tensor, autocast: torch.dtype | None = None, **given: Any) -> None:
    """Kernels are within the budget of PyTorch's, all in float32 or, but for those of the mixers, under autocast."""

    def run(impl: str) -> dict[str, Tensor]:
        if autocast is None:
            return measured(build(layers, impl).train(), tokens, **given)
        model = build(layers, "chunked").train()
        for module in model.modules():
            if isinstance(module, (ResidualNorm, SwiGLU)):
                module.impl = impl
        with torch.autocast(DEVICE, autocast):
            return measured(model, tokens, **given)

    candidate, reference = run("triton"), run("chunked")
    exact = measured(build(layers, "chunked", torch.float64).train(), tokens, **given)
    # A parameter's gradient is a sum over tokens of either sign: its rounding is that of the largest gradient.
    largest = max(float(value.abs().max()) for value in exact.values())
    terms = {name: torch.full((1,), largest, dtype=torch.float64) for name in exact}
    assert_within_budget(candidate, reference, exact, autocast or torch.float32, terms)


def draw(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_forward_and_backward() -> None:
    check(EVERY, draw())


def test_pads_and_documents() -> None:
    tokens = draw(2, 5)
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool, device=DEVICE)
    check("mixture near", tokens, padding_mask=mask)
    borders = torch.tensor([0, 2, 2, 5], device=DEVICE)
    for bound in (None, 3):
        check("mixture near", tokens[:1], cu_seqlens=borders, max_length=bound)


HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@pytest.mark.parametrize("layers", ["one far", "far one"])
def test_under_autocast(layers: str) -> None:
    """Without a router: a rounding would send a token elsewhere in one of them."""
    check(layers, draw(), HALF)


def test_under_autocast_the_stream_is_wide_and_the_branches_are_not() -> None:
    model = build(f"{EVERY} bound", "triton").train()
    seen: dict[str, list[torch.dtype]] = {}

    def look(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            seen[name] = [x.dtype for x in outputs]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, ResidualNorm) or name.endswith((".mixer", ".ffn")):
            module.register_forward_hook(look(name))
    with torch.autocast(DEVICE, HALF):
        logits = model(draw(1, 3))
        gradients = torch.autograd.grad(logits.float().logsumexp(-1).sum(), list(model.parameters()))
    assert logits.dtype == HALF and all(x.dtype == torch.float32 for x in gradients)
    assert all(x.isfinite().all() for x in gradients)
    assert len(seen) == 9 + 8
    for name, dtypes in seen.items():
        assert dtypes == ([torch.float32, HALF] if "norm" in name else [HALF]), name


def test_gradient_checkpointing_changes_no_bit() -> None:
    model, tokens = build("mixture", "triton").train(), draw(1, 3)
    expected = measured(model, tokens)
    for block in model.blocks:
        block.gradient_checkpointing = True
    made = measured(model, tokens)
    assert all(torch.equal(made[name], x) for name, x in expected.items())


@torch.no_grad()
def test_prefill_and_decoding_are_the_whole() -> None:
    model, tokens = build("mixture near", "triton").eval(), draw(2, 5)
    state = model.new_state(2)
    parts = [model(tokens[:, begin:end], state=state) for begin, end in ((0, 3), (3, 4), (4, 5))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that left them would pass every comparison above."""
    called: list[str] = []
    for name in ("add_and_norm", "gated_unit"):
        original = getattr(block_parts, name)
        monkeypatch.setattr(block_parts, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1])
    build("mixture far", "triton")(draw())
    assert sorted(called) == ["add_and_norm"] * 4 + ["gated_unit"]
    called.clear()
    build("mixture far", "chunked")(draw())
    assert not called


def test_a_stream_that_is_too_wide_for_the_kernel_is_normed_all_the_same() -> None:
    norm = ResidualNorm(8193, 1e-5, impl="triton", device=DEVICE)
    x = torch.randn(1, 8193, device=DEVICE)
    summed, normed = norm(x, x)
    torch.testing.assert_close(summed, 2 * x)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(2 * x, (8193,), norm.weight, 1e-5))


@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_a_block_returns_no_view(impl: str) -> None:
    """FSDP2 hangs its hooks on what a block returns, and warns that those of a view can be lost."""
    model = build("mixture near", impl).train()
    returned: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: returned.extend(x._is_view() for x in output))
    model(draw(1, 3))
    assert returned == [False] * 4
