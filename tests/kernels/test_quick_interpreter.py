"""What the quick interpreter makes at once is what Triton's own makes of the same."""

from __future__ import annotations

import itertools
import os
from types import FunctionType
from typing import Any

import numpy
import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")

PLAIN = TritonSemantic(interpreter.interpreter_builder)
"""What Triton itself makes."""
QUICK = interpreter.interpreter_semantic
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
    slow, quick = getattr(PLAIN, name), getattr(QUICK, name)
    assert name in vars(QUICK) and name not in vars(PLAIN), "the quick one is not installed"
    numbers = (3, -6, 0, 2.5, True, 2**31 - 1, 2**31, -(2**40))
    more = (False,) if name in ("add", "sub", "mul") else ()
    pairs = [
        *itertools.product(tiles(), tiles()),
        *itertools.product(tiles(), numbers),
        *itertools.product(numbers, tiles()),
    ]
    with numpy.errstate(all="ignore"):
        for x, y in pairs:
            expected = outcome(slow, x, y, *more)
            assert outcome(quick, x, y, *more) == expected, (name, x, y)


def test_casts_are_the_same() -> None:
    for x, dtype in itertools.product(tiles(), (*DTYPES, core.float16, core.int1)):
        assert outcome(QUICK.cast, x, dtype) == outcome(PLAIN.cast, x, dtype), (x, dtype)


def test_dimensions_are_put_in_as_before() -> None:
    for x, axis in itertools.product(tiles(), range(-1, 4)):
        assert outcome(QUICK.expand_dims, x, axis) == outcome(PLAIN.expand_dims, x, axis), (x, axis)


def test_two_are_made_of_one_shape_as_before() -> None:
    def one(semantic: TritonSemantic, x: core.tensor, y: core.tensor, which: int) -> core.tensor:
        return semantic.broadcast_impl_value(x, y)[which]

    for x, y, which in itertools.product(tiles(), tiles(), (0, 1)):
        assert outcome(one, QUICK, x, y, which) == outcome(one, PLAIN, x, y, which), (x, y, which)


def test_pointers_move_as_before() -> None:
    pointers = [
        tile(shape, core.pointer_type(dtype), "uint64")
        for shape in SHAPES
        for dtype in (core.int1, core.float16, core.float32, core.float64)
    ]
    with numpy.errstate(all="ignore"):
        for x, y in [*itertools.product(pointers, [*tiles(), 3, -6]), *itertools.product(tiles(), pointers)]:
            expected = outcome(PLAIN.add, x, y, False)
            assert outcome(QUICK.add, x, y, False) == expected, (x, y)


def test_functions_that_are_compiled_to_the_same_run_on_names_of_their_own() -> None:
    """One is rewritten, and each finds what its own module has."""

    def run(factor: int) -> int:
        found: list[int] = []
        names = {"factor": factor, "keep": found.append}
        function = FunctionType(scaled.__code__, names, "scaled")
        interpreter.InterpretedFunction(function).rewrite()(2)
        return found[0]

    assert [run(3), run(5)] == [6, 10]


def scaled(x: int) -> None:
    keep(factor * x)  # type: ignore[name-defined]  # noqa: F821


def test_masks_meet_as_before() -> None:
    masks = [
        core.tensor(interpreter.TensorHandle(numpy.arange(8) % step == 0, core.int1), core.block_type(core.int1, [8]))
        for step in (2, 3)
    ]
    assert outcome(QUICK.and_, *masks) == outcome(PLAIN.and_, *masks)
