"""The scalar scan's Triton kernels on a GPU: forward, forward + backward, memory, and the distance from the floor.

    python benchmarks/scalar_scan.py

A shape's kernel is first held to the error budget on a shorter input of the same heads; a wrong one gets no time. The floor is
the time in which the measured copy bandwidth moves each input once and each output once: q, k, v, o forward, and these, their
gradients and q, k, v once more for both.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from linear_moe import ops
from linear_moe.testing.budget import assert_within_budget

HERE = Path(__file__).resolve().parent
SHAPES = {
    "B8 T4096 H16 K128 V128": (8, 4096, 16, 128, None),
    "B8 T4096 H4 K256 V256": (8, 4096, 4, 256, None),
    "B1 T32768 H16 K128 V128": (1, 32768, 16, 128, None),
    "65536 tokens in 32 segments H4 K256 V256": (1, 65536, 4, 256, 32),
    "B32 T2048 H16 K64 V64": (32, 2048, 16, 64, None),
}
RULES = ("linear_attention", "retnet", "mamba2")


def draw(rule: str, batch: int, length: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The op's arguments by position."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, *shape, device="cuda")

    inputs = {"q": normal(dim), "k": F.normalize(normal(dim), dim=-1), "v": normal(dim)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if rule == "mamba2":
        inputs |= {"dt": F.softplus(normal() - 3), "A": -1 - 15 * torch.rand(heads, device="cuda")}
        inputs |= {"D": torch.ones(heads, device="cuda")}
    return {name: x.requires_grad_(name != "A") for name, x in inputs.items()}


def run(rule: str, inputs: dict[str, torch.Tensor], impl: str, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    output: torch.Tensor = getattr(ops, rule)(*inputs.values(), cu_seqlens=cu_seqlens, impl=impl).output
    return output


def check(rule: str, heads: int, dim: int) -> None:
    """Raise unless the kernel is within the error budget, outputs and gradients."""
    inputs = draw(rule, 2, 333, heads, dim, torch.bfloat16)
    seed = torch.randn(2, 333, heads, dim, device="cuda").bfloat16()

    def measured(impl: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        mine = {n: x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for n, x in inputs.items()}
        output = run(rule, mine, impl)
        learned = {name: x for name, x in mine.items() if x.requires_grad}
        gradients = torch.autograd.grad(output, list(learned.values()), seed.to(output.dtype))
        return {"output": output} | dict(zip(learned, gradients, strict=True))

    assert_within_budget(measured("triton"), measured("chunked"), measured("chunked", torch.float64), torch.bfloat16)


def measure(rule: str, inputs: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None) -> tuple[float, float, float]:
    """Milliseconds forward, and forward + backward; MiB at the peak of both beyond the inputs."""
    seed = torch.randn_like(inputs["v"])
    learned = [x for x in inputs.values() if x.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            run(rule, inputs, "triton", cu_seqlens)

    def both() -> None:
        torch.autograd.grad(run(rule, inputs, "triton", cu_seqlens), learned, seed)

    forward_ms, both_ms = median(forward), median(both)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return forward_ms, both_ms, (torch.cuda.max_memory_allocated() - before) / 2**20


def bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median(lambda: target.copy_(source)))


def median(function: object) -> float:
    """Milliseconds."""
    value: float = triton.testing.do_bench(function, warmup=30, rep=150, return_mode="median")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scalar_scan.csv")
    target = parser.parse_args().output
    torch.manual_seed(0)
    speed = bandwidth()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    shared = {
        "gpu": torch.cuda.get_device_name(), "copy_TB_per_s": round(speed / 1e12, 2), "torch": torch.__version__,
        "triton": triton.__version__, "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip
    rows = []
    for name, (batch, length, heads, dim, segments) in SHAPES.items():
        for rule in RULES:
            check(rule, heads, dim)
            inputs = draw(rule, batch, length, heads, dim, torch.bfloat16)
            cu_seqlens = None
            if segments:
                cuts = torch.sort(torch.randperm(length - 1)[: segments - 1] + 1).values
                cu_seqlens = torch.tensor([0, *cuts.tolist(), length], device="cuda")
            forward_ms, both_ms, peak = measure(rule, inputs, cu_seqlens)
            tensor_bytes = 2 * batch * length * heads * dim
            row = {
                "shape": name, "rule": rule, "forward_ms": round(forward_ms, 3), "both_ms": round(both_ms, 3),
                "peak_MiB": round(peak), "forward_over_floor": round(forward_ms / (4e3 * tensor_bytes / speed), 2),
                "both_over_floor": round(both_ms / (11e3 * tensor_bytes / speed), 2),
            }  # fmt: skip
            rows.append(row | shared)
            print(*row.values(), sep="  ", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(*shared.values(), target)


if __name__ == "__main__":
    main()
