"""Drawn inputs of a scan, and the kernels' outputs and gradients beside the chunked form's.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import gated_deltanet, gla, library, parallel_scan, piece_reads, scalar_scan
from linear_moe.kernels.blocks import cdiv
from linear_moe.kernels.splits import Ragged
from linear_moe.rules.base import Tokens
from linear_moe.rules.scan import scan
from linear_moe.testing.budget import assert_within_budget, decay_gradient_terms, error_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float16)
"""The interpreter is numpy, which has no bfloat16; float16 takes every branch that bfloat16 takes but one operand's dtype."""

SCALAR_FORMS = [Recurrence(Decay.NONE), Recurrence(Decay.HEAD), Recurrence(Decay.SCALAR)]
DELTA_FORMS = [Recurrence(Decay.NONE, Erase.DELTA), Recurrence(Decay.SCALAR, Erase.DELTA)]
VECTOR_FORMS = [Recurrence(Decay.VECTOR)]
FORMS = SCALAR_FORMS + DELTA_FORMS + VECTOR_FORMS

assert DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", (
    "tests/conftest.py sets it before triton is imported"
)


@dataclass(frozen=True)
class Case:
    """A call of `library.scan`, but for the numbers."""

    form: Recurrence
    lengths: tuple[int, ...]
    heads: int = 1
    key_heads: int = 1
    K: int = 16
    V: int = 16
    rate: float = 1.0
    """Log decays are drawn from [-rate, 0]."""
    spare: int = 0
    """Tokens behind the last segment."""
    dense: bool = False
    """Whether to say that there is none."""
    tight: bool = False
    """Whether the bound on the lengths is the longest, or every token."""
    initial: bool = True
    final: bool = True
    """Whether to ask for the final state."""
    used: tuple[str, ...] = ("output", "final_state")
    """What the loss sees."""
    learns: bool = True
    """Whether gradients are wanted: without, inference's kernels run."""
    dtype: torch.dtype = torch.float32
    seed: int = 0
    """Of the numbers."""

    @property
    def num_tokens(self) -> int:
        """S"""
        return sum(self.lengths) + self.spare

    @property
    def max_length(self) -> int:
        """As the kernels are told."""
        return max(self.lengths) if self.tight else self.num_tokens

    @property
    def cu_seqlens(self) -> Tensor:
        """`[N + 1]`"""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(DEVICE)


def described(case: Case) -> Case:
    """The same without gradients, with rows of whole 16 bytes."""
    return replace(case, K=8 * cdiv(case.K, 8), V=8 * cdiv(case.V, 8), learns=False)


