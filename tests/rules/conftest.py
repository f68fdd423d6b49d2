"""fla-core's plain PyTorch recurrences, the oracle that nobody here wrote."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from linear_moe.testing.laws import require_all_close
from linear_moe.testing.rule_inputs import Run, differentiate

FLA_TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""They compute in float32, whatever they are given, along some dozens of tokens."""

Loader = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def fla() -> Loader:
    """Loads the module `fla.ops.<name>.naive`, without the package around it, which imports every kernel."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        if sys.platform == "linux":
            pytest.fail("fla-core is missing: it is the oracle of the ops and a development dependency")
        pytest.skip("fla-core is installed on Linux only")
    folder = Path(package.submodule_search_locations[0])

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"fla_naive_{name}", folder / "ops" / name / "naive.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


Recurrence = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def same_as_fla() -> Callable[[Recurrence, Recurrence, Mapping[str, Tensor]], None]:
    """Asserts that two functions of the same float64 tensors give the same output, final state and gradients."""

    def compare(ours: Recurrence, theirs: Recurrence, tensors: Mapping[str, Tensor]) -> None:
        results = []
        for function, dtype in ((ours, torch.float64), (theirs, torch.float32)):
            leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
            run = Run(*(x.double() for x in function(**{name: x.to(dtype) for name, x in leaves.items()})))
            results.append(differentiate(run, leaves))
        require_all_close(*results, tolerance=FLA_TOLERANCE)

    return compare
