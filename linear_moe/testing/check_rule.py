"""The whole law battery on anybody's rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linear_moe.rules.base import UpdateRule
from linear_moe.testing.laws import Case, Law, LawBroken, Sizes, seeded
from linear_moe.testing.layer_laws import LAYER_LAWS
from linear_moe.testing.rule_laws import RULE_LAWS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_WIDER = (8, 12, 16, 24, 32, 64, 128)
"""Channels of a head for a rule that takes none of the few that its laws are best tried on."""


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` tried."""

    rule: type[UpdateRule]
    examples: Mapping[str, int]
    """The law's name, and on how many inputs it was found to hold."""
    left_out: tuple[str, ...]
    """Laws that don't speak of this rule, such as those of a declared form."""

    def __str__(self) -> str:
        name = self.rule.name or self.rule.__name__
        kept = f"{name} keeps {len(self.examples)} laws on {sum(self.examples.values())} inputs"
        return f"{kept}; left out: {', '.join(self.left_out)}" if self.left_out else kept


def check_rule(
    rule: type[UpdateRule],
    *,
    options: Mapping[str, Any] | None = None,
    max_examples: int = 10,
    seed: int = 0,
) -> RuleReport:
    """Try every law of rules and of layers on a rule, registered or not, with a declared form or with only a `step`.

    The same arguments try the same inputs. A law that breaks is reported on the smallest input found.

    Args:
        rule: the rule's class.
        options: the rule's options, its defaults unless given.
        max_examples: inputs a law; fewer for slow ones, and a third for a law of layers.
        seed: of the search for inputs.

    Returns:
        The laws tried and how often.

    Raises:
        LawBroken: saying which law, on which input, what was expected there and what came.
        ValueError: if `rule` is no rule, or can't be built with these options at any size.
        ModuleNotFoundError: without hypothesis, which is in the extra `testing`.
    """
    if not (isinstance(rule, type) and issubclass(rule, UpdateRule)):
        raise ValueError(f"rule must be a subclass of UpdateRule, got {rule!r}")
    if max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}")
    try:
        from linear_moe.testing import strategies
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            "check_rule needs hypothesis: pip install 'linear-moe[testing]'", name=error.name
        ) from error

    chosen = dict(options or {})
    fitted = _fit(rule, chosen, Sizes())
    if fitted is None:
        raise ValueError(f"{rule.__name__} can't be built with options {chosen}: {_refusal(rule, chosen, _WIDER[0])}")
    examples, left_out = {}, []
    for law in RULE_LAWS:
        sizes = _fit(rule, chosen, law.sizes)
        if sizes is None or not law.applies(rule):
            left_out.append(law.name)
            continue
        cases = strategies.rule_cases(rule, options=[chosen], sizes=sizes)
        examples[law.name] = _search(law, cases, max_examples, seed)
    layer_sizes = replace(strategies.LAYER_SIZES, head_dim=fitted.head_dim)
    for law in LAYER_LAWS:
        if not law.applies(rule):
            left_out.append(law.name)
            continue
        cases = strategies.layer_cases(rule, options=[chosen], sizes=layer_sizes)
        examples[law.name] = _search(law, cases, -(-max_examples // 3), seed)
    return RuleReport(rule, examples, tuple(left_out))


def _search(law: Law, cases: SearchStrategy[Case], max_examples: int, seed: int) -> int:
    """Try `law` on cases until one breaks it, and then on smaller ones. Returns how many were tried."""
    import hypothesis
    from hypothesis.errors import FlakyFailure

    tried = 0
    max_examples = min(max_examples, law.max_examples or max_examples)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def attempt(case: Case) -> None:
        nonlocal tried
        tried += 1
        law(case)

    try:
        # Layers draw their first parameters from the global generator.
        with seeded(seed):
            attempt()
    except LawBroken as broken:
        # Without hypothesis's own notes: the message says it all.
        raise LawBroken(*broken.args) from broken.__cause__
    except FlakyFailure as failure:
        first = next(error for error in failure.exceptions if isinstance(error, LawBroken))
        measured = f"{first.measured}; but not each time: the rule is not deterministic"
        raise LawBroken(first.law, first.statement, first.case, measured) from failure
    return tried


def _fit(rule: type[UpdateRule], options: Mapping[str, Any], sizes: Sizes) -> Sizes | None:
    """`sizes` if the rule can be built with some of them, else the next wider ones it takes."""
    low, high = sizes.head_dim
    if any(_refusal(rule, options, width) is None for width in range(low, high + 1)):
        return sizes
    for width in _WIDER:
        if width > high and _refusal(rule, options, width) is None:
            return replace(sizes, head_dim=(width, width))
    return None


def _refusal(rule: type[UpdateRule], options: Mapping[str, Any], width: int) -> Exception | None:
    """Why the rule can't be built with heads of `width` channels."""
    try:
        Case(rule, options, num_heads=1, num_value_heads=2, head_dim=width, head_value_dim=width).build()
    except (TypeError, ValueError) as error:
        return error
    return None
