"""The kernel of the loss, against PyTorch's in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from poison import poisoned_memory
from seeding import Bug, in_the_interpreter, seed
from torch import Tensor

from linear_moe.kernels import cross_entropy as kernels
from linear_moe.kernels.cross_entropy_operator import cross_entropy_

SHAPES = [(0, 5), (1, 1), (3, 2), (5, 100), (2, 4096), (3, 4097), (2, 9000)]


def _inputs(rows: int, choices: int, dtype: torch.dtype, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + choices)
    logits = spread * torch.randn(rows, choices, generator=generator)
    labels = torch.randint(choices, (rows,), generator=generator)
    if rows > 1:
        # At both ends of a block.
        labels[0], labels[1] = choices - 1, min(4095, choices - 1)
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def _wanted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    return losses.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "choices"), SHAPES)
def test_losses_and_gradients(rows: int, choices: int, dtype: torch.dtype) -> None:
    logits, labels = _inputs(rows, choices, dtype)
    losses, gradient = _wanted(logits, labels)
    kept = logits.clone()
    torch.testing.assert_close(cross_entropy_(logits, labels, False), losses.float(), rtol=2e-6, atol=2e-6)
    assert torch.equal(logits, kept)
    again = logits.clone()
    torch.testing.assert_close(cross_entropy_(logits, labels, True), losses.float(), rtol=2e-6, atol=2e-6)
    limits = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(logits.double(), gradient, **limits)
    cross_entropy_(again, labels, True)
    assert torch.equal(logits, again)


def test_huge_and_infinite_logits() -> None:
    logits, labels = _inputs(4, 300, torch.float32, spread=1e4)
    logits[2, :299] = -torch.inf
    labels[2] = 299
    losses, gradient = _wanted(logits, labels)
    torch.testing.assert_close(cross_entropy_(logits, labels, True), losses.float())
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-3, atol=1e-6)


def test_rows_that_lie_apart_leave_what_is_between_them() -> None:
    wide = torch.full((3, 120), torch.nan, device=DEVICE)
    logits, labels = _inputs(3, 100, torch.float32)
    wide[:, :100] = logits
    _, gradient = _wanted(logits, labels)
    cross_entropy_(wide[:, :100], labels, True)
    torch.testing.assert_close(wide[:, :100].double(), gradient, rtol=2e-6, atol=1e-6)
    assert wide[:, 100:].isnan().all()


def test_operator() -> None:
    logits, labels = _inputs(3, 20, torch.float32)
    for wants in (False, True):
        torch.library.opcheck(cross_entropy_, (logits, labels, wants))


BUGS = {
    "the sums of two maxima added as they are": Bug(kernels, "total * tl.exp(highest - top)", "total"),
    "no 1 at the label": Bug(kernels, "column == label, 1.0", "column == label, 0.0"),
    "what is past the last logit counts": Bug(kernels, 'other=float("-inf")', "other=0.0"),
    "rows without a stride": Bug(kernels, "row * stride", "row * CHOICES"),
}


@in_the_interpreter
@pytest.mark.parametrize("name", [None, *BUGS])
def test_seeded_bugs_are_caught(name: str | None, tmp_path: Path) -> None:
    copy = seed(kernels, None if name is None else BUGS[name], tmp_path)
    wide = torch.zeros(3, 5000)
    logits, labels = _inputs(3, 4500, torch.float32)
    wide[:, :4500] = logits
    losses, gradient = _wanted(logits, labels)
    with poisoned_memory():
        came = copy.cross_entropy_(wide[:, :4500], labels, True)
    right = torch.allclose(came.double(), losses, rtol=1e-5) and torch.allclose(
        wide[:, :4500].double(), gradient, rtol=1e-5, atol=1e-6
    )
    assert right == (name is None)
