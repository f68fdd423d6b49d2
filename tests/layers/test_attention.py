"""Softmax attention: equal to its definition, however the text is padded, packed, split or decoded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.layers import attention
from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.rules.transforms import rotary

SHAPES = [
    {"num_heads": 2},
    {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 3},
    {"num_heads": 2, "num_kv_heads": 1, "window": 1},
]
LENGTHS = (5, 0, 7, 1)
EXACT = {"rtol": 0, "atol": 1e-12}


def make(**options: int) -> SoftmaxAttention:
    layer = SoftmaxAttention(8, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def definition(layer: SoftmaxAttention, x_TD: Tensor) -> Tensor:
    """The attention of one sequence, token by token."""
    width = layer.num_heads * layer.head_dim
    kv_width = layer.num_kv_heads * layer.head_dim
    q, k, v = (x_TD @ layer.qkv_proj.weight.T).split([width, kv_width, kv_width], -1)
    positions = torch.arange(len(x_TD))
    q = rotary(q.unflatten(-1, (-1, layer.head_dim)), positions)
    k = rotary(k.unflatten(-1, (-1, layer.head_dim)), positions)
    v = v.unflatten(-1, (-1, layer.head_dim))
    rows = []
    for t in range(len(x_TD)):
        first = 0 if layer.window is None else max(0, t + 1 - layer.window)
        heads = []
        for head in range(layer.num_heads):
            shared = head * layer.num_kv_heads // layer.num_heads
            scores = k[first : t + 1, shared] @ q[t, head] / layer.head_dim**0.5
            heads.append(torch.softmax(scores, 0) @ v[first : t + 1, shared])
        rows.append(torch.cat(heads) @ layer.out_proj.weight.T)
    return torch.stack(rows) if rows else x_TD


def texts() -> list[Tensor]:
    return [torch.randn(length, 8, dtype=torch.float64) for length in LENGTHS]


def pad(parts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Padded with NaN: what stands at a pad must not matter."""
    longest = max(len(part) for part in parts)
    x = torch.full((len(parts), longest, 8), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(parts), longest, dtype=torch.bool)
    for row, part in enumerate(parts):
        start = longest - len(part) if side == "left" else 0
        x[row, start : start + len(part)] = part
        mask[row, start : start + len(part)] = True
    return x, mask


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition(shape: dict[str, int]) -> None:
    layer = make(**shape)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    expected = torch.stack([definition(layer, row) for row in x])
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_the_sequences_alone(shape: dict[str, int], side: str) -> None:
    layer, parts = make(**shape), texts()
    x, mask = pad(parts, side)
    output = layer(x, padding_mask=mask)
    for row, part in enumerate(parts):
        torch.testing.assert_close(output[row, mask[row]], definition(layer, part), **EXACT)
    assert bool((output[~mask] == 0).all())
    output.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("carried", [False, True])
