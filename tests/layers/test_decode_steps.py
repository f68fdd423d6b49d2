"""One token of each sequence at a time, on the kernels of decoding, against the same layers in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.forms import Decay, Erase, GateForms, Recurrence, SoftplusDecay
from linear_moe.kernels import decode_projections, decode_tokens
from linear_moe.layers import MemoryLayer, MoMLayer, decode_steps, recurrent_mixer
from linear_moe.layers.state import MemoryState
from linear_moe.rules import GatedDeltaNet, LinearAttention, rule_names
from linear_moe.rules.base import Parameter, Projection, Tokens, UpdateRule
from linear_moe.rules.transforms import rotary
from linear_moe.testing.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 16
SIZES: dict[str, Any] = {"num_heads": 2, "head_dim": 8}
MIXTURE = {"num_memories": 3, "top_k": 2}
Patch = pytest.MonkeyPatch


def build(
    rule: Any, dtype: torch.dtype = torch.float32, *, impl: str = "triton", memory: bool = False, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    cls, mixture = (MemoryLayer, {}) if memory else (MoMLayer, MIXTURE)
    layer = cls(D, rule, **SIZES | mixture | options, impl=impl).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.to(dtype).eval()


def draw(batch: int, length: int, *, padded: bool = False) -> tuple[Tensor, Tensor | None]:
    """Tokens, and which of them are real: every third of a sequence is not."""
    x = torch.randn(batch, length, D, generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    places = torch.arange(batch, device=DEVICE)[:, None] + torch.arange(length, device=DEVICE)
    return x, places % 3 != 2 if padded else None


@torch.no_grad()
def decoded(
    layer: nn.Module, x: Tensor, mask: Tensor | None = None, state: MemoryState | None = None
) -> dict[str, Tensor]:
    """Outputs token by token, and the state after them."""
    state = layer.new_state(len(x)) if state is None else state
    x = x.to(layer.out_proj.weight.dtype)
    steps = [
        layer(x[:, t : t + 1], state=state, padding_mask=None if mask is None else mask[:, t : t + 1])
        for t in range(x.shape[1])
    ]
    return {"output": torch.cat(steps, 1)} | state.tensors()


@torch.no_grad()
def whole(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs of one call, and the state after it."""
    state = layer.new_state(len(x))
    return {"output": layer(x.to(layer.out_proj.weight.dtype), state=state, padding_mask=mask)} | state.tensors()


def check(rule: Any, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Decoding is within the budget of PyTorch's, held against one whole call in float64."""
    layer = build(rule, dtype, **options)
    assert layer.decoding is not None
    candidate = decoded(layer, x, mask)
    reference = decoded(build(rule, dtype, impl="chunked", **options), x, mask)
    exact = whole(build(rule, dtype, impl="chunked", **options).double(), x, mask)
    seen = [found.pop("tokens_seen") for found in (candidate, reference, exact)]
    assert torch.equal(seen[0], seen[2])
    # The state is float32 and made of numbers in the layer's dtype; an output is a quotient of sums of either sign.
    # A GPU's exponentials, quotients and roots are some roundings off.
    largest = max(float(value.abs().max()) for value in exact.values()) * (4 if DEVICE == "cuda" else 1)
    terms = {name: torch.full((1,), largest, dtype=torch.float64) for name in exact}
    assert_within_budget(candidate, reference, exact, dtype, terms)


@pytest.mark.parametrize("memory", [False, True], ids=["mixture", "one memory"])
@pytest.mark.parametrize("rule", rule_names())
def test_any_rule_with_pads(rule: str, memory: bool) -> None:
    check(rule, *draw(2, 2, padded=True), memory=memory)


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 1), (decode_steps.FEW_TOKENS + 1, 1)])
def test_few_and_many_sequences(batch: int, length: int) -> None:
    check("gated_deltanet", *draw(batch, length), num_heads=1, shared_memory=batch < 10)


