"""What holds for every form's kernels, whatever the numbers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES, Case, check, draw, kernels, module_of, piece_length, results
from poison import poisoned_memory
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import delta_forward, piece_reads
from linear_moe.kernels.splits import Ragged

Patch = pytest.MonkeyPatch
Law = Callable[[Recurrence, torch.dtype, Patch], None]


def use_processors(patch: Patch, form: Recurrence, count: int) -> None:
    """Split as on a GPU of so many multiprocessors."""
    for module in {module_of(form), module_of(form, 256, 256, torch.bfloat16)}:
        patch.setattr(module, "num_processors", lambda device: count)


def ragged(form: Recurrence, dtype: torch.dtype, **changes: Any) -> Case:
    """Segments of no token, of less than a chunk and of more, and tokens in none."""
    case = Case(form, (20, 0, 40, 1), 2, 1, K=17, V=10, spare=3, dtype=dtype)
    return replace(widened(case), **changes)


def widened(case: Case) -> Case:
    """Keys of the delta rules in 16 bits are not narrow: many that are nearly parallel have tests of their own."""
    if case.form.erase is Erase.NONE or case.dtype == torch.float32 or DEVICE == "cpu":
        return case
    return replace(case, K=case.K + 32, V=case.V + 16)


def long_enough_to_split(form: Recurrence, dtype: torch.dtype, patch: Patch) -> Case:
    """A case of which one segment is cut into several pieces."""
    use_processors(patch, form, 8)
    stored = piece_reads.takes(16, 12, dtype)
    longest = 200 if stored or form.decay is Decay.VECTOR or dtype != torch.float32 else 104
    if stored and dtype != torch.float32:
        longest = 800
    case = widened(Case(form, (0, longest, 1), K=16, V=12, spare=2, rate=0.2, dtype=dtype))
    length = piece_length(case)
    assert length is not None and length < longest, "the case was meant to be split"
    return case


def clean(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and what comes of them. Of one case, and one choice of the kernels, the splits are always the same."""
    return _clean(case, piece_reads.takes, delta_forward.takes)


@functools.cache
def _clean(case: Case, *choice: Callable[..., bool]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = draw(case)
    return inputs, results(kernels, case, inputs)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def splits_change_nothing(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    case = long_enough_to_split(form, dtype, patch)
    check(case)
    check(replace(case, heads=2, initial=False, final=False, tight=True))


def either_result_alone(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    """A loss of only the output or only the final state."""
    for name in ("output", "final_state"):
        check(ragged(form, dtype, lengths=(20, 0, 37), heads=1, used=(name,)))


def same_bits_twice(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    for case in (ragged(form, dtype), long_enough_to_split(form, dtype, patch)):
        inputs, once = clean(case)
        assert_same_bits(once, results(kernels, case, inputs))


def strides_change_nothing(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    case = ragged(form, dtype)
    inputs, together = clean(case)
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in apart.values())
    assert_same_bits(together, results(kernels, case, apart))


def spare_tokens_are_not_read(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    """Nor are their outputs' gradients. What is made for them is 0."""
    for case in (ragged(form, dtype), long_enough_to_split(form, dtype, patch)):
        inputs, expected = clean(case)
        spare = slice(case.num_tokens - case.spare, None)
        inputs = {name: x.clone() for name, x in inputs.items()}
        for name, x in inputs.items():
            if name != "initial_state" and x.dim() > 1:
                x[spare] = torch.nan
        poisoned = results(kernels, case, inputs, seed_of_spare=torch.nan)
        assert_same_bits(expected, poisoned)
        for name, x in poisoned.items():
            if x.shape[0] == case.num_tokens:
                assert not x[spare].any(), name


def memory_is_written_before_it_is_read(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    for case in (
        ragged(form, dtype),
        ragged(form, dtype, heads=1, initial=False),
        long_enough_to_split(form, dtype, patch),
    ):
        inputs, expected = clean(case)
        with poisoned_memory():
            assert_same_bits(expected, results(kernels, case, inputs))


def a_nan_stays_in_its_segment(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    split = long_enough_to_split(form, dtype, patch)
    for case, ill in ((ragged(form, dtype), 2), (split, 1), (split, 2)):
        inputs, expected = clean(case)
        borders = case.cu_seqlens.tolist()
        token = (borders[ill] + borders[ill + 1]) // 2
        inputs = {name: x.clone() for name, x in inputs.items()}
        for name, x in inputs.items():
            if name == "initial_state":
                x[ill] = torch.nan
            elif x.dim() > 1:
                x[token] = torch.nan
        with warnings.catch_warnings():
            # numpy, which the interpreter is, warns of a least number of nothing but NaN.
            warnings.simplefilter("ignore", RuntimeWarning)
            poisoned = results(kernels, case, inputs)
        assert poisoned["output"][token].isnan().any()
        for name, x in poisoned.items():
            here = slice(borders[ill], borders[ill + 1]) if x.shape[0] == case.num_tokens else slice(ill, ill + 1)
            others = torch.ones(len(x), dtype=torch.bool, device=x.device)
            others[here] = False
            assert x[others].isfinite().all(), name
            assert torch.equal(x[others], expected[name][others]), name


def chunks_in_full_change_nothing(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    """Where sizes say that no chunk is cut off, kernels have no masks: whole segments, and split ones."""
    length = 256 if piece_reads.takes(16, 12, dtype) and dtype != torch.float32 else 64
    whole = widened(Case(form, (length, length), 2, 1, K=17, V=10, dense=True, tight=True, dtype=dtype))
    split = replace(whole, lengths=(4 * length,), heads=1, rate=0.2)
    for case, processors in ((whole, 1), (split, 8)):
        use_processors(patch, form, processors)
        assert Ragged(case.cu_seqlens, case.max_length, case.dense).in_full(case.num_tokens, length)
        assert (piece_length(case) is None) == (processors == 1)
        check(case)
        if DEVICE == "cpu":
            inputs = draw(case)
            full = results(kernels, case, inputs)
            with patch.context() as masked:
                masked.setattr(Ragged, "in_full", lambda self, num_tokens, length: False)
                assert_same_bits(full, results(kernels, case, inputs))


def widths_of_three_tiles_are_within_the_budget(form: Recurrence, dtype: torch.dtype, patch: Patch) -> None:
    """Whole tiles need no mask, but the fourth of their block is past the width."""
    width = 96 if dtype == torch.float32 else 192
    case = widened(Case(form, (20, 3), 2, 1, rate=0.1, spare=2, dtype=dtype))
    for K, V in ((width, 16), (16, width)):
        with poisoned_memory():
            check(replace(case, K=K, V=V))


LAWS: list[Law] = [
    splits_change_nothing,
    chunks_in_full_change_nothing,
    widths_of_three_tiles_are_within_the_budget,
    either_result_alone,
    same_bits_twice,
    strides_change_nothing,
    spare_tokens_are_not_read,
    memory_is_written_before_it_is_read,
    a_nan_stays_in_its_segment,
]


def every_law(test: Callable[..., None]) -> Callable[..., None]:
    """Every law in every dtype; without a GPU, in float32."""
    dtypes = pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:1], ids=str)
    return dtypes(pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)(test))
