"""What linear attention's paper (2006.16236) fixes: feature maps, and the normaliser that makes reads averages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import ops
from linear_moe.rules import LinearAttention, RuleDims
from linear_moe.rules.scan import scan

DIMS = RuleDims(hidden_size=8, num_heads=2, num_value_heads=4, head_dim=3, head_value_dim=5)


@pytest.mark.parametrize(
    ("name", "expected"), [("identity", lambda x: x), ("relu", F.relu), ("elu", lambda x: F.elu(x) + 1)]
)
def test_feature_maps(name: str, expected: Callable[[Tensor], Tensor]) -> None:
    q, k = torch.randn(2, 1, 9, 2, 3).double()
    mapped = LinearAttention(DIMS, feature_map=name).qk_transform(q, k, torch.arange(9)[None])
    torch.testing.assert_close(mapped[0], expected(q))
    torch.testing.assert_close(mapped[1], expected(k))


def test_a_normalised_read_is_an_average_of_the_values() -> None:
    """Eq. 9: sum_j f(q_t) f(k_j) v_j / sum_j f(q_t) f(k_j), token by token."""
    rule = LinearAttention(DIMS, feature_map="elu", normalize=True)
    raw = {name: torch.randn(1, 20, spec.width).double() for name, spec in rule.projections().items()}
    tokens = rule.tokens(raw, {}, torch.arange(20)[None])
    result = scan(
        tokens,
        form=rule.form,
        step=rule.step,
        scale=rule.scale,
        state_shape=rule.state_shape(),
        return_final_state=True,
    )
    output = rule.output(result.output, tokens, {})
    q, k = ((F.elu(raw[name]) + 1).unflatten(-1, (2, 3)).repeat_interleave(2, 2) for name in "qk")
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), raw["v"].unflatten(-1, (4, 5)))
    # The divisor has 1e-6 added.
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert output.shape == (1, 20, 4, 5)
    assert rule.state_shape() == (3, 6)
    assert result.final_state is not None
    # The last column counts: the sum of all keys.
    torch.testing.assert_close(result.final_state[0, ..., -1], k[0].sum(0))


def test_the_ops_normaliser_is_the_rules() -> None:
    rule = LinearAttention(DIMS, feature_map="elu", normalize=True)
    raw = {name: torch.randn(1, 20, spec.width).double() for name, spec in rule.projections().items()}
    tokens = rule.tokens(raw, {}, torch.arange(20)[None])
    reads = scan(tokens, form=rule.form, step=rule.step, scale=rule.scale, state_shape=rule.state_shape()).output
    v = raw["v"].unflatten(-1, (4, 5))
    output = ops.linear_attention(tokens.q, tokens.k, v, normalize=True).output
    torch.testing.assert_close(output, rule.output(reads, tokens, {}))


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    naive = fla("linear_attn").naive_recurrent_linear_attn
    tensors = {name: torch.randn(2, 40, 3, width).double() for name, width in (("q", 4), ("k", 4), ("v", 5))}
    tensors["initial_state"] = torch.randn(2, 3, 4, 5).double()
    same_as_fla(
        lambda **x: ops.linear_attention(**x, return_final_state=True, impl=impl),
        lambda q, k, v, initial_state: naive(q, k, v, initial_state=initial_state, output_final_state=True),
        tensors,
    )


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_normalised_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    naive = fla("linear_attn").naive_recurrent_linear_attn
    positive = {"q": torch.rand(2, 40, 3, 4).double() + 1, "k": torch.rand(2, 40, 3, 4).double() + 1}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, final = ops.linear_attention(q, k, v, normalize=True, return_final_state=True, impl=impl)
        assert final is not None
        return output, final

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, (state, keys) = naive(q, k, v, normalize=True, output_final_state=True)
        return output, torch.cat((state, keys[:, 0, :, :, None]), -1)

    same_as_fla(ours, theirs, positive | {"v": torch.randn(2, 40, 3, 5).double()})


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"feature_map must be one of identity, relu, elu, got 'softmax'"):
        LinearAttention(DIMS, feature_map="softmax")
    with pytest.raises(ValueError, match=r"normalize=True needs a positive feature map .* got feature_map='identity'"):
        LinearAttention(DIMS, normalize=True)
