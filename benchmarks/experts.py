"""A mixture of experts as feed-forward on one GPU: time, peak memory, and how much of it the matrix products are.

    python benchmarks/experts.py --output benchmarks/results/experts.csv

D 1024, 32,768 tokens, bf16; 64 narrow experts of which a token takes 4, and 8 wide ones of which it takes 2. `eager` is
launched from Python call by call; `graph` is the same work replayed from a CUDA graph, which is what the GPU itself takes.
`products` are the grouped matrix products alone, forward, and forward with both gradients, over groups of the sizes that the
router made, as graphs too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from layers import TIMED, graphed, kernel_times
from measuring import median_ms, provenance, write_rows
from torch import Tensor

from linear_moe.layers.mixture_of_experts import MixtureOfExperts

HERE = Path(__file__).resolve().parent
HIDDEN, BATCH, LENGTH = 1024, 8, 4096


class Case(NamedTuple):
    """A layer."""

    experts: int
    top_k: int
    width: int
    shared: int = 0
    impl: str = "auto"

    def __str__(self) -> str:
        shared = f" + {self.shared} shared" if self.shared else ""
        return f"{self.top_k} of {self.experts}{shared}, width {self.width}" + (
            "" if self.impl == "auto" else ", PyTorch"
        )


CASES = (
    Case(64, 4, 512),
    Case(8, 2, 2048),
    Case(64, 4, 512, shared=1),
    Case(64, 4, 512, impl="chunked"),
    Case(8, 2, 2048, impl="chunked"),
)


class Work(NamedTuple):
    """A layer, what it is fed, and the gradient of what it puts out."""

    layer: MixtureOfExperts
    x: Tensor
    seed: Tensor

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            self.layer(self.x)

    def both(self) -> None:
        """With all gradients."""
        torch.autograd.grad(self.layer(self.x), [self.x, *self.layer.parameters()], self.seed)


class Products(NamedTuple):
    """The grouped products of a layer, and nothing between them."""

    rows: Tensor
    inner: Tensor
    weights: tuple[Tensor, Tensor]
    ends: Tensor
    seeds: tuple[Tensor, Tensor]

    def run(self) -> tuple[Tensor, Tensor]:
        """Into the experts and out of them."""
        inside = F.grouped_mm(self.rows, self.weights[0].mT, offs=self.ends)
        return inside, F.grouped_mm(self.inner, self.weights[1].mT, offs=self.ends)

    def forward(self) -> None:
        """Without gradients."""
        with torch.no_grad():
            self.run()

    def both(self) -> None:
        """With all gradients."""
        torch.autograd.grad(self.run(), [self.rows, self.inner, *self.weights], self.seeds)


def build(case: Case) -> Work:
    """A layer of the case, on the GPU in bfloat16."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(
        HIDDEN, num_experts=case.experts, top_k=case.top_k, num_shared_experts=case.shared, width=case.width,
        impl=case.impl, device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(BATCH, LENGTH, HIDDEN, device="cuda", dtype=torch.bfloat16)
    return Work(layer, x.requires_grad_(), torch.randn_like(x))


def products_of(case: Case, layer: MixtureOfExperts) -> Products:
    """The products of a layer's last forward."""
    assert layer.routing is not None
    ends = torch.bincount(layer.routing.indices.flatten(), minlength=case.experts).cumsum(0).int()
    slots = BATCH * LENGTH * case.top_k

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    weights = (layer.in_weight.detach().requires_grad_(), layer.out_weight.detach().requires_grad_())
    rows, inner = draw(slots, HIDDEN).requires_grad_(), draw(slots, case.width).requires_grad_()
    return Products(rows, inner, weights, ends, (draw(slots, 2 * case.width), draw(slots, HIDDEN)))


def measure(case: Case, show: int) -> dict[str, object]:
    """One line of the table."""
    stream = torch.cuda.Stream()
    # Leaves of the stream that is captured: a gradient is accumulated on its leaf's stream.
    with torch.cuda.stream(stream):
        work = build(case)
        work.forward()
        products = products_of(case, work.layer)
    torch.cuda.synchronize()
    work.both()
    row: dict[str, object] = {"case": str(case), "tokens": BATCH * LENGTH}
    row["eager_forward_ms"], row["eager_both_ms"] = (round(median_ms(f, **TIMED), 3) for f in (work.forward, work.both))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work.both()
    torch.cuda.synchronize()
    row["peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    if show:
        for name, time in kernel_times(work.both)[:show]:
            print(f"    {time:7.3f}  {name[:100]}")
    forward, both = (median_ms(graphed(f), **TIMED) for f in (work.forward, work.both))
    products_forward, products_both = (median_ms(graphed(f), **TIMED) for f in (products.forward, products.both))
    row["graph_forward_ms"], row["graph_both_ms"] = round(forward, 3), round(both, 3)
    row["products_forward_ms"], row["products_both_ms"] = round(products_forward, 3), round(products_both, 3)
    row["products_share_forward"] = round(products_forward / forward, 3)
    row["products_share_both"] = round(products_both / both, 3)
    row["million_tokens_per_s"] = round(BATCH * LENGTH / both / 1e3, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "experts.csv")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)), help="by number")
    parser.add_argument("--show", type=int, default=0, help="kernels to list for each case")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("experts.py times a layer on a GPU: it needs a CUDA device")
    shared = provenance()
    rows: list[dict[str, object]] = []
    for index in arguments.cases:
        rows.append(measure(CASES[index], arguments.show) | shared)
        print(*(f"{name} {value}" for name, value in rows[-1].items() if name not in shared), sep="  ", flush=True)
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
