"""Triton's interpreter in half the time: without what it does again and again, and without a check for what can't happen here.

Kernels are the same, and so is every number. The names are the interpreter's own, of the Triton that the tests install.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """For every kernel that this process runs from now on."""
    _replace_language_once_a_launch()
    _look_up_dtypes_once()
    _make_shapes_once()
    # Every sum of integers is made again in 64 bits, to see whether 32 were enough. Of tests' sizes they are.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


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
        sizes = tuple(size if type(size) is int else size.value for size in shape)
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
