"""What makes two runs differ: the global sources of random numbers, and algorithms that do not repeat their own bits."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import torch

from linear_moe.models.extras import require


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    require("numpy", extra="train").random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of torch on the CPU and on `device`, of numpy and of Python: what `torch.load(weights_only=True)` takes."""
    numpy = require("numpy", extra="train")
    name, keys, position, has_gauss, gauss = numpy.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [name, torch.tensor(keys.astype("int64")), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(internal), next_gauss],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` saved. A GPU's is left alone if it was saved on a machine without one."""
    numpy = require("numpy", extra="train")
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), next_gauss))


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, torch takes only algorithms that give the same bits each time.

    Raises:
        ValueError: where it has none.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads this when it is first used; without it torch refuses matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not wanted or "deterministic" not in str(error):
            raise
        raise ValueError(
            f"deterministic: torch has no such algorithm for a step of this model: {str(error).splitlines()[0]} "
            f"Another precision or impl may do without that step"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
