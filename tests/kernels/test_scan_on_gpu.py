"""What only a GPU can show: sizes past 32 bits, launches of many programs, nothing that waits, captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import DELTA_FORMS, DEVICE, FORMS, SCALAR_FORMS, VECTOR_FORMS, Case, chunked, draw, kernels, results
from scan_laws import assert_same_bits, use_processors
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import library, scalar_scan
from linear_moe.kernels.launch_tables import trying
from linear_moe.testing.budget import assert_within_budget

pytestmark = pytest.mark.gpu
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
WIDTHS = dict.fromkeys(SCALAR_FORMS, 256) | dict.fromkeys(DELTA_FORMS, 128)
"""K = V, by forms of whose forward pass without gradients a kernel of its own makes heads so wide."""
FAMILIES = {"scalar_scan": SCALAR_FORMS[-1], "gated_deltanet": DELTA_FORMS[-1], "gla": VECTOR_FORMS[-1]}
every_family = pytest.mark.parametrize("form", FAMILIES.values(), ids=FAMILIES)


def bfloat16(form: Recurrence, lengths: tuple[int, ...], **changes: object) -> Case:
    return replace(Case(form, lengths, K=64, V=64, rate=0.1, dtype=torch.bfloat16), **changes)  # type: ignore[arg-type]


def without_gradients(case: Case) -> Case:
    """The same of heads that are walked in another way where no gradient is wanted."""
    return replace(case, K=WIDTHS[case.form], V=WIDTHS[case.form], learns=False)


def wide(case: Case) -> Case:
    """The same of heads whose states are stored of pieces."""
    return replace(case, K=256, V=256)


def turned(case: Case) -> Case:
    """The same of heads that are walked with their state turned."""
    return replace(case, K=128, V=128)


def as_it_is(case: Case) -> Case:
    return case


PASSES = [
    *((form, as_it_is) for form in FORMS),
    *((form, of) for of in (wide, without_gradients) for form in WIDTHS),
    *((form, turned) for form in SCALAR_FORMS),
]
every_pass = pytest.mark.parametrize(("form", "of"), PASSES, ids=[f"{form}, {of.__name__}" for form, of in PASSES])


def part(case: Case, inputs: dict[str, Tensor], segments: int) -> tuple[Case, dict[str, Tensor]]:
    """The first segments alone."""
    tokens = sum(case.lengths[:segments])
    some = replace(case, lengths=case.lengths[:segments], spare=0)
    return some, {
        name: x[:segments] if name == "initial_state" else x if x.dim() == 1 else x[:tokens]
        for name, x in inputs.items()
    }


@every_form
def test_many_segments(form: Recurrence) -> None:
    """More programs than a grid's second and third dimension hold, and more segments than one block of them."""
    lengths = tuple(torch.randint(0, 9, (200_000,)).tolist())
    case = bfloat16(form, lengths, tight=True)
    inputs = draw(case)
    made = results(kernels, case, inputs)
    for name, x in made.items():
        assert x.isfinite().all(), name
    some, few = part(case, inputs, 1000)
    # The loss's gradients are drawn in the order of the tokens, so the output's are the same, but not the states'.
    same = results(kernels, some, few)
    assert torch.equal(made["output"][: some.num_tokens], same["output"])
    assert torch.equal(made["final_state"][:1000], same["final_state"])


@pytest.mark.parametrize("form", WIDTHS, ids=str)
def test_many_segments_without_gradients(form: Recurrence) -> None:
    """A program has descriptors of its own."""
    lengths = tuple(torch.randint(0, 9, (200_000,)).tolist())
    case = without_gradients(bfloat16(form, lengths, tight=True, initial=False, final=False))
    inputs = draw(case)
    output, _ = kernels(case, inputs)
    assert output.isfinite().all()
    some, few = part(case, inputs, 1000)
    assert torch.equal(output[: some.num_tokens], kernels(some, few)[0])


@every_pass
def test_a_million_tokens_of_one_segment(form: Recurrence, of: Callable[[Case], Case]) -> None:
    case, head = of(bfloat16(form, (1_000_000,))), 1000
    inputs = draw(case)
    made = results(kernels, case, inputs)
    for name, x in made.items():
        assert x.isfinite().all(), name
    short = replace(case, lengths=(head,), final=False)
    few = {name: x[:head] if x.shape[0] == 1_000_000 else x for name, x in inputs.items()}
    wide = {name: x.double() for name, x in few.items()}
    assert_within_budget(
        {"output": made["output"][:head]},
        {"output": chunked(short, few)[0]},
        {"output": chunked(short, wide)[0]},
    )