@pytest.mark.parametrize("rule", ["gated_deltanet", "gla", "mamba2"])
def test_sixteen_bits(rule: str) -> None:
    check(rule, *draw(2, 2, padded=True), dtype=torch.float16)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("gated_deltanet", {"conv_scope": "sequence"}),
        ("gated_deltanet", {"conv_scope": "sequence", "memory": True}),
        ("gated_deltanet", {"memory_projections": "shared"}),
        ("gated_deltanet", {"query_projection": "memory"}),
        ("gated_deltanet", {"shared_memory": False, "top_k": 1, "conv_width": 1}),
        ("gated_deltanet", {"num_value_heads": 4, "head_value_dim": 12, "learned_initial_memory": True}),
        ("gated_deltanet", {"output_gate": "sigmoid", "norm_groups": 1}),
        ("gated_deltanet", {"output_gate": "none", "rule_options": {"short_conv": False}}),
        ("gated_deltanet", {"gate_before_norm": True, "rule_options": {"allow_negative_eigenvalues": True}}),
        ("gla", {"memory_projections": "shared", "rule_options": {"short_conv": True}}),
        ("linear_attention", {"rule_options": {"normalize": True, "feature_map": "elu"}}),
        ("mamba2", {"num_value_heads": 4, "rule_options": {"num_groups": 2}}),
        ("retnet", {"rule_options": {"short_conv": True}}),
    ],
    ids=str,
)
def test_options(rule: str, options: dict[str, Any]) -> None:
    check(rule, *draw(2, 2, padded=True), **options)


@dataclass(frozen=True)
class Wide(GatedDeltaNet):
    """Gates of its own, and a key that decays by channel: a form that decoding alone has a kernel for."""

    form = Recurrence(Decay.VECTOR, Erase.DELTA)

    def gates(self, raw: Any, parameters: Any) -> dict[str, Tensor]:
        gates = super().gates(raw, parameters)
        each = torch.arange(1, self.dims.head_dim + 1, device=raw["decay"].device) / self.dims.head_dim
        return gates | {"log_decay": gates["log_decay"][..., None] * each}


def test_gates_of_a_users_own_are_asked() -> None:
    assert build("gated_deltanet").decoding.gates and build("deltanet").decoding.gates
    assert not build(Wide).decoding.gates
    # Its projections and their norms are made by the kernels all the same.
    assert build(Wide).decoding.normalized
    layer = build(Wide)
    made = decoded(layer, *draw(2, 1))
    expected = decoded(build(Wide, impl="chunked"), *draw(2, 1))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Faded(UpdateRule):
    """Gates of a declared form, and queries and keys without a norm."""

    form = Recurrence(Decay.SCALAR)

    def projections(self) -> dict[str, Projection]:
        return super().projections() | {"time": Projection(self.dims.num_value_heads)}

    def parameters(self) -> dict[str, Parameter]:
        shape = (self.dims.num_value_heads,)
        return {"rate": Parameter(shape, torch.zeros), "shift": Parameter(shape, torch.zeros)}

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q, positions), rotary(k, positions)

    def gate_forms(self) -> GateForms:
        return GateForms(SoftplusDecay("time", "rate", "shift"))

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def test_a_users_gates_of_a_declared_form_are_made() -> None:
    plan = build(Faded).decoding
    assert plan.gates and plan.decay is not None and not plan.normalized
    check(Faded, *draw(2, 2, padded=True))


@dataclass(frozen=True)
class BiasedQueries(GatedDeltaNet):
    """Queries that are not done with the kernel's part, so that neither their norm is its nor that of the keys."""

    def projections(self) -> dict[str, Projection]:
        projections = super().projections()
        return projections | {"q": replace(projections["q"], bias=True, conv=False)}


def test_queries_and_keys_are_normed_by_one() -> None:
    plan = build(BiasedQueries).decoding
    assert not plan.normalized and plan.unfinished == {"q"} and not plan.parts["k"].head
    check(BiasedQueries, *draw(2, 2, padded=True))