def test_packed_documents_equal_the_sequences_alone(shape: dict[str, int], carried: bool) -> None:
    layer, parts = make(**shape), texts()
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    state = layer.new_state(len(parts)) if carried else None
    wanted = torch.cat([definition(layer, part) for part in parts])
    for bound in (None, max(LENGTHS)):
        given = None if state is None else state.clone()
        output = layer(torch.cat(parts)[None], cu_seqlens=borders, max_length=bound, state=given)
        torch.testing.assert_close(output[0], wanted, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_packed_documents_are_those_of_the_sequences_alone(shape: dict[str, int]) -> None:
    layer, lengths = make(**shape), (4, 6, 0, 4, 1, 6)
    x = torch.randn(1, sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    weights, inputs = torch.randn(sum(lengths), 8, dtype=torch.float64), [*layer.parameters(), x]
    packed = layer(x, cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]))[0]
    alone = torch.cat([layer(part[None])[0] for part in x[0].split(lengths)])
    torch.testing.assert_close(packed, alone, **EXACT)
    got, expected = (torch.autograd.grad((output * weights).sum(), inputs) for output in (packed, alone))
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_packed_document_costs_what_it_costs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made of no two tokens of different documents; those of one length are made in one call."""
    calls = []
    right = attention.F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append((q.shape[0], q.shape[2], k.shape[2]))
        return right(q, k, *rest, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    borders = torch.tensor([0, 3, 10, 13, 16, 23])
    make(num_heads=2, window=5)(torch.randn(1, 23, 8, dtype=torch.float64), cu_seqlens=borders)
    assert sorted(calls) == [(2, 7, 7), (3, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [(0, 1, 9), (0, 4, 5, 9), tuple(range(10))])
@pytest.mark.parametrize("training", [False, True])
def test_any_split_equals_one_pass(shape: dict[str, int], cuts: tuple[int, ...], training: bool) -> None:
    layer = make(**shape)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    whole = layer(x)
    state = layer.new_state(2)
    with torch.set_grad_enabled(training):
        pieces = [layer(x[:, start:stop], state=state) for start, stop in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert state.tokens_seen.tolist() == [9, 9]
    if training:
        (gradient,) = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), layer.qkv_proj.weight)
        (expected,) = torch.autograd.grad(whole.square().sum(), layer.qkv_proj.weight)
        torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prefill_and_decoding_equal_one_pass(shape: dict[str, int], side: str) -> None:
    layer, parts = make(**shape), texts()
    more = torch.randn(len(parts), 4, 8, dtype=torch.float64)
    x, mask = pad(parts, side)
    state = layer.new_state(len(parts))
    with torch.no_grad():
        layer(x, padding_mask=mask, state=state)
        steps = torch.cat([layer(more[:, t : t + 1], state=state) for t in range(4)], 1)
    assert state.tokens_seen.tolist() == [length + 4 for length in LENGTHS]
    for row, part in enumerate(parts):
        expected = definition(layer, torch.cat((part, more[row])))[len(part) :]
        torch.testing.assert_close(steps[row], expected, **EXACT)


def test_packed_documents_are_continued() -> None:
    layer, parts = make(**SHAPES[1]), texts()
    state = layer.new_state(len(parts))
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    with torch.no_grad():
        layer(torch.cat(parts)[None], cu_seqlens=borders, state=state)
        more = torch.randn(1, 6, 8, dtype=torch.float64)
        output = layer(more, cu_seqlens=torch.tensor([0, 2, 3, 3, 6]), state=state)
    expected = [
        definition(layer, torch.cat((part, more[0, start:stop])))[len(part) :]
        for part, (start, stop) in zip(parts, [(0, 2), (2, 3), (3, 3), (3, 6)], strict=True)
    ]
    torch.testing.assert_close(output[0], torch.cat(expected), **EXACT)


def test_the_cache_of_a_window_keeps_its_size_and_its_storage() -> None:
    layer = make(**SHAPES[1])
    state = layer.new_state(2)
    size, storage = state.nbytes, state.keys.data_ptr()
    with torch.no_grad():
        for length in (1, 2, 9, 1):
            layer(torch.randn(2, length, 8, dtype=torch.float64), state=state)
    assert (state.nbytes, state.keys.data_ptr()) == (size, storage)
    assert state.keys.shape[1] == layer.window
    assert state.positions[0].tolist() == [10, 11, 12]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_future_gives_no_gradient(shape: dict[str, int]) -> None:
    layer = make(**shape)
    x = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, :4].sum(), x)
    assert bool((gradient[:, 4:] == 0).all())
    assert bool((gradient[:, 3] != 0).any())


def test_a_state_is_reordered_cloned_and_cut() -> None:
    layer = make(**SHAPES[0])
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    state = layer.new_state(3)
    layer(x[:, :4], state=state)
    order = torch.tensor([2, 0, 2])
    picked = state.select(order).detach()
    assert not picked.keys.requires_grad
    copy = picked.clone()
    with torch.no_grad():
        output = layer(x[order, 4:], state=picked)
    torch.testing.assert_close(output, layer(x)[order, 4:], **EXACT)
    assert (copy.num_columns, picked.num_columns, state.batch_size) == (4, 5, 3)
    assert state.nbytes == sum(tensor.nbytes for tensor in state.tensors().values())
    assert copy.nbytes - layer.new_state(3).nbytes == 3 * 4 * copy.bytes_per_column


def test_low_precision() -> None:
    x = torch.randn(2, 6, 8)
    full = SoftmaxAttention(8, 2, num_kv_heads=1)
    with torch.autocast("cpu", torch.bfloat16):
        state = full.new_state(2)
        mixed = torch.cat([full(x[:, :4], state=state), full(x[:, 4:], state=state)], 1)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full(x), rtol=0.05, atol=1e-4)
    half = full.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert full(x[:, :0].bfloat16()).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"num_heads": 3}, "num_heads must divide hidden_size = 8"),
        ({"num_heads": 8}, "head_dim must be even"),
        ({"num_heads": 2, "window": 0}, "window must be at least 1"),
        ({"num_heads": 2, "rope_base": 1.0}, "rope_base must be above 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxAttention(8, **options)


def test_bad_input_is_named() -> None:
    layer = SoftmaxAttention(8, 2, window=4)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="hidden_size = 8 channels"):
        layer(x[..., :4])
    with pytest.raises(ValueError, match="the layer's dtype"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"state\.keys must be \[B, columns"):
        layer(x, state=layer.new_state(3))
    with pytest.raises(ValueError, match="state belongs to SoftmaxAttention 1, this is SoftmaxAttention 0"):
        layer(x, state=SoftmaxAttention(8, 2, layer_index=1).new_state(2))
    with pytest.raises(ValueError, match="window = 4 columns, got 0"):
        layer(x, state=SoftmaxAttention(8, 2).new_state(2))
    with pytest.raises(ValueError, match="state must be one of class AttentionState"):
        layer(x, state=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        layer.new_state(0)


@torch.no_grad()
def test_a_sequence_over_the_limit_is_refused() -> None:
    layer = make(num_heads=2, max_length=5)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    message = (
        "SoftmaxAttention 0 takes sequences of at most max_length = 5 tokens, got one of 6, those before this call"
    )
    with pytest.raises(ValueError, match=message):
        layer(x)
    # Pads are no tokens, and documents are counted one by one.
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 0] = False
    assert layer(x, padding_mask=mask).shape == x.shape
    assert layer(x[:1], cu_seqlens=torch.tensor([0, 1, 6])).shape == x[:1].shape
    with pytest.raises(ValueError, match="got one of 6"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 0, 6]))
    state = layer.new_state(2)
    layer(x[:, :4], state=state)
    with pytest.raises(ValueError, match="got one of 6"):
        layer(x[:, 4:], state=state)
    assert state.tokens_seen.tolist() == [4, 4]
    layer(x[:, 4:5], state=state)
    with pytest.raises(ValueError, match="max_length must be at least 1, or None for no limit, got 0"):
        make(num_heads=2, max_length=0)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [None, 130])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("shape", [{"num_heads": 2}, {"num_heads": 4, "num_kv_heads": 2}])
def test_on_a_gpu_packed_documents_take_the_flash_kernels(
    shape: dict[str, int], window: int | None, bound: int | None
) -> None:
    """Within rounding of float64, and what is in no document touches nothing."""
    torch.manual_seed(0)
    exact = SoftmaxAttention(64, **shape, window=window).double()
    layer = SoftmaxAttention(64, **shape, window=window, device="cuda", dtype=torch.bfloat16)
    layer.load_state_dict({name: tensor.bfloat16() for name, tensor in exact.state_dict().items()})
    exact.load_state_dict({name: tensor.double().cpu() for name, tensor in layer.state_dict().items()})
    borders = torch.tensor([0, 7, 7, 8, 40, 170])
    x = torch.randn(1, 180, 64).bfloat16()
    seed = torch.randn(1, 170, 64).bfloat16()
    fast = x.cuda().requires_grad_()
    output = layer(fast, cu_seqlens=borders.cuda(), max_length=bound)
    assert (output[:, 170:] == 0).all()
    garbage = torch.full((1, 10, 64), 1e4, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(output[:, :170], [fast, *layer.parameters()], seed.cuda())
    wide = x[:, :170].double().requires_grad_()
    wanted = exact(wide, cu_seqlens=borders)
    expected = torch.autograd.grad(wanted, [wide, *exact.parameters()], seed.double())
    came = [output[:, :170], gradients[0][:, :170], *gradients[1:]]
    for got, right in zip(came, [wanted, *expected], strict=True):
        error = (got.double().cpu() - right).norm() / right.norm()
        assert error < 0.02
    other = torch.cat((x[:, :170], garbage), 1).cuda().requires_grad_()
    again = layer(other, cu_seqlens=borders.cuda(), max_length=bound)[:, :170]
    for got, right in zip(
        torch.autograd.grad(again, list(layer.parameters()), seed.cuda()), gradients[1:], strict=True
    ):
        assert torch.isfinite(got).all() and torch.equal(got, right)
