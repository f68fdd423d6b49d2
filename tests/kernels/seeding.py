"""Kernels with a bug put in, each in a module of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from cases import DEVICE, Case, check
from poison import poisoned_memory

from linear_moe.kernels import (
    delta_walks,
    gated_deltanet,
    gla_walks,
    library,
    parallel_scan,
    piece_gradients,
    piece_reads,
    scalar_walks,
    turned_scan,
)

in_the_interpreter = pytest.mark.skipif(
    DEVICE == "cuda", reason="a wild store would end the process; seeded bugs run in the interpreter"
)
_numbers = itertools.count()
LAUNCHED = (
    delta_walks,
    gla_walks,
    piece_reads,
    piece_gradients,
    scalar_walks,
    turned_scan,
    parallel_scan,
    gated_deltanet,
)
"""Modules of kernels that others launch, and of what launches some for others."""


class Bug(NamedTuple):
    """A text of a module replaced."""

    module: ModuleType
    """Whose text: the kernels', or that of a module whose functions they use."""
    right: str
    wrong: str
    count: int = 1
    """How often the text stands there."""


def _load(module: ModuleType, folder: Path, change: Callable[[str], str]) -> ModuleType:
    """A copy of a module with its source changed."""
    assert module.__file__ is not None
    name = f"seeded_{module.__name__.rpartition('.')[2]}_{next(_numbers)}"
    # A file of its own: triton reads a kernel's source from it.
    file = folder / f"{name}.py"
    file.write_text(change(Path(module.__file__).read_text(encoding="utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    return copy


def seed(kernels: ModuleType, bug: Bug | None, folder: Path) -> ModuleType:
    """A copy of `kernels` that has the bug, or, without one, none."""

    def change(source: str) -> str:
        if bug is None:
            return source
        assert source.count(bug.right) == bug.count, bug.right
        return source.replace(bug.right, bug.wrong)

    if bug is None or bug.module is kernels:
        return _load(kernels, folder, change)
    copies = {bug.module: _load(bug.module, folder, change)}
    # What launches a kernel that uses the module is to launch a copy that uses its copy.
    for module in (*LAUNCHED, kernels):
        uses = {
            name: vars(changed)[name]
            for original, changed in copies.items()
            for name, x in vars(original).items()
            if callable(x) and vars(module).get(name) is x and module is not original and name in vars(changed)
        }
        if uses and module not in copies:
            copies[module] = _load(module, folder, lambda source: source)
            vars(copies[module]).update(uses)
    assert kernels in copies, "the kernels use nothing of that module"
    return copies[kernels]


def seed_operator(kernels: ModuleType, bug: Mapping[str, str], folder: Path) -> ModuleType:
    """A copy of a module with an operator, and maybe its backward pass's, under a name of their own, with texts replaced."""

    def change(source: str) -> str:
        name, *others = re.findall(r"operator\(\"(\w+)\"", source)
        assert others in ([], [f"{name}_backward"])
        own = f"seeded_{next(_numbers)}_{name}"
        source = source.replace(f'"{name}', f'"{own}').replace(f"linear_moe::{name}", f"linear_moe::{own}")
        for right, wrong in bug.items():
            assert source.count(right) == 1, right
            source = source.replace(right, wrong)
        return source

    return _load(kernels, folder, change)


@contextlib.contextmanager
def over_the_budget(*others: str) -> Iterator[None]:
    """What is checked inside is to be over the error budget, or to break one of the `others`, patterns of what is said then.

    Memory that a bug leaves unwritten holds no right number there.
    """
    # numpy, which the interpreter is, warns of numbers that a bug makes overflow, or that nothing was written over.
    with warnings.catch_warnings(), poisoned_memory():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(AssertionError, match="|".join(["over the error budget", *others])):
            yield


def assert_caught(
    kernels: ModuleType, bug: Bug | None, case: Case, folder: Path, patch: pytest.MonkeyPatch, **given: object
) -> None:
    """The error budget is exceeded by the kernels with the bug; without one the copy keeps it.

    `given` are names of the copy that are to be something else in it.
    """
    copy = seed(kernels, bug, folder)
    vars(copy).update(given)
    patch.setattr(library, kernels.__name__.rpartition(".")[2], copy)
    if bug is None:
        check(case)
        return
    with over_the_budget():
        check(case)
