"""Triton's interpreter in a third of the time: without what it does again and again, and without checks of what can't be.

Kernels are the same, and so is every number. The names are the interpreter's own, of the Triton that the tests install.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy
from triton.runtime import interpreter


def install() -> None:
    """For every kernel that this process runs from now on."""
    _replace_language_once_a_launch()
    _look_up_dtypes_once()
    _make_shapes_once()
    _call_builtins_at_once()
    _compute_with_what_is_alike()
    # Every sum of integers is made again in 64 bits, to see whether 32 were enough. Of tests' sizes they are.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    # What NumPy made has numbers of its dtype's size.
    interpreter.TensorHandle.__post_init__ = lambda self: None  # type: ignore[method-assign]


def _replace_language_once_a_launch() -> None:
    """The interpreter puts functions of its own in the language's place when a kernel begins, and at every call of another
    function again, where they are already: it goes through hundreds of names to find none that is left to replace.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages_of: dict[FunctionType, frozenset[str]] = {}
    replaced: set[str] = set()

    def patch_once(function: FunctionType) -> Any:
        languages = languages_of.get(function)
        if languages is None:
            known = [x for x in function.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core]
            languages = languages_of[function] = frozenset(x.__name__ for x in known)
        if languages and languages <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(languages)
        return patch(function)

    def launch_anew(*arguments: Any, **options: Any) -> None:
        # At its end a launch puts the language back.
        replaced.clear()
        launch(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


def _look_up_dtypes_once() -> None:
    """The interpreter makes its table of dtypes anew for every tile."""
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = looked_up


def _make_shapes_once() -> None:
    """Every tile, and every tile's type, makes and checks its shape anew, of which there are a few dozen."""
    core = interpreter.tl.core
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def begin_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size if type(size) is int else size.value for size in shape])
        if sizes not in shapes:
            make_type(self, element_ty, shape)
            shapes[sizes] = (self.shape, self.numel, str(self.shape))
        self.element_ty = element_ty
        self.shape, self.numel, name = shapes[sizes]
        self.name = f"<{name}, {element_ty}>"

    def begin_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[sizes] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    core.block_type.__init__, core.tensor.__init__ = begin_type, begin_tensor


def _call_builtins_at_once() -> None:
    """A builtin is called through two functions that see to one argument, and asks of every other argument in four ways whether
    it is a constant. And at every launch all names of the language are gone through to find which are builtins.
    """
    core, unwrap = interpreter.tl.core, interpreter.tl.core._unwrap_if_constexpr
    plain = {core.tensor, int, float, bool, str, type(None)}

    def unwrapped(x: Any) -> Any:
        return x if type(x) in plain else x.value if type(x) is core.constexpr else unwrap(x)

    def direct(member: Any) -> Callable[..., Any]:
        function = getattr(member, "__wrapped__", member)

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **options)

        return call

    builtins_of: dict[Any, list[tuple[str, Callable[..., Any]]]] = {}

    def patch_builtins(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in builtins_of:
            members = inspect.getmembers(owner)
            builtins_of[owner] = [(name, direct(member)) for name, member in members if core.is_builtin(member)]
        for name, call in builtins_of[owner]:
            scope.set_attr(owner, name, call)

    core._unwrap_if_constexpr, interpreter._patch_builtin = unwrapped, patch_builtins


def _compute_with_what_is_alike() -> None:
    """Of a sum the interpreter asks for two types in a dozen ways, and makes of a number a tile, which is cast and broadcast.
    What NumPy makes of tiles and numbers of one kind, or of integers of 32 and of 64 bits, is the same at once.
    """
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    integers, floats = (core.int32, core.int64), (core.float32, core.float64)
    of_both = {(x.name, x.name): x for x in (*integers, *floats)}
    of_both |= {(x.name, y.name): core.int64 for x in integers for y in integers if x is not y}
    of_number = {(x.name, int): x for x in (*integers, *floats)} | {(x.name, float): x for x in floats}
    of_masks = {("int1", "int1"): core.int1}

    def kind_of(x: Any, y: Any, both: Any, number: Any) -> Any:
        """The dtype in which NumPy computes with x and y as the interpreter does, if it does."""
        if type(x) is core.tensor:
            if type(y) is core.tensor:
                return both.get((x.dtype.name, y.dtype.name))
            return number.get((x.dtype.name, type(y))) if type(y) is float or abs(y) < 2**31 else None
        return kind_of(y, x, both, number) if type(y) is core.tensor else None

    def quicken(name: str, compute: Callable[[Any, Any], Any], both: Any, number: Any, made: Any = None) -> None:
        slow = getattr(semantic, name)

        def quick(x: Any, y: Any, *rest: Any, **options: Any) -> Any:
            dtype = kind_of(x, y, both, number)
            if dtype is None:
                return slow(x, y, *rest, **options)
            tiles = [z for z in (x, y) if type(z) is core.tensor]
            data = compute(*(z.handle.data if type(z) is core.tensor else z for z in (x, y)))
            dtype = made or dtype
            type_of = core.block_type(dtype, [*data.shape]) if any(z.type.is_block() for z in tiles) else dtype
            return core.tensor(interpreter.TensorHandle(data, dtype), type_of)

        setattr(semantic, name, quick)

    sums = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}
    comparisons = {
        "less_than": numpy.less,
        "less_equal": numpy.less_equal,
        "greater_than": numpy.greater,
        "greater_equal": numpy.greater_equal,
        "equal": numpy.equal,
        "not_equal": numpy.not_equal,
    }
    for name, compute in sums.items():
        quicken(name, compute, of_both, of_number)
    for name, compute in comparisons.items():
        quicken(name, compute, of_both, of_number, core.int1)
    quicken("and_", numpy.logical_and, of_masks, {})
