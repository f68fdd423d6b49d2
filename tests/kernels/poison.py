"""Memory that shows when it is read before it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*arguments: Any, **keywords: Any) -> Tensor:
        x = make(*arguments, **keywords)
        return x.fill_(torch.nan if x.is_floating_point() else 1)

    return poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, whichever module makes them; of integers, 1: a wrong place, but in bounds."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(place, name, _poisoning(getattr(place, name)))
        yield
