"""A mixture of memories, and one memory, as layers on one GPU: time, peak memory, and where the time goes.

    python benchmarks/layers.py --output benchmarks/results/layers.csv

Gated DeltaNet, and rules without an erase, at the widths of the paper's 380M model (D 1024, H 4, K = V = 256), bf16. `eager` is
launched from Python call by call; `graph` is the same forward and backward replayed from a CUDA graph, which is what the GPU
itself takes. With `--peer`, flash-linear-attention's layers of the same widths are timed after ours in the same process (from
Python: its mixture waits for the host, and can't be captured); that needs the package, and some minutes for its autotuning the
first time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import captured, median_ms, provenance, write_rows
from torch import Tensor, nn

from linear_moe import MemoryLayer, MoMLayer

HERE = Path(__file__).resolve().parent
WIDTHS = {"hidden_size": 1024, "num_heads": 4, "head_dim": 256}
TIMED = {"warmup": 40, "rep": 150}


class Case(NamedTuple):
    """A layer and the input it is timed with."""

    name: str
    memories: int | None
    """None for one memory without a router."""
    batch: int
    length: int
    skewed: bool = False
    """Whether every token goes to the same two memories."""
    peer: bool = False
    """Whether the layer is flash-linear-attention's."""
    rule: str = "gated_deltanet"


CASES = (
    Case("4 memories", 4, 8, 4096),
    Case("64 memories", 64, 8, 4096),
    Case("4 memories, all to two", 4, 8, 4096, skewed=True),
    Case("4 memories, many short", 4, 32, 4096),
    Case("4 memories, one long", 4, 1, 131072),
    Case("one memory", None, 8, 4096),
    *(
        Case(f"4 memories of {rule}, {name}", 4, batch, length, rule=rule)
        for rule in ("mamba2", "retnet", "gla")
        for name, batch, length in (("many short", 32, 4096), ("one long", 1, 131072))
    ),
)
PEERS = (Case("4 memories, fla", 4, 8, 4096, peer=True), Case("one memory, fla", None, 8, 4096, peer=True))


def build(case: Case) -> nn.Module:
    """The layer of a case, on the GPU in bfloat16."""
    torch.manual_seed(0)
    factory = {"device": "cuda", "dtype": torch.bfloat16}
    if case.peer:
        return FirstResult(peer(case)).to(**factory)
    if case.memories is None:
        return MemoryLayer(rule=case.rule, **WIDTHS, **factory)
    layer = MoMLayer(rule=case.rule, num_memories=case.memories, top_k=2, **WIDTHS, **factory)
    if case.skewed:
        # All scores alike: ties go to the lowest two.
        nn.init.zeros_(layer.router.weight)
    return layer


def peer(case: Case) -> nn.Module:
    """The same layer, of flash-linear-attention."""
    from fla.layers import GatedDeltaNet, MomAttention

    if case.memories is None:
        return GatedDeltaNet(expand_v=1, **WIDTHS)
    return MomAttention(expand_v=1, num_memories=case.memories, topk=2, shared_mem=True, layer_idx=0, **WIDTHS)


class FirstResult(nn.Module):
    """A layer without what it returns beside its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The same work, replayed."""
    return captured(function).replay


def kernel_times(function: Callable[[], object], repeats: int = 3) -> list[tuple[str, float]]:
    """Milliseconds a call of each kernel, longest first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = [(event.key, 1e-3 * event.self_device_time_total / repeats) for event in profile.key_averages()]
    return sorted(times, key=lambda item: -item[1])


def measure(case: Case, show: int) -> dict[str, object]:
    """One line of the table."""
    stream = torch.cuda.Stream()
    # Leaves of the stream that is captured: a gradient is accumulated on its leaf's stream.
    with torch.cuda.stream(stream):
        layer = build(case)
        x = torch.randn(case.batch, case.length, WIDTHS["hidden_size"], device="cuda", dtype=torch.bfloat16)
        x.requires_grad_()
        seed = torch.randn_like(x)
    torch.cuda.synchronize()
    learned: list[Tensor] = [x, *layer.parameters()]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        torch.autograd.grad(layer(x), learned, seed)

    both()
    row: dict[str, object] = {"case": case.name, "shape": f"B{case.batch} T{case.length}"}
    row["forward_ms"], row["both_ms"] = (round(median_ms(f, **TIMED), 3) for f in (forward, both))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    row["peak_GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    times = kernel_times(both)
    row["kernels_ms"] = round(sum(time for _, time in times), 3)
    for name, time in times[:show]:
        print(f"    {time:7.3f}  {name[:100]}")
    row["graph_forward_ms"], row["graph_both_ms"] = (
        ("", "") if case.peer else (round(median_ms(graphed(f), **TIMED), 3) for f in (forward, both))
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "layers.csv")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)), help="by number")
    parser.add_argument("--show", type=int, default=0, help="kernels to list for each case")
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention's layers too")
    parser.add_argument("--compile-only", action="store_true", help="run each layer once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("layers.py times layers on a GPU: it needs a CUDA device")
    shared = provenance()
    rows: list[dict[str, object]] = []
    for case in (*(CASES[index] for index in arguments.cases), *(PEERS if arguments.peer else ())):
        if arguments.compile_only:
            layer = build(case)
            x = torch.randn(case.batch, case.length, WIDTHS["hidden_size"], device="cuda", dtype=torch.bfloat16)
            layer(x.requires_grad_()).sum().backward()
            continue
        rows.append(measure(case, arguments.show) | shared)
        print(*(value for name, value in rows[-1].items() if name not in shared), sep="  ", flush=True)
        write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
