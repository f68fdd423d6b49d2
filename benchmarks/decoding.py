"""One decoded token of each sequence through one memory layer on one GPU: time a step, and kernels launched.

    python benchmarks/decoding.py --output benchmarks/results/decoding.csv

Layers at the widths of the paper's 380M model (D 1024, H 4, K = V = 256), bf16. First the step is held to the error budget
against the path of any length (`any length` below), in float64. Then, each as a CUDA graph: `graph` is one layer's step,
replayed with cold caches; `stack` is a step of many layers with weights and states of their own, by layer, as in a model.
`eager` is launched from Python call by call. The floor is the time in which 3.0 TB/s read the weights of the memories that were
picked, and read and write the states that were.

`--tune` times the kernel between the projections and the recurrence alone instead, with other launch parameters than its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from measuring import captured, median_ms, provenance, write_rows
from torch import Tensor, nn

from linear_moe import MemoryLayer, MoMLayer
from linear_moe.kernels import decode_tokens
from linear_moe.kernels.launch import Launched, recorded
from linear_moe.layers import recurrent_mixer
from linear_moe.layers.state import MemoryState
from linear_moe.testing.budget import error_budget

HERE = Path(__file__).resolve().parent
BYTES_PER_SECOND = 3.0e12
WIDTHS = {"hidden_size": 1024, "num_heads": 4, "head_dim": 256}
BATCHES = (1, 16, 64)
CHECKED_TOKENS = 8
MOST_STATES = 20e9
"""Bytes of a stack's states: of many memories there are fewer layers."""
TUNED_CHANNELS, TUNED_PER_WARP = (128, 256, 512, 1024), (64, 128, 256)
COLD_COPIES = 16
"""Of a kernel's tensors, one after another, so that few are found in a cache."""


class Case(NamedTuple):
    """A layer."""

    rule: str
    memories: int | None
    """None for one memory without a router."""

    def __str__(self) -> str:
        return f"{self.rule}, {'one memory' if self.memories is None else f'{self.memories} memories'}"


CASES = (
    Case("gated_deltanet", 4),
    Case("gated_deltanet", 64),
    Case("gated_deltanet", None),
    Case("gla", 4),
    Case("mamba2", 4),
    Case("retnet", 4),
)


def build(case: Case, seed: int = 0) -> nn.Module:
    """The layer of a case, on the GPU in bfloat16."""
    torch.manual_seed(seed)
    factory: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    if case.memories is None:
        layer: nn.Module = MemoryLayer(rule=case.rule, **WIDTHS, **factory)
    else:
        layer = MoMLayer(rule=case.rule, num_memories=case.memories, top_k=2, **WIDTHS, **factory)
    return layer.eval()


@contextmanager
def any_length() -> Iterator[None]:
    """One token by the path of many."""
    decodes = recurrent_mixer.decodes
    recurrent_mixer.decodes = lambda *arguments: False  # type: ignore[assignment]
    try:
        yield
    finally:
        recurrent_mixer.decodes = decodes