def todays_path(patch: Patch) -> None:
    patch.setattr(recurrent_mixer, "decodes", lambda *arguments: False)


def test_the_kernels_of_any_length_make_the_same(monkeypatch: Patch) -> None:
    layer, (x, mask) = build("gated_deltanet"), draw(2, 2, padded=True)
    made = decoded(layer, x, mask)
    todays_path(monkeypatch)
    torch.testing.assert_close(made, decoded(layer, x, mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made, whole(layer, x, mask), rtol=1e-4, atol=1e-5)


def test_a_prefill_goes_on() -> None:
    layer, (x, _) = build("gated_deltanet"), draw(2, 5)
    state = layer.new_state(2)
    with torch.no_grad():
        first = layer(x[:, :4], state=state)
    made = decoded(layer, x[:, 4:], state=state)
    expected = decoded(build("gated_deltanet", impl="chunked"), x)
    made["output"] = torch.cat((first, made["output"]), 1)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def used_memories(layer: Any, mask: Tensor) -> Tensor:
    """`[B, M]`: which memories the last token of each sequence used."""
    used = torch.zeros(len(mask), layer.num_states, dtype=torch.bool, device=DEVICE)
    used[:, -1] = True
    return used.scatter_(1, layer.routing.indices, True) & mask


@torch.no_grad()
@pytest.mark.parametrize("rule", ["gated_deltanet", "gla"])
def test_only_picked_memories_are_read_and_written(rule: str) -> None:
    """Bit for bit, twice, and whatever stands in the others."""
    layer, (x, _) = build(rule), draw(2, 2)
    start = layer.new_state(2)
    decoded(layer, x[:, :1], state=start)
    mask = torch.tensor([[True], [False]], device=DEVICE)
    after, again, ill = start.clone(), start.clone(), start.clone()
    output = layer(x[:, 1:], state=after, padding_mask=mask)
    used = used_memories(layer, mask)
    assert torch.equal(layer(x[:, 1:], state=again, padding_mask=mask), output)
    for name in ("memory", "conv"):
        if start.tensors().get(name) is not None:
            getattr(ill, name)[~used] = torch.nan
    assert torch.equal(layer(x[:, 1:], state=ill, padding_mask=mask), output)
    assert not output[1].any() and output[0].any()
    assert torch.equal(after.tokens_seen, torch.tensor([2, 1], device=DEVICE))
    for name, before in start.tensors().items():
        tensors = [state.tensors()[name] for state in (after, again, ill)]
        assert torch.equal(tensors[0], tensors[1])
        if name != "tokens_seen":
            assert torch.equal(tensors[0][~used], before[~used])
            assert torch.equal(tensors[0][used], tensors[2][used]) and not torch.equal(tensors[0][used], before[used])
            assert tensors[2][~used].isnan().all()


@torch.no_grad()
def test_a_state_stays_where_it_is() -> None:
    layer, (x, _) = build("gated_deltanet"), draw(2, 2)
    state = layer.new_state(2)
    places = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
    decoded(layer, x, state=state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == places


class Launches(TorchDispatchMode):
    """Names of the operators that do something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function._schema.name
        if not function.is_view and not any(word in name for word in ("empty", "detach", "unsafe_view")):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "most"), [("gated_deltanet", 6), ("deltanet", 6), ("linear_attention", 7), ("gla", 10)]
)
def test_behind_the_router_there_are_few_launches(rule: str, most: int, monkeypatch: Patch) -> None:
    layer, (x, _) = build(rule), draw(2, 1)
    # What sizes alone decide is made once; not in a dispatch mode.
    place = torch.arange(6, device=DEVICE)
    monkeypatch.setattr(decode_steps, "_slots_in_order", lambda *arguments: place)
    state = layer.new_state(2)
    with Launches() as launches:
        layer(x, state=state)
    behind = launches.names[launches.names.index("linear_moe::decode_projections") :]
    assert len(behind) <= most, behind
    assert [name.removeprefix("linear_moe::") for name in behind if "linear_moe" in name][-3:] == [
        "decode_step",
        "combine",
        "decode_projections",
    ]


def test_which_calls_take_it() -> None:
    layer, (x, _) = build("gated_deltanet"), draw(2, 2)
    one, state = x[:, :1], layer.new_state(2)
    borders = torch.tensor([0, 1], device=DEVICE)
    assert not decode_steps.decodes(layer, one, None, state), "with gradients"
    with torch.no_grad():
        assert decode_steps.decodes(layer, one, None, state)
        assert not decode_steps.decodes(layer, x, None, state), "two tokens"
        assert not decode_steps.decodes(layer, one, None, None), "no state"
        assert not decode_steps.decodes(layer, one[:1], borders, layer.new_state(1)), "packed"
        layer.impl = "chunked"
        assert not decode_steps.decodes(layer, one, None, state)
        layer.impl = "triton"
        for name in ("memory", "conv"):
            apart = state.clone()
            setattr(apart, name, torch.stack([getattr(apart, name)] * 2, -1)[..., 0])
            assert not decode_steps.decodes(layer, one, None, apart), name


@dataclass(frozen=True)
class Formless(LinearAttention):
    form = None


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (Formless, {"impl": "auto"}),
        ("gated_deltanet", {"conv_width": 9}),
        ("gated_deltanet", {"conv_width": 9, "conv_scope": "sequence"}),
        ("linear_attention", {"head_dim": 257}),
    ],
    ids=str,
)
def test_which_layers_do_not(rule: Any, options: dict[str, Any]) -> None:
    assert build(rule, **options).decoding is None
    assert build("linear_attention", conv_width=9).decoding is not None, "it has no convolution"


class Doubled(nn.Module):
    """A linear map with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gate_proj", "out_proj"])
def test_adapters_and_hooks_are_called(name: str) -> None:
    x, _ = draw(2, 1)
    layers = [build("gated_deltanet", impl=impl) for impl in ("triton", "chunked")]
    for layer in layers:
        setattr(layer, name, Doubled(getattr(layer, name)))
    torch.testing.assert_close(*(decoded(layer, x) for layer in layers), rtol=1e-4, atol=1e-5)
    layer, called = build("gated_deltanet"), []
    getattr(layer, name).register_forward_hook(lambda *arguments: called.append(1))
    decoded(layer, x)
    assert called == [1]
    layer = build("gated_deltanet")
    module = getattr(layer, name)
    forward = module.forward
    module.forward = lambda value: called.append(2) or forward(value)
    decoded(layer, x)
    assert called == [1, 2]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch.no_grad()
def test_compiled_into_one_graph_it_is_the_same() -> None:
    layer, (x, _) = build("gated_deltanet"), draw(2, 1)
    states = layer.new_state(2), layer.new_state(2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, state=states[0]), layer(x, state=states[1]))
    torch.testing.assert_close(states[0].tensors(), states[1].tensors())
    torch._dynamo.reset()


def test_gate_forms_are_what_gates_makes() -> None:
    """The default: a rule that overrides `gates` is not asked for forms."""
    assert UpdateRule.gate_forms(build("gla").rule) == GateForms()
    rule = build("gated_deltanet").rule
    raw = {name: torch.randn(5, 2) for name in ("decay", "beta")}
    parameters = {"A_log": torch.randn(2), "dt_bias": torch.randn(2)}
    gates = rule.gates(raw, parameters)
    time = torch.nn.functional.softplus(raw["decay"] + parameters["dt_bias"])
    torch.testing.assert_close(gates["log_decay"], -parameters["A_log"].exp() * time)
    torch.testing.assert_close(gates["beta"], raw["beta"].sigmoid())


def autocast_state(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.autocast(DEVICE, torch.float16):
        return decoded(layer, x)


def test_autocast(monkeypatch: Patch) -> None:
    """Float32 weights in float16 products, as the path of any length has it."""
    layer, (x, _) = build("gated_deltanet"), draw(2, 1)
    made = autocast_state(layer, x)
    todays_path(monkeypatch)
    expected = autocast_state(layer, x)
    torch.testing.assert_close(made, expected, rtol=2e-2, atol=5e-3)
    exact = decoded(layer, x)
    assert not torch.allclose(made["output"], exact["output"], rtol=1e-5, atol=1e-6), "nothing was cast"


def positions_stand_still(patch: Patch) -> None:
    patch.setattr(recurrent_mixer, "decode_token", _with_seen(decode_steps.decode_token))


def _with_seen(original: Callable[..., Any]) -> Callable[..., Any]:
    def bug(layer: Any, tokens: Tensor, sequences: Any, valid: Any, state: MemoryState) -> Any:
        seen = state.tokens_seen.clone()
        state.tokens_seen.zero_()
        made = original(layer, tokens, sequences, valid, state)
        state.tokens_seen.copy_(seen + sequences.lengths)
        return made

    return bug


def _changed(patch: Patch, module: Any, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    original = getattr(module, name)
    patch.setattr(module, name, lambda *arguments, **given: original(*arguments, **change(given)))


def pads_have_memories(patch: Patch) -> None:
    _changed(patch, decode_tokens, "make_tokens", lambda given: given | {"valid": None})


def the_conv_is_forgotten(patch: Patch) -> None:
    original = decode_tokens.make_tokens

    def bug(slots: Any, shared: Any, parts: Any, **given: Any) -> Any:
        parts = [part._replace(channel=-1) for part in parts]
        return original(slots, shared, parts, **given)

    patch.setattr(decode_tokens, "make_tokens", bug)


def memories_take_turns(patch: Patch) -> None:
    original = decode_projections.project_token

    def bug(x: Tensor, memory: Tensor | None, *weights: Any, **given: Any) -> Any:
        return original(x, None if memory is None else memory.flip(1), *weights, **given)

    patch.setattr(decode_projections, "project_token", bug)


def every_weight_is_1(patch: Patch) -> None:
    original = decode_steps._combine
    patch.setattr(
        decode_steps, "_combine", lambda layer, x, reads, weights, *more: original(layer, x, reads, None, *more)
    )


def the_second_matrix_has_no_bias(patch: Patch) -> None:
    original = decode_projections.project_slots
    patch.setattr(decode_projections, "project_slots", lambda *given, **more: original(*given[:3], None, **more))


def a_gate_is_a_column_off(patch: Patch) -> None:
    original = decode_steps._gates

    def bug(layer: Any, plan: Any) -> Any:
        gates = original(layer, plan)
        return gates and gates._replace(decay=gates.decay._replace(column=gates.decay.column - 1))

    patch.setattr(decode_steps, "_gates", bug)


BUGS = [
    (positions_stand_still, "retnet"),
    (pads_have_memories, "gated_deltanet"),
    (the_conv_is_forgotten, "gated_deltanet"),
    (memories_take_turns, "gated_deltanet"),
    (every_weight_is_1, "gated_deltanet"),
    (the_second_matrix_has_no_bias, "gla"),
    (a_gate_is_a_column_off, "gated_deltanet"),
]


@pytest.mark.parametrize(("bug", "rule"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_bugs_are_caught(bug: Callable[[Patch], None], rule: str, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="over the error budget"):
        check(rule, *draw(2, 2, padded=True))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_a_captured_graph_replays_on_new_input(batch: int, rule: str, dtype: torch.dtype) -> None:
    layer = build(rule, dtype)
    x, state, eager = (
        torch.randn(batch, 1, D, device=DEVICE, dtype=dtype),
        layer.new_state(batch),
        layer.new_state(batch),
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x, state=state.clone())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, state=state)
    for _ in range(3):
        x.copy_(3 * torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, layer(x, state=eager))
    for name, tensor in eager.tensors().items():
        assert torch.equal(state.tensors()[name], tensor), name