@every_family
@pytest.mark.parametrize(("K", "V"), [(256, 16), (16, 256)])
def test_tensors_past_the_int32_offsets(form: Recurrence, K: int, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last segment, past 2^31 numbers, is what it is alone."""
    length, dtype = 4096, torch.bfloat16
    count = 2**31 // 256 // length + 2
    S = count * length
    free, _ = torch.cuda.mem_get_info()
    # Inputs, gradients, and what a decay a channel takes beside them: in float32, and of q and k.
    needed = 2**31 * (24 if form.decay is Decay.VECTOR and K == 256 else 16)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    # Never split: alone a segment is cut where among others it is not, and rounded otherwise.
    use_processors(monkeypatch, form, 1)
    make = {"device": DEVICE, "dtype": dtype}
    inputs = {"q": torch.randn(S, 1, K, **make), "k": torch.randn(S, 1, K, **make), "v": torch.randn(S, 1, V, **make)}
    if form.erase is Erase.DELTA:
        inputs["k"].mul_(K**-0.5 / 2)
        inputs["beta"] = torch.rand(S, 1, device=DEVICE)
    last = (K,) if form.decay is Decay.VECTOR else ()
    inputs["log_decay"] = torch.rand(S, 1, *last, device=DEVICE).mul_(-0.1)
    d_output = torch.randn(S, 1, V, **make)

    def run(tensors: dict[str, Tensor], seed: Tensor, segments: int) -> dict[str, Tensor]:
        learned = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        borders = torch.arange(segments + 1, device=DEVICE) * length
        output, final_state = library.scan(
            **{"beta": None} | learned, decay=form.decay, scale=K**-0.5, initial_state=None, cu_seqlens=borders,
            max_length=length, dense=True, return_final_state=True,
        )  # fmt: skip
        assert final_state is not None
        gradients = torch.autograd.grad(output, list(learned.values()), seed)
        made = {"output": output.detach()} | dict(zip(learned, gradients, strict=True))
        return {name: x[-length:].clone() for name, x in made.items()} | {"final_state": final_state[-1:].detach()}

    alone = run({name: x[-length:].clone() for name, x in inputs.items()}, d_output[-length:].clone(), 1)
    assert all(x.any() for x in alone.values())
    assert_same_bits(run(inputs, d_output, count), alone)


def long_and_short(form: Recurrence, of: Callable[[Case], Case]) -> Case:
    """Both ways of a walk: a segment that is split, and some that are not."""
    return of(bfloat16(form, (3000, 0, 70, 1), heads=2, spare=3))


@every_pass
def test_a_hundred_times_the_same_bits(form: Recurrence, of: Callable[[Case], Case]) -> None:
    case = long_and_short(form, of)
    inputs = draw(case)
    once = results(kernels, case, inputs)
    for _ in range(100):
        assert_same_bits(once, results(kernels, case, inputs))


class _Captured:
    """A forward and, of a case that learns, backward pass over tensors that stay where they are."""

    def __init__(self, case: Case, inputs: dict[str, Tensor]) -> None:
        self.case, self.borders = case, case.cu_seqlens
        self.tensors = {
            name: x.clone().requires_grad_(case.learns and not (name == "log_decay" and case.form.decay is Decay.HEAD))
            for name, x in inputs.items()
        }
        self.d_output = torch.randn(case.num_tokens, case.heads, case.V).to(DEVICE, case.dtype)
        self.d_final = torch.randn(len(case.lengths), case.heads, case.K, case.V).to(DEVICE)

    def run(self) -> dict[str, Tensor]:
        case = self.case
        output, final_state = library.scan(
            **{"log_decay": None, "beta": None} | self.tensors, decay=case.form.decay, scale=0.125,
            cu_seqlens=self.borders, max_length=case.max_length, dense=case.dense, return_final_state=True,
        )  # fmt: skip
        made = {"output": output.detach(), "final_state": final_state.detach()}
        wanted = {name: x for name, x in self.tensors.items() if x.requires_grad}
        if not wanted:
            return made
        gradients = torch.autograd.grad((output, final_state), list(wanted.values()), (self.d_output, self.d_final))
        return made | dict(zip(wanted, gradients, strict=True))


@every_pass
def test_nothing_waits_for_the_gpu(form: Recurrence, of: Callable[[Case], Case]) -> None:
    dense = bfloat16(form, (70, 9), dense=True)
    for case in (long_and_short(form, of), of(dense)):
        passes = _Captured(case, draw(case))
        passes.run()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            passes.run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@every_pass
def test_a_captured_graph_gives_the_same_numbers(form: Recurrence, of: Callable[[Case], Case]) -> None:
    """On new inputs too: other numbers and other lengths, where the old ones stood."""
    case = long_and_short(form, of)
    passes = _Captured(case, draw(case))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            passes.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes.run()
    for lengths in (case.lengths, (500, 2000, 0, 570)):
        with torch.no_grad():
            for name, x in draw(case).items():
                passes.tensors[name].copy_(x)
            passes.d_output.normal_()
            passes.borders.copy_(replace(case, lengths=lengths).cu_seqlens)
        graph.replay()
        replayed = {name: x.clone() for name, x in captured.items()}
        assert_same_bits(replayed, passes.run())


def test_more_stages_than_fit_are_fewer() -> None:
    case = bfloat16(Recurrence(), (200, 64), K=128, V=128)
    inputs, arguments = draw(case), ("turned", "none", 128, 128, torch.bfloat16)
    plain = results(kernels, case, inputs)
    with trying(scalar_scan.TABLE, arguments, scalar_scan.TABLE.frozen(*arguments)._replace(num_stages=9)):
        made = results(kernels, case, inputs)
    assert_same_bits(made, plain)
