"""Laws of the chunked form: it is the recurrence, whatever the lengths, the decays and the cuts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules import chunked as module
from linear_moe.rules.base import RuleOutput, Tokens
from linear_moe.rules.chunked import decayed_products
from linear_moe.rules.scan import scan

FORMS = [Recurrence(decay, erase) for decay, erase in itertools.product(Decay, Erase)]
HEADS, K, V = 2, 6, 5
CHUNK = module.SHORTEST_CHUNK
DECAYS_A_TOKEN = (0.999, 0.5, 1e-6)

every_form = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.fixture(params=["looking", "not looking"])
def looking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the products inside a chunk: the second is the only one on a GPU."""
    if request.param == "not looking":
        monkeypatch.setattr(module, "SAFE_EXPONENT", -1.0)


def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
    """The recurrence of `linear_moe.forms` for any form."""
    if token.log_decay is not None:
        state = token.log_decay.exp()[..., None] * state
    value = token.v
    if token.beta is not None:
        value = token.beta[..., None] * (value - (token.k[..., None, :] @ state).squeeze(-2))
    state = state + token.k[..., :, None] * value[..., None, :]
    return state, (token.q[..., None, :] @ state).squeeze(-2)


def draw(
    form: Recurrence, batch: int, length: int, *, decay: float = 0.9, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tokens:
    """Random tokens whose decays lie between `decay` and 1; a decay below 0.01 is had by every token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes: dict[Decay, tuple[int, ...]] = {
        Decay.HEAD: (HEADS,),
        Decay.SCALAR: (batch, length, HEADS),
        Decay.VECTOR: (batch, length, HEADS, K),
    }
    log_decay = None
    if form.decay is not Decay.NONE:
        share = torch.rand(shapes[form.decay], generator=generator, dtype=dtype)
        log_decay = torch.tensor(decay, dtype=dtype).log() * (0.9 + 0.1 * share if decay < 0.01 else share)
    beta = 2 * torch.rand(batch, length, HEADS, generator=generator, dtype=dtype) if form.erase is Erase.DELTA else None
    q, k = normal(batch, length, HEADS, K), normalize(normal(batch, length, HEADS, K), dim=-1)
    return Tokens(q, k, normal(batch, length, HEADS, V), log_decay, beta)


def state_of(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, HEADS, K, V, generator=torch.Generator().manual_seed(7), dtype=dtype)


def run(
    form: Recurrence, tokens: Tokens, state: Tensor, impl: str = "chunked", cu_seqlens: Tensor | None = None
) -> RuleOutput:
    return scan(
        tokens,
        form=form,
        step=step,
        scale=0.7,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        return_final_state=True,
        impl=impl,
    )


def assert_same(got: RuleOutput, expected: RuleOutput, tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_form
@pytest.mark.parametrize("length", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 130, 1000])
@pytest.mark.usefixtures("looking")
def test_is_the_recurrence(form: Recurrence, length: int) -> None:
    batch = 1 if length == 1000 else 2
    tokens, state = draw(form, batch, length), state_of(batch)
    assert_same(run(form, tokens, state), run(form, tokens, state, "recurrent"))


@every_form
@pytest.mark.parametrize("decay", DECAYS_A_TOKEN)
@pytest.mark.usefixtures("looking")
def test_is_the_recurrence_at_every_decay_in_float32(form: Recurrence, decay: float) -> None:
    tokens, state = draw(form, 2, 70, decay=decay, dtype=torch.float32), state_of(2, torch.float32)
    assert_same(run(form, tokens, state), run(form, tokens, state, "recurrent"), 2e-4)


@every_form
@pytest.mark.parametrize("borders", [[0, 0, 5, 70, 70, 135, 136, 136], [0, 1, 33, 100], [0, 136]], ids=str)
@pytest.mark.usefixtures("looking")
def test_packed_is_the_recurrence_with_tokens_past_the_last_border(form: Recurrence, borders: list[int]) -> None:
    tokens, cu_seqlens, state = draw(form, 1, 140), torch.tensor(borders), state_of(len(borders) - 1)
    got = run(form, tokens, state, cu_seqlens=cu_seqlens)
    assert_same(got, run(form, tokens, state, "recurrent", cu_seqlens))
    assert torch.equal(got.output[:, borders[-1] :], torch.zeros_like(got.output[:, borders[-1] :]))
    empty = cu_seqlens.diff() == 0
    assert got.final_state is not None and torch.equal(got.final_state[empty], state[empty])


@every_form
@pytest.mark.parametrize("borders", [None, [0, 40, 40, 111]], ids=["dense", "packed"])
@pytest.mark.parametrize("numbers", [1, 3 * CHUNK * HEADS * V, 2**17])
@pytest.mark.usefixtures("looking")
def test_parts_that_share_a_workspace_change_no_result(
    form: Recurrence, borders: list[int] | None, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens = None if borders is None else torch.tensor(borders)
    tokens, state = draw(form, 2 if borders is None else 1, 111), state_of(2 if borders is None else 3)
    whole, given = run(form, tokens, state, cu_seqlens=cu_seqlens), state.clone()
    monkeypatch.setattr(module, "NUMBERS_A_PART", numbers)
    with torch.no_grad():
        got = run(form, tokens, state, cu_seqlens=cu_seqlens)
        first = [x.clone() for x in got if x is not None]
        run(form, tokens._replace(v=-tokens.v), state, cu_seqlens=cu_seqlens)
    assert_same(got, whole)
    assert torch.equal(state, given)
    assert all(torch.equal(x, y) for x, y in zip(first, got, strict=True)), "a later call wrote into an earlier result"


@every_form
@pytest.mark.parametrize("decay", DECAYS_A_TOKEN)
@pytest.mark.parametrize("length", [70, 170])
@pytest.mark.parametrize("numbers", [3 * 2 * CHUNK * HEADS * V, 2**17], ids=["runs", "one run"])
@pytest.mark.usefixtures("looking")
def test_is_the_recurrence_at_every_decay_where_nothing_is_recorded(
    form: Recurrence, decay: float, length: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decays that stay in range through a run, that end close to where it does (0.5 a token, 170 tokens), and that leave it."""
    tokens, state = draw(form, 2, length, decay=decay, dtype=torch.float32), state_of(2, torch.float32)
    monkeypatch.setattr(module, "NUMBERS_A_PART", numbers)
    with torch.no_grad():
        got = run(form, tokens, state)
        doubles = tokens._replace(**{name: x.double() for name, x in tokens._asdict().items() if isinstance(x, Tensor)})
        expected = run(form, doubles, state.double(), "recurrent")
    assert_same(RuleOutput(*(x.double() for x in got if x is not None)), expected, 2e-4)


@every_form
@pytest.mark.usefixtures("looking")
def test_square_states_share_a_workspace(form: Recurrence, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is K wide and what is V wide has one shape."""
    tokens, state = draw(form, 2, 70), state_of(2)[..., :1].expand(-1, -1, -1, K).contiguous()
    tokens = tokens._replace(v=tokens.q.flip(1))
    monkeypatch.setattr(module, "NUMBERS_A_PART", 2 * 2 * CHUNK * HEADS * K)
    with torch.no_grad():
        assert_same(run(form, tokens, state), run(form, tokens, state, "recurrent"))


def leaves(tokens: Tokens, state: Tensor) -> tuple[list[Tensor], Callable[..., tuple[Tokens, Tensor]]]:
    """The tensors to differentiate by, and the way back from them to tokens and state."""
    names = [name for name in ("q", "k", "v", "log_decay", "beta") if getattr(tokens, name) is not None]
    tensors = [getattr(tokens, name).detach().requires_grad_() for name in names] + [state.detach().requires_grad_()]
    return tensors, lambda *x: (tokens._replace(**dict(zip(names, x, strict=False))), x[-1])


@every_form
@pytest.mark.parametrize("borders", [None, [0, 2, 2, 17, 18]], ids=["dense", "packed"])
@pytest.mark.usefixtures("looking")
def test_gradcheck(form: Recurrence, borders: list[int] | None) -> None:
    cu_seqlens = None if borders is None else torch.tensor(borders)
    tensors, rebuild = leaves(draw(form, 1, 18, decay=0.5), state_of(1 if borders is None else 4))

    def outputs(*x: Tensor) -> tuple[Tensor, Tensor]:
        result = run(form, *rebuild(*x), cu_seqlens=cu_seqlens)
        assert result.final_state is not None
        return result.output, result.final_state

    assert torch.autograd.gradcheck(outputs, tensors, fast_mode=True)


@every_form
@pytest.mark.parametrize("decay", DECAYS_A_TOKEN)
@pytest.mark.usefixtures("looking")
def test_gradients_are_those_of_the_recurrence_in_float32(form: Recurrence, decay: float) -> None:
    tensors, rebuild = leaves(draw(form, 1, 40, decay=decay, dtype=torch.float32), state_of(1, torch.float32))

    def gradients(impl: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = run(form, *rebuild(*inputs), impl)
        assert result.final_state is not None
        return torch.autograd.grad(result.output.sin().sum() + result.final_state.cos().sum(), inputs)

    doubles = [x.detach().double().requires_grad_() for x in tensors]
    for got, expected in zip(gradients("chunked", tensors), gradients("recurrent", doubles), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@every_form
@pytest.mark.parametrize("decay", DECAYS_A_TOKEN)
@pytest.mark.usefixtures("looking")
def test_no_gradient_from_a_later_token(form: Recurrence, decay: float) -> None:
    tokens, seen = draw(form, 1, 40, decay=decay, dtype=torch.float32), 21
    tensors, rebuild = leaves(tokens, state_of(1, torch.float32))
    output = run(form, *rebuild(*tensors)).output
    for tensor, gradient in zip(tensors[:-1], torch.autograd.grad(output[:, :seen].sum(), tensors)[:-1], strict=True):
        if tensor.dim() > 1:  # a decay constant per head belongs to no token
            assert torch.equal(gradient[:, seen:], torch.zeros_like(gradient[:, seen:]))


@pytest.mark.parametrize("log_decay", [-0.01, -2.0, -6.0, -13.8])
@pytest.mark.usefixtures("looking")
def test_decayed_products_are_their_definition(log_decay: float) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randn(3, 32, K, generator=generator, dtype=torch.float64) for _ in range(2))
    decays = (log_decay * torch.rand(3, 32, K, generator=generator, dtype=torch.float64)).cumsum(-2)
    faded = (decays[:, :, None] - decays[:, None]).clamp_max(0).exp()
    expected = torch.einsum("ntc,njc,ntjc->ntj", rows, columns, faded).tril()
    torch.testing.assert_close(decayed_products(rows, columns, decays), expected, rtol=1e-12, atol=1e-12)


def test_a_large_decay_beside_small_ones_stays_finite() -> None:
    """One row of a chunk forgets everything: factors about it would overflow."""
    form = Recurrence(Decay.VECTOR)
    tokens, state = draw(form, 1, 48, decay=0.99, dtype=torch.float32), state_of(1, torch.float32)
    assert tokens.log_decay is not None
    tokens.log_decay[:, 20] = -200.0
    assert_same(run(form, tokens, state), run(form, tokens, state, "recurrent"), 1e-4)
