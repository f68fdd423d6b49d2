"""A step of decoding: what a full pass gives, from a state that stays where it is."""

from __future__ import annotations

import pytest
import torch
from hybrids import PATTERNS, model_of

from linear_moe.models import DecodeStep, LanguageModel, decoding


def prompts(batch: int = 3, length: int = 7, device: str = "cpu") -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def read(model: LanguageModel, tokens: torch.Tensor):  # type: ignore[no-untyped-def]
    state = model.new_state(tokens.shape[0])
    with torch.no_grad():
        model.hidden(tokens, state=state)
    return state


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_steps_equal_a_full_pass(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of three columns: a step makes room several times over.
    monkeypatch.setattr(decoding, "RESERVED_COLUMNS", 3)
    model, text = model_of(pattern), prompts(length=15)
    step = DecodeStep(model, read(model, text[:, :7]))
    logits = torch.stack([step(text[:, t]) for t in range(7, 15)], 1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(text)[:, 7:], rtol=0, atol=1e-10)
        # What is released goes on like a state that never was a step's.
        released, plain = step.release(), read(model, text)
        assert released.nbytes == plain.nbytes
        more = prompts(length=2)
        torch.testing.assert_close(model(more, state=released), model(more, state=plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_step_keeps_every_address(pattern: str) -> None:
    """What a captured graph relies on: the step reads and writes the same memory, at the same sizes, every time."""
    model, text = model_of(pattern), prompts()
    step = DecodeStep(model, read(model, text))
    step(text[:, 0])
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in step.state.tensors().items()}
    values = {name: tensor.clone() for name, tensor in step.state.tensors().items()}
    for t in range(1, 5):
        step(text[:, t])
    after = step.state.tensors()
    assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in after.items()} == before
    assert all(not torch.equal(values[name], tensor) for name, tensor in after.items() if name.endswith("tokens_seen"))


def test_pads_touch_no_reserved_column() -> None:
    model, text = model_of(PATTERNS["full"]), prompts(2, 6)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    state = model.new_state(2)
    with torch.no_grad():
        model.hidden(text, padding_mask=mask, state=state)
        step = DecodeStep(model, state)
        batch = torch.stack([step(text[:, t]) for t in range(3)], 1)
        for row in range(2):
            alone = torch.cat((text[row][mask[row]], text[row, :3]))[None]
            torch.testing.assert_close(batch[row], model(alone)[0, -3:], rtol=0, atol=1e-10)


def test_reserved_columns_are_reordered_cloned_and_cut_with_a_state() -> None:
    model, text = model_of(PATTERNS["full"]), prompts(3, 6)
    step = DecodeStep(model, read(model, text))
    step(text[:, 0])
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        expected = model(torch.cat((text, text[:, :2]), 1))[order, -1]
        for state in (step.state.select(order), step.state.clone().select(order), step.release().select(order)):
            got = model(text[order, 1:2], state=state)[:, 0]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_reserved_columns_carry_gradients_and_leave_the_old_state() -> None:
    model, text = model_of(PATTERNS["full"]), prompts(2, 4)
    state = model.new_state(2)
    state.layers[2] = state.layers[2].reserve(6)  # type: ignore[union-attr]
    first = model(text, state=state)
    second = model(text[:, :2], state=state)
    whole = model(torch.cat((text, text[:, :2]), 1))
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-10)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.randn(second.shape, dtype=second.dtype)
    carried = torch.autograd.grad((second * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
    direct = torch.autograd.grad((whole[:, 4:] * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(carried, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="state has 0 reserved columns left, this call has 1 tokens"):
        model(text[:, :1], state=state)


def test_a_graph_needs_a_gpu() -> None:
    model = model_of(PATTERNS["memories"])
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, the state is on cpu"):
        DecodeStep(model, model.new_state(1), capture=True)
    with pytest.raises(ValueError, match="reserve must be at least 1, got 0"):
        DecodeStep(model, model.new_state(1), reserve=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Triton kernel:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_graph_and_eager_write_the_same(pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, logits and state, bit for bit, over several captures."""
    monkeypatch.setattr(decoding, "RESERVED_COLUMNS", 8)
    model = model_of(pattern, dtype=dtype, device="cuda", for_kernels=True)
    text = prompts(device="cuda")
    written = [model.generate(text, max_new_tokens=20, capture=capture) for capture in (True, False)]
    assert torch.equal(*written)
    drawn = [
        model.generate(text, max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3, capture=capture)
        for capture in (True, False)
    ]
    assert torch.equal(*drawn)
    graph, eager = (DecodeStep(model, read(model, text), capture=capture) for capture in (True, False))
    for t in range(12):
        token = text[:, t % text.shape[1]]
        assert torch.equal(graph(token), eager(token)), t
    for name, tensor in eager.release().tensors().items():
        assert torch.equal(graph.release().tensors()[name], tensor), name