def new_heads(width: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Of 3 tokens, in memory from an offset of numbers on."""
    return torch.empty(offset + 3 * 2 * width, dtype=dtype, device=DEVICE)[offset:].view(3, 2, width)


Results = tuple[Tensor, Tensor | None]
Run = Callable[[Case, Mapping[str, Tensor]], Results]


def module_of(form: Recurrence, K: int = 16, V: int = 16, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Whose kernels run a form."""
    if form.erase is Erase.DELTA:
        return gated_deltanet
    if form.decay is Decay.VECTOR:
        return gla
    return parallel_scan if piece_reads.takes(K, V, dtype) else scalar_scan


def piece_length(case: Case) -> int | None:
    """Tokens of a piece where the case's segments are split, else None."""
    k, v = torch.empty(case.num_tokens, 1, case.K), torch.empty(case.num_tokens, case.heads, case.V)
    ragged = Ragged(case.cu_seqlens, case.max_length, case.dense)
    module = module_of(case.form, case.K, case.V, case.dtype)
    length_of = module.walk_length if module is parallel_scan else module.piece_length
    return length_of(k.to(case.dtype), v.to(case.dtype), ragged)


def draw(case: Case) -> dict[str, Tensor]:
    """Inputs in the case's dtype, gates and state in float32."""
    S, decay = case.num_tokens, case.form.decay
    # A case that hypothesis tries again is the same case.
    torch.manual_seed(case.seed)
    with torch.device(DEVICE):
        inputs = {
            "q": torch.randn(S, case.key_heads, case.K),
            "k": torch.randn(S, case.key_heads, case.K),
            "v": torch.randn(S, case.heads, case.V),
        }
        if decay is Decay.HEAD:
            inputs["log_decay"] = -case.rate * torch.rand(case.heads)
        elif decay is not Decay.NONE:
            last = (case.K,) if decay is Decay.VECTOR else ()
            inputs["log_decay"] = -case.rate * torch.rand(S, case.heads, *last)
        if case.form.erase is Erase.DELTA:
            # Keys have length 1, or the state would grow without bound.
            inputs["k"] = F.normalize(inputs["k"], dim=-1)
            beta = 2 * torch.rand(S, case.heads)
            # What is written at strength 0, 1 and 2 is nothing, all and a reflection, exactly.
            exact = torch.randint(0, 6, beta.shape)
            inputs["beta"] = torch.where(exact < 3, exact.to(beta.dtype), beta)
        if case.initial:
            inputs["initial_state"] = torch.randn(len(case.lengths), case.heads, case.K, case.V)
    return {name: x.to(case.dtype) if name in "qkv" else x for name, x in inputs.items()}


def kernels(case: Case, tensors: Mapping[str, Tensor]) -> Results:
    """The kernels."""
    given = {"log_decay": None, "beta": None, "initial_state": None} | dict(tensors)
    return library.scan(
        **given, decay=case.form.decay, scale=case.K**-0.5, cu_seqlens=case.cu_seqlens, max_length=case.max_length,
        dense=case.dense, return_final_state=case.final,
    )  # fmt: skip


def chunked(case: Case, tensors: Mapping[str, Tensor]) -> Results:
    """The chunked form."""
    tokens = Tokens(**{name: x if x.dim() == 1 else x[None] for name, x in tensors.items() if name != "initial_state"})
    result = scan(
        tokens, form=case.form, step=lambda state, token: (state, token.v), scale=case.K**-0.5,
        initial_state=tensors.get("initial_state"), cu_seqlens=case.cu_seqlens, return_final_state=case.final,
        impl="chunked",
    )  # fmt: skip
    return result.output[0], result.final_state


def results(
    run: Run,
    case: Case,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    seed_of_spare: float | None = None,
) -> dict[str, Tensor]:
    """What `run` makes of the inputs in `dtype` (the case's unless given), and, if wanted, gradients, `d_` before their names.

    The same loss every time; `seed_of_spare` is its gradient at the output's rows that are in no segment, drawn unless given.
    """
    dtype = dtype or case.dtype
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {name: x.detach().to(dtype if name in "qkv" else wide) for name, x in inputs.items()}
    wanted = {
        name: x.requires_grad_()
        for name, x in tensors.items()
        if case.learns and (name != "log_decay" or case.form.decay is not Decay.HEAD)
    }
    output, final_state = run(case, tensors)
    made = {"output": output} | ({} if final_state is None else {"final_state": final_state})
    if not case.learns:
        return made
    # Without a token the output depends on nothing.
    used = [name for name in case.used if name in made and made[name].requires_grad]
    generator = torch.Generator(DEVICE).manual_seed(1)
    seeds = {
        name: torch.randn(made[name].shape, generator=generator, device=DEVICE).to(case.dtype).to(made[name].dtype)
        for name in used
    }
    if seed_of_spare is not None:
        seeds["output"][case.num_tokens - case.spare :] = seed_of_spare
    gradients = torch.autograd.grad(
        [made[name] for name in used], list(wanted.values()), list(seeds.values()), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return {name: x.detach() for name, x in made.items()} | dict(
        zip([f"d_{name}" for name in wanted], gradients, strict=True)
    )


Terms = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def check(case: Case, inputs: Mapping[str, Tensor] | None = None, terms: Terms | None = None) -> None:
    """The kernels' outputs and gradients are within the error budget.

    `terms` tells of float64 results what larger numbers they are differences of, where they are.
    """
    inputs = draw(case) if inputs is None else inputs
    candidate = results(kernels, case, inputs)
    reference, exact = results(chunked, case, inputs), results(chunked, case, inputs, torch.float64)
    larger = {} if terms is None else dict(terms(exact))
    if case.learns and case.form.decay is Decay.SCALAR:
        larger.setdefault("d_log_decay", decay_gradient_terms(inputs["v"], exact["d_v"], case.cu_seqlens))
    assert_within_budget(candidate, reference, exact, case.dtype, larger)


def errors_beside_reference(case: Case, seeds: int) -> dict[str, float]:
    """The kernels' errors as shares of the chunked form's in the same dtype, both summed over draws of the numbers."""
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        inputs = draw(replace(case, seed=seed))
        exact = results(chunked, case, inputs, torch.float64)
        for budget in error_budget(results(kernels, case, inputs), results(chunked, case, inputs), exact):
            both = errors.setdefault(budget.name, [0.0, 0.0])
            both[0] += budget.error
            both[1] += budget.reference_error
    return {name: error / reference for name, (error, reference) in errors.items()}


def check_compiled(case: Case) -> None:
    """Of a case that does not learn, torch's compiler makes the same."""
    inputs = draw(case)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    for made, same in zip(compiled(case, inputs), kernels(case, inputs), strict=True):
        assert made is not None and same is not None and torch.equal(made, same)
    torch._dynamo.reset()


def nearly_parallel(case: Case, apart: float) -> dict[str, Tensor]:
    """Inputs whose keys are one key but for what they are `apart`, at full strength."""
    inputs = draw(case)
    k = F.normalize(torch.randn(case.K) + apart * torch.randn(case.num_tokens, 1, case.K), dim=-1)
    return inputs | {"k": k.to(DEVICE, case.dtype), "beta": torch.ones_like(inputs["beta"])}


def check_telescoping(case: Case, inputs: dict[str, Tensor], roundings: float | None = None) -> None:
    """The budget where each write takes back the last one.

    Sums along a chunk then telescope: of up to C terms of a result's own size, each rounded, one is left, and their roundings
    add up as a random walk does: to as many as `roundings`, the root of C unless given. The recurrence, and the chunked form
    with its chunks of K / 2 tokens, forget them sooner. Of a state even less is left: it is a difference of writes k u^T, its
    gradient one of k dv^T, and k has length 1.
    """
    roundings = roundings or gated_deltanet.choose_launch("forward", case.K, case.V, case.dtype).chunk ** 0.5

    def terms(exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
        beside = {"final_state": inputs["v"].double()}
        if case.learns:
            beside["d_initial_state"] = exact["d_v"]
        # The log decay's gradient is float32: the reference rounds nothing there, for which the budget has room elsewhere.
        of = {"d_log_decay": max(roundings, 2)}
        return {
            name: of.get(name, roundings) * torch.cat((x.flatten(), beside.get(name, x).flatten()))
            for name, x in exact.items()
        }

    check(case, inputs, terms)


def num_examples(dtype: torch.dtype) -> int:
    """Of drawn cases: few where a program takes milliseconds."""
    return 15 if DEVICE == "cuda" else 4 if dtype == torch.float32 else 2


@st.composite
def cases(draw: st.DrawFn, form: Recurrence, dtype: torch.dtype) -> Case:
    """Ragged lengths, odd sizes, grouped heads, gentle and hard decays, with and without states."""
    on_cpu = DEVICE == "cpu"
    heads, key_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    spare = draw(st.sampled_from([0, 0, 1, 5]))
    most = 36 if on_cpu else 256
    # Narrow keys are parallel keys, which the delta rules' tests have of their own: many writes meet in few numbers. Of 16 bits
    # they are computed with in float32, and few values, too.
    least = 1 if form.erase is Erase.NONE else library.NARROW_KEYS
    # Whole tiles are what most models have, and few of all numbers.
    tiles = st.sampled_from([16, 32] if on_cpu else [64, 128, 192, 256])
    keys = st.integers(least, most) | tiles
    fewest = 1
    if form.erase is Erase.DELTA:
        if dtype == torch.float32:
            fewest = library.NARROW_VALUES
        else:
            keys |= st.integers(1, least - 1)
    return Case(
        form,
        tuple(draw(st.lists(st.integers(0, 40 if on_cpu else 500), min_size=1, max_size=3))),
        heads,
        key_heads,
        K=draw(keys),
        V=draw(st.integers(fewest, most) | tiles),
        rate=draw(st.sampled_from([0.0, 0.05, 1.0, 13.8])),
        spare=spare,
        dense=spare == 0 and draw(st.booleans()),
        tight=draw(st.booleans()),
        initial=draw(st.booleans()),
        final=draw(st.booleans()),
        dtype=dtype,
    )


def check_drawn(form: Recurrence, dtype: torch.dtype, change: Callable[[Case], Case] = lambda case: case) -> None:
    """Drawn cases, changed, are within the budget."""

    @settings(max_examples=num_examples(dtype))
    @given(cases(form, dtype))
    def holds(case: Case) -> None:
        check(change(case))

    holds()
