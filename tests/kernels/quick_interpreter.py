"""Triton's interpreter in a sixth of the time: without what it does again and again, and without checks of what can't be.

Kernels are the same, and so is every number. The names are the interpreter's own, of the Triton that the tests install.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

import numpy
from triton.runtime import interpreter

_types: dict[tuple[str, tuple[int, ...]], Any] = {}


def _tile(data: Any, dtype: Any) -> Any:
    """Of these numbers, of a dtype of the language."""
    key = (dtype.name, data.shape)
    if key not in _types:
        _types[key] = interpreter.tl.core.block_type(dtype, [*data.shape])
    return interpreter.tl.core.tensor(interpreter.TensorHandle(data, dtype), _types[key])


def install() -> None:
    """For every kernel that this process runs from now on."""
    _rewrite_what_is_alike_once()
    _replace_language_once()
    _look_up_dtypes_once()
    _make_shapes_once()
    _call_builtins_at_once()
    _compute_with_what_is_alike()
    _shape_at_once()
    # Every sum of integers is made again in 64 bits, to see whether 32 were enough. Of tests' sizes they are.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    # What NumPy made has numbers of its dtype's size.
    interpreter.TensorHandle.__post_init__ = lambda self: None  # type: ignore[method-assign]


def _rewrite_what_is_alike_once() -> None:
    """A function is read, parsed and rewritten before it is first run, as often as its module is loaded. Functions that Python
    compiles to the same are rewritten to the same.
    """
    rewriter = interpreter.FunctionRewriter
    rewrite, rewritten = rewriter.rewrite_ast, dict[CodeType, CodeType]()

    def rewrite_once(self: Any) -> Any:
        return run(self, rewritten[self.fn.__code__]) if self.fn.__code__ in rewritten else rewrite(self)

    def compile_and_keep(self: Any, tree: ast.Module) -> Any:
        code = rewritten[self.fn.__code__] = compile(tree, filename=self.filename, mode="exec")
        return run(self, code)

    def run(self: Any, code: CodeType) -> Any:
        names, made = self.fn.__globals__, dict(self.kwargs)
        names.update({name: value for name, value in vars(interpreter).items() if name not in names})
        exec(code, names, made)
        return made[self.fn.__name__]

    rewriter.rewrite_ast, rewriter._compile_and_exec = rewrite_once, compile_and_keep


def _replace_language_once() -> None:
    """The interpreter puts functions of its own in the language's place when a kernel begins, and at every call of another
    function again, where they are already, and takes them away when it ends. Here they stay.
    """
    patch = interpreter._patch_lang
    languages_of: dict[FunctionType, frozenset[str]] = {}
    replaced: set[str] = set()

    def patch_once(function: FunctionType) -> Any:
        languages = languages_of.get(function)
        if languages is None:
            known = [x for x in function.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core]
            languages = languages_of[function] = frozenset(x.__name__ for x in known)
        if not languages <= replaced or not replaced:
            replaced.update(languages)
            patch(function)
        # What would be put back when a launch ends.
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


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
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, name = shapes[sizes]
        self.name = f"<{name}, {element_ty}>"

    def begin_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if type.is_block() else ()
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
    wraps = (list, tuple, core.tuple, core.constexpr)
    is_plain: dict[type, bool] = {}

    def unwrapped(x: Any) -> Any:
        kind = type(x)
        if kind not in is_plain:
            is_plain[kind] = not issubclass(kind, wraps)
        return x if is_plain[kind] else x.value if kind is core.constexpr else unwrap(x)

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

    def quicken(name: str, compute: Callable[[Any, Any], Any], both: Any, number: Any, result: Any = None) -> None:
        slow, tensor = getattr(semantic, name), core.tensor

        def kind_with_number(x: Any, y: Any) -> Any:
            """The dtype in which NumPy computes with a tile and a number as the interpreter does, if it does."""
            return number.get((x.dtype.name, type(y))) if type(y) is float or abs(y) < 2**31 else None

        def quick(x: Any, y: Any, *rest: Any, **options: Any) -> Any:
            if type(x) is tensor:
                of_x, block = x.handle.data, x.type.is_block()
                if type(y) is tensor:
                    of_y, block = y.handle.data, block or y.type.is_block()
                    dtype = both.get((x.dtype.name, y.dtype.name))
                else:
                    of_y, dtype = y, kind_with_number(x, y)
            elif type(y) is tensor:
                of_x, of_y, block, dtype = x, y.handle.data, y.type.is_block(), kind_with_number(y, x)
            else:
                dtype = None
            if dtype is None:
                return slow(x, y, *rest, **options)
            data, dtype = compute(of_x, of_y), result or dtype
            return _tile(data, dtype) if block else tensor(interpreter.TensorHandle(data, dtype), dtype)

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


def _shape_at_once() -> None:
    """Shapes of two tiles are compared number by number, as constants of the language, where they are one; and a pointer and
    its offsets are made tiles of one shape before they are added, which NumPy does by itself.
    """
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    slow_broadcast, slow_expand, slow_cast, slow_add = (
        getattr(semantic, name) for name in ("broadcast_impl_value", "expand_dims", "cast", "add")
    )
    offsets = (core.int32, core.int64)
    casts = {("fp32", "fp64"), ("fp64", "fp32"), ("int32", "int64")}

    def broadcast(x: Any, y: Any) -> Any:
        shapes = [z.handle.data.shape for z in (x, y) if z.type.is_block()]
        if not shapes or shapes[1:] == shapes[:1]:
            return x, y
        try:
            shape = numpy.broadcast_shapes(*shapes)
        except ValueError:
            return slow_broadcast(x, y)
        return tuple(
            z
            if z.type.is_block() and z.handle.data.shape == shape
            else _tile(numpy.full(shape, z.handle.data, z.handle.data.dtype), z.dtype)
            for z in (x, y)
        )

    def expand(x: Any, axis: int) -> Any:
        if not x.type.is_block() or not 0 <= axis <= x.handle.data.ndim:
            return slow_expand(x, axis)
        shape = x.handle.data.shape
        return _tile(x.handle.data.reshape(*shape[:axis], 1, *shape[axis:]), x.dtype)

    def cast(x: Any, dtype: Any, *rest: Any, **options: Any) -> Any:
        old, new = x.dtype, dtype.scalar
        if old is new:
            return x
        if (old.name, new.name) in casts and x.type.is_block():
            return _tile(x.handle.data.astype(interpreter._get_np_dtype(new)), new)
        return slow_cast(x, dtype, *rest, **options)

    def add(x: Any, y: Any, *rest: Any, **options: Any) -> Any:
        if not (type(x) is type(y) is core.tensor and type(x.dtype) is core.pointer_type and y.dtype in offsets):
            return slow_add(x, y, *rest, **options)
        width = max(1, x.dtype.element_ty.primitive_bitwidth // 8)
        try:
            data = x.handle.data + width * y.handle.data.astype(numpy.uint64)
        except ValueError:
            return slow_add(x, y, *rest, **options)
        if x.type.is_block() or y.type.is_block():
            return _tile(data, x.dtype)
        return core.tensor(interpreter.TensorHandle(data, x.dtype), x.type)

    semantic.broadcast_impl_value, semantic.expand_dims, semantic.cast, semantic.add = broadcast, expand, cast, add
