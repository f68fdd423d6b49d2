"""What the quick interpreter makes at once is what Triton's own makes of the same."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy
import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")

NAMES = ("add", "sub", "mul", "less_than", "less_equal", "greater_than", "greater_equal", "equal", "not_equal")
DTYPES = {core.int32: "int32", core.int64: "int64", core.float32: "float32", core.float64: "float64"}
SHAPES = ((), (8,), (4, 8), (4, 1), (1, 8))


def tile(shape: tuple[int, ...], dtype: core.dtype, numpy_dtype: str) -> core.tensor:
    """Of numbers from -6 on, so that tiles have equal ones."""
    data = (numpy.arange(numpy.prod(shape, dtype=int)) * 3 % 11 - 6).astype(numpy_dtype).reshape(shape or (1,))
    return core.tensor(interpreter.TensorHandle(data, dtype), core.block_type(dtype, [*shape]) if shape else dtype)


def tiles() -> list[core.tensor]:
    return [tile(shape, *dtype) for shape in SHAPES for dtype in DTYPES.items()]


def outcome(compute: Any, *given: Any) -> Any:
    """Its type and numbers, or that there is none."""
    try:
        made = compute(*given)
    except Exception as error:
        return type(error).__name__
    return str(made.type), str(made.handle.data.dtype), made.handle.data.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_of_tiles_and_numbers_is_the_same(name: str) -> None:
    slow, quick = getattr(TritonSemantic, name), getattr(interpreter.interpreter_semantic, name)
    assert name in vars(interpreter.interpreter_semantic), "the quick one is not installed"
    numbers = (3, -6, 0, 2.5, True, 2**31 - 1, 2**31, -(2**40))
    more = (False,) if name in ("add", "sub", "mul") else ()
    pairs = [
        *itertools.product(tiles(), tiles()),
        *itertools.product(tiles(), numbers),
        *itertools.product(numbers, tiles()),
    ]
    with numpy.errstate(all="ignore"):
        for x, y in pairs:
            expected = outcome(slow, interpreter.interpreter_semantic, x, y, *more)
            assert outcome(quick, x, y, *more) == expected, (name, x, y)


def test_masks_meet_as_before() -> None:
    masks = [
        core.tensor(interpreter.TensorHandle(numpy.arange(8) % step == 0, core.int1), core.block_type(core.int1, [8]))
        for step in (2, 3)
    ]
    semantic = interpreter.interpreter_semantic
    assert outcome(semantic.and_, *masks) == outcome(TritonSemantic.and_, semantic, *masks)
