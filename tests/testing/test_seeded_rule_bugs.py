"""The laws prove themselves: a bug put into an implementation breaks the law that is about it, which says so."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import get_rule
from linear_moe.forms import Recurrence
from linear_moe.rules import Tokens
from linear_moe.rules import chunked as chunked_module
from linear_moe.rules import scan as scan_module
from linear_moe.rules.segments import Segments
from linear_moe.testing import RULE_LAWS, Case, LawBroken

Result = tuple[Tensor, Tensor]
Chunked = Callable[[Recurrence, Tokens, Segments, Tensor, float], Result]
Patch = Callable[[pytest.MonkeyPatch], None]

LAWS = {law.name: law for law in RULE_LAWS}
ORDINARY = [
    {"lengths": (3, 0, 20), "num_heads": 2, "num_value_heads": 4, "tokens": kind} for kind in ("drawn", "extreme")
]


def broken_laws(rule: str) -> dict[str, str]:
    """The laws that a rule breaks on a few cases of their sizes, and what was measured."""
    found = {}
    for law in RULE_LAWS:
        tokens, heads, width = law.sizes.tokens[0], law.sizes.num_heads[1], law.sizes.head_dim[1]
        narrow = {"lengths": (max(tokens, 4),), "num_heads": heads, "num_value_heads": heads, "tokens": "drawn"}
        for sizes in ORDINARY if law.max_examples is None else [narrow]:
            case = Case(get_rule(rule), head_dim=min(width, 16), head_value_dim=min(width, 16), seed=1, **sizes)
            try:
                law(case)
            except LawBroken as broken:
                found[law.name] = broken.measured
    return found


def around(change: Callable[..., Result]) -> Patch:
    """A bug in the chunked form: `change` is called with the right form and its arguments in its place."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = scan_module.chunked
        monkeypatch.setattr(scan_module, "chunked", lambda *args: change(right, *args))

    return patch


def _late_decay(right: Chunked, form: Recurrence, tokens: Tokens, *rest: Any) -> Result:
    assert tokens.log_decay is not None
    late = torch.cat((torch.zeros_like(tokens.log_decay[:1]), tokens.log_decay[:-1]))
    return right(form, tokens._replace(log_decay=late), *rest)