def tokens_of(batch: int, length: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(batch)
    return torch.randn(batch, length, WIDTHS["hidden_size"], device="cuda", generator=generator).to(torch.bfloat16)


def decoded(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs token by token, and the state after them."""
    state = layer.new_state(len(x))
    steps = [layer(x[:, t : t + 1], state=state) for t in range(x.shape[1])]
    return {"output": torch.cat(steps, 1), "memory": state.memory}


def fault(case: Case, batch: int) -> str | None:
    """What of a step's numbers is over the budget."""
    layer, x = build(case), tokens_of(batch, CHECKED_TOKENS)
    with any_length():
        reference = decoded(layer, x)
        wide = copy.deepcopy(layer).double()
        wide.impl = "chunked"
        exact = decoded(wide, x.double())
    budgets = error_budget(decoded(layer, x), reference, exact, torch.bfloat16)
    over = [str(budget) for budget in budgets if not budget.holds]
    return "; ".join(over) or None


def kernel_times(function: Callable[[], object], repeats: int = 5) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds a call of each kernel, longest first."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count / repeats, event.self_device_time_total / repeats)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda item: -item[2])


def floor(layer: Any, state: MemoryState, batch: int) -> float:
    """Microseconds."""
    fan_out, memories = 1, 1
    if isinstance(layer, MoMLayer):
        fan_out = layer.top_k + layer.shared_memory
        memories = int(layer.routing.indices.unique().numel()) + layer.shared_memory
    weights = [layer.token_weight, layer.gate_proj.weight, layer.out_proj.weight]
    nbytes = sum(weight.nbytes for weight in weights if weight is not None)
    nbytes += memories * (
        layer.memory_weight[0].nbytes + sum(second[0].nbytes for second in layer.second_stage.values())
    )
    nbytes += 2 * batch * fan_out * state.memory[0, 0].nbytes
    return 1e6 * nbytes / BYTES_PER_SECOND


def measure(case: Case, batch: int, layers: int, show: int) -> dict[str, object]:
    """One line of the table."""
    layers = max(1, min(layers, int(MOST_STATES // build(case).new_state(batch).nbytes)))
    stack = [build(case, seed) for seed in range(layers)]
    states = [layer.new_state(batch) for layer in stack]
    layer, state, x = stack[0], states[0], tokens_of(batch, 1)

    def step() -> None:
        layer(x, state=state)

    def step_of_all() -> None:
        y = x
        for each, its_state in zip(stack, states, strict=True):
            y = x + each(y, state=its_state)

    row: dict[str, object] = {"case": str(case), "batch": batch}
    graph = captured(step)
    row["graph_us"] = round(1e3 * median_ms(graph.replay), 1)
    row["stack_us"] = round(1e3 * median_ms(captured(step_of_all).replay) / layers, 1)
    row["floor_us"] = round(floor(layer, state, batch), 1)
    row["eager_us"] = round(1e3 * median_ms(step), 1)
    times = kernel_times(graph.replay)
    row["kernels"] = round(sum(count for _, count, _ in times))
    row["kernels_us"] = round(sum(time for *_, time in times), 1)
    for name, count, time in times[:show]:
        print(f"    {time:7.1f} us in {count:g}  {name[:100]}")
    with any_length():
        graph = captured(step)
        row["any_length_graph_us"], row["any_length_eager_us"] = (
            round(1e3 * median_ms(f), 1) for f in (graph.replay, step)
        )
        row["any_length_kernels"] = round(sum(count for _, count, _ in kernel_times(graph.replay)))
    return row


def cold_us(launches: list[Launched]) -> float:
    """Microseconds of some launches, each on tensors that lie apart."""
    apart = [
        each._replace(arguments=tuple(x.clone() if isinstance(x, Tensor) else x for x in each.arguments))
        for _ in range(COLD_COPIES)
        for each in launches
    ]

    def all_of_them() -> None:
        for each in apart:
            each.again()

    return 1e3 * median_ms(captured(all_of_them).replay) / COLD_COPIES


def tuned(case: Case, batch: int) -> list[dict[str, Any]]:
    """What `decode_tokens` takes with each launch of the grid, its own among them."""
    layer, x = build(case), tokens_of(batch, 1)
    state, rows = layer.new_state(batch), []
    for launch in itertools.starmap(decode_tokens.Launch, itertools.product(TUNED_CHANNELS, TUNED_PER_WARP)):
        # What was tiled for another launch is kept.
        decode_tokens._tiling.cache_clear()
        with (
            mock.patch.multiple(decode_tokens, MADE=launch, COPIED=launch),
            recorded(decode_tokens._tokens_kernel) as launches,
        ):
            layer(x, state=state)
        rows.append({"case": str(case), "batch": batch, **launch._asdict(), "us": round(cold_us(launches), 2)})
    return rows


def tune(cases: Iterable[Case], batches: Iterable[int], output: Path) -> None:
    """Time the grid, and print the fastest three of each case."""
    shared, rows = provenance(), []
    for case, batch in itertools.product(cases, batches):
        made = tuned(case, batch)
        for row in sorted(made, key=lambda row: row["us"])[:3]:
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
        rows += [row | shared for row in made]
        write_rows(output, rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="decoding.csv among the results, or decode_tokens.csv")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)), help="by number")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--layers", type=int, default=12, help="of a stack")
    parser.add_argument("--show", type=int, default=0, help="kernels to list for each case")
    parser.add_argument("--tune", action="store_true", help="time launches of decode_tokens instead")
    arguments = parser.parse_args()
    output = arguments.output or HERE / "results" / ("decode_tokens.csv" if arguments.tune else "decoding.csv")
    if not torch.cuda.is_available():
        sys.exit("decoding.py times kernels on a GPU: it needs a CUDA device")
    if arguments.tune:
        tune([CASES[index] for index in arguments.cases], arguments.batches, output)
        return
    shared = provenance()
    rows: list[dict[str, object]] = []
    for index in arguments.cases:
        for batch in arguments.batches:
            case = CASES[index]
            wrong = fault(case, batch)
            torch.cuda.empty_cache()
            if wrong:
                print(f"{case}, B{batch}: no time, {wrong}", file=sys.stderr)
                continue
            rows.append(measure(case, batch, arguments.layers, arguments.show) | shared)
            print(*(f"{name} {value}" for name, value in rows[-1].items() if name not in shared), sep="  ", flush=True)
            write_rows(output, rows)


if __name__ == "__main__":
    main()