def _decay_after_write(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    """What a token writes fades with it: a k v^T in the place of k v^T."""
    assert tokens.log_decay is not None
    return right(form, tokens._replace(k=tokens.k * tokens.log_decay.exp()), segments, state, scale)


def _lost_state(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    return right(form, tokens, segments, torch.zeros_like(state), scale)


def _touched_empty(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    output, final = right(form, tokens, segments, state, scale)
    return output, torch.where((segments.lengths == 0)[:, None, None, None], 0.999 * final, final)


def _leak_between_sequences(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    """Every sequence but the first starts from the state before it, and from what was said before it."""
    if segments.count < 2:
        return right(form, tokens, segments, state, scale)
    whole = replace(segments, cu_seqlens=segments.cu_seqlens[[0, -1]], max_length=segments.num_tokens)
    output, _ = right(form, tokens, whole, state[:1], scale)
    return output, right(form, tokens, segments, state, scale)[1]


def _fading_at_rest(right: Chunked, form: Recurrence, tokens: Tokens, *rest: Any) -> Result:
    """A decay kept away from 1, to be on the safe side."""
    assert tokens.log_decay is not None
    return right(form, tokens._replace(log_decay=tokens.log_decay.clamp_max(-1e-7)), *rest)


def _no_scale(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    return right(form, tokens, segments, state, 1.0)


def _sixteen_bits(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    """A state kept in bfloat16 between calls."""
    output, final = right(form, tokens, segments, state.bfloat16().to(state.dtype), scale)
    return output.bfloat16().to(output.dtype), final


def _no_gradient(
    right: Chunked, form: Recurrence, tokens: Tokens, segments: Segments, state: Tensor, scale: float
) -> Result:
    assert tokens.log_decay is not None
    return right(form, tokens._replace(log_decay=tokens.log_decay.detach()), segments, state, scale)


def _saturating(right: Chunked, form: Recurrence, tokens: Tokens, *rest: Any) -> Result:
    return right(form, tokens._replace(v=tokens.v.tanh()), *rest)


def _no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """<q_t, k_j> for later j too."""
    monkeypatch.setattr(chunked_module, "earlier", lambda pairs, work: pairs)


def _reverse_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later tokens instead of the earlier."""
    right = chunked_module.decayed_products
    monkeypatch.setattr(chunked_module, "SAFE_EXPONENT", -1.0)
    monkeypatch.setattr(chunked_module, "decayed_products", lambda *args: right(*args).mT)


def _overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """e^-G whatever G is."""
    monkeypatch.setattr(chunked_module, "SAFE_EXPONENT", 1e9)


def _touched_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on over the padding of a shorter sequence."""
    right = scan_module.recurrent

    def careless(step: Any, tokens: Tokens, segments: Segments, state: Tensor) -> Result:
        output, final = right(step, tokens, segments, state)
        shorter = segments.lengths < segments.max_length
        return output, torch.where(shorter[:, None, None, None], 0.9 * final, final)

    monkeypatch.setattr(scan_module, "recurrent", careless)


def _tiled_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key heads 0 1 0 1 in the place of 0 0 1 1."""
    right = scan_module._widened

    def tiled(tokens: Tokens, dtype: torch.dtype) -> Tokens:
        shared_by = tokens.v.shape[1] // tokens.q.shape[1]
        q, k = (x.repeat(1, shared_by, 1) for x in (tokens.q, tokens.k))
        return right(tokens._replace(q=q, k=k), dtype)

    monkeypatch.setattr(scan_module, "_widened", tiled)


def _swapped_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values read as if they lay one after another."""
    right = scan_module._widened

    def careless(tokens: Tokens, dtype: torch.dtype) -> Tokens:
        shape = tokens.v.shape
        strides = torch.empty(shape, device="meta").stride()
        return right(tokens._replace(v=tokens.v.as_strided(shape, strides)), dtype)

    monkeypatch.setattr(scan_module, "_widened", careless)


def _autocast_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_without_autocast", lambda device: contextlib.nullcontext())


BUGS: dict[str, tuple[str, Patch, str]] = {
    "decay off by one": ("gla", around(_late_decay), "chunked-equals-recurrent"),
    "decay after the write": ("gla", around(_decay_after_write), "chunked-equals-recurrent"),
    "decay never 1": ("gla", around(_fading_at_rest), "idle-token-keeps-state"),
    "mask dropped": ("linear_attention", _no_mask, "causal"),
    "mask reversed": ("gla", _reverse_mask, "causal"),
    "split loses the state": ("gated_deltanet", around(_lost_state), "split-equals-whole"),
    "empty sequence touched": ("mamba2", around(_touched_empty), "empty-sequence-keeps-state"),
    "shorter sequence touched": ("mamba2", _touched_shorter, "recurrent-is-step"),
    "sequences run into each other": ("retnet", around(_leak_between_sequences), "packed-equals-separate"),
    "sequences see each other": ("retnet", around(_leak_between_sequences), "causal"),
    "scale forgotten": ("deltanet", around(_no_scale), "chunked-equals-recurrent"),
    "exponent overflows": ("gated_deltanet", _overflowing, "finite"),
    "sixteen bits": ("deltanet", around(_sixteen_bits), "float32-budget"),
    "gradient missing": ("gla", around(_no_gradient), "gradients-are-derivatives"),
    "values bent": ("deltanet", around(_saturating), "linear-in-values"),
    "heads shared the other way": ("gla", _tiled_heads, "shared-keys-equal-repeated"),
    "strides ignored": ("gla", _swapped_strides, "strides-do-not-matter"),
    "autocast left on": ("gla", _autocast_left_on, "autocast-does-not-matter"),
}


@pytest.mark.parametrize(("rule", "patch", "law"), BUGS.values(), ids=BUGS)
def test_a_seeded_bug_breaks_the_law_about_it(
    rule: str, patch: Patch, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch)
    broken = broken_laws(rule)
    assert law in broken, f"not caught by {law}; caught by {', '.join(broken) or 'none'}"


@pytest.mark.parametrize("rule", sorted({rule for rule, _, _ in BUGS.values()}))
def test_without_a_bug_the_same_cases_keep_every_law(rule: str) -> None:
    assert broken_laws(rule) == {}


def test_a_bug_is_reported_with_the_law_the_input_and_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    around(_lost_state)(monkeypatch)
    case = Case(get_rule("gla"), lengths=(6, 5), tokens="drawn")
    with pytest.raises(LawBroken) as error:
        LAWS["split-equals-whole"](case)
    message = str(error.value)
    assert message.startswith(
        "gla breaks the law 'split-equals-whole': cut anywhere and continued from the carried state"
    )
    assert "on: Case(GLA, lengths=(6, 5), tokens='drawn')" in message
    assert "measured: chunked, first [" in message


def test_modules_are_what_the_bugs_are_put_into() -> None:
    """The names above shadow nothing: `linear_moe.rules.chunked` is the module, not its function."""
    assert isinstance(chunked_module, types.ModuleType)
    assert isinstance(scan_module, types.ModuleType)
