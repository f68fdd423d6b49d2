"""The scans' Triton kernels against flash-linear-attention's on one GPU: numbers first, then time and memory.

    python benchmarks/kernels.py --output benchmarks/results/kernels.csv --plot docs/kernels.png
    python benchmarks/kernels.py --update --rules gla --shapes 0 4    # anew, and the file's other rows kept

Both are first held to the error budget in float64, on shorter inputs of the same heads; what is wrong, or refuses to run,
gets no time. The peer is imported if it is installed (fla-core). It tunes itself for minutes: `--prepare 8` lets 8 processes
compile and tune everything first, so that the timed process finds it in Triton's cache.

Times are of CUDA graphs, in which nothing waits for Python. The peer is launched call by call on unequal segments, whose
borders it takes to the host; the row says so.

The floor is the time in which the measured copy bandwidth moves each input once and each output once: forward q, k, v, o and
the gates; forward and backward these, their gradients, and q, k, v and the gates once more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measuring import captured, median_ms, provenance, read_rows, updated, write_rows
from rich.progress import track
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import Tokens
from linear_moe.rules.retnet import retention_log_decay
from linear_moe.rules.scan import scan
from linear_moe.testing.budget import decay_gradient_terms, error_budget

HERE = Path(__file__).resolve().parent


class Shape(NamedTuple):
    """B, T, H, K = V, and into how many unequal segments a row is cut, if it is."""

    batch: int
    length: int
    heads: int
    dim: int
    segments: int | None = None

    def __str__(self) -> str:
        cut = f" in {self.segments} segments" if self.segments else ""
        return f"B{self.batch} T{self.length}{cut} H{self.heads} K=V={self.dim}"


SHAPES = (
    Shape(8, 4096, 16, 128),
    Shape(8, 4096, 4, 256),
    Shape(1, 32768, 16, 128),
    Shape(1, 65536, 4, 256, segments=32),
    Shape(32, 2048, 16, 64),
)
FORMS = {
    "linear_attention": Recurrence(),
    "retnet": Recurrence(decay=Decay.HEAD),
    "mamba2 form": Recurrence(decay=Decay.SCALAR),
    "gla": Recurrence(decay=Decay.VECTOR),
    "deltanet": Recurrence(erase=Erase.DELTA),
    "gated_deltanet": Recurrence(decay=Decay.SCALAR, erase=Erase.DELTA),
}
Inputs = dict[str, Tensor]
Run = Callable[[Inputs, "Tensor | None"], Tensor]


def draw(rule: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Tokens as a trained layer has them: unit queries and keys, decays near 1, strengths near a half."""
    form = FORMS[rule]

    def normal(*width: int) -> Tensor:
        return torch.randn(shape.batch, shape.length, shape.heads, *width, device="cuda")

    inputs = {
        "q": F.normalize(normal(shape.dim), dim=-1),
        "k": F.normalize(normal(shape.dim), dim=-1),
        "v": normal(shape.dim),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if form.decay is Decay.SCALAR:
        inputs["log_decay"] = F.logsigmoid(normal() + 3)
    if form.decay is Decay.VECTOR:
        inputs["log_decay"] = F.logsigmoid(normal(shape.dim)) / 16
    if form.erase is Erase.DELTA:
        inputs["beta"] = torch.sigmoid(normal()).to(dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def borders(shape: Shape) -> Tensor | None:
    """`cu_seqlens` of unequal segments, the same at every call, if the shape has them."""
    if shape.segments is None:
        return None
    generator = torch.Generator().manual_seed(0)
    cuts = torch.sort(torch.randperm(shape.length - 1, generator=generator)[: shape.segments - 1] + 1).values
    return torch.tensor([0, *cuts.tolist(), shape.length], device="cuda")


def ours(rule: str, impl: str) -> Run:
    """The scan of the rule's form."""
    form = FORMS[rule]

    def run(inputs: Inputs, cu_seqlens: Tensor | None) -> Tensor:
        heads = inputs["v"].shape[2]
        constant = {"log_decay": retention_log_decay(heads, inputs["v"].device)} if form.decay is Decay.HEAD else {}
        return scan(
            Tokens(**inputs, **constant), form=form, step=lambda state, token: (state, token.v),
            scale=inputs["q"].shape[-1] ** -0.5, cu_seqlens=cu_seqlens, impl=impl,
        ).output  # fmt: skip

    return run


def peer(rule: str) -> Run:
    """The peer's function of the same form.

    Raises:
        ImportError: if it is not installed.
    """
    from fla import ops  # noqa: F401
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    calls = {
        "linear_attention": lambda x, **given: chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False, **given),
        "retnet": lambda x, **given: chunk_retention(x["q"], x["k"], x["v"], **given),
        "mamba2 form": lambda x, **given: chunk_simple_gla(x["q"], x["k"], x["v"], x["log_decay"], **given),
        "gla": lambda x, **given: chunk_gla(x["q"], x["k"], x["v"], x["log_decay"], **given),
        "deltanet": lambda x, **given: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], **given),
        "gated_deltanet": lambda x, **given: chunk_gated_delta_rule(
            x["q"], x["k"], x["v"], x["log_decay"], x["beta"], **given
        ),
    }
    return lambda inputs, cu_seqlens: calls[rule](inputs, cu_seqlens=cu_seqlens)[0]


def wrong(run: Run, rule: str, shape: Shape) -> str | None:
    """What is over the error budget on a shorter input, or why it does not run; None if all is well."""
    short = shape._replace(batch=1 if shape.segments else 2, length=1000, segments=shape.segments and 5)
    inputs, cu_seqlens = draw(rule, short), borders(short)
    seed = torch.randn_like(inputs["v"])

    def measured(function: Run, dtype: torch.dtype | None = None) -> Inputs:
        mine = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
        output = function(mine, cu_seqlens)
        return {"output": output} | dict(
            zip(mine, torch.autograd.grad(output, list(mine.values()), seed.to(output.dtype)), strict=True)
        )

    reference = ours(rule, "chunked")
    try:
        candidate = measured(run)
    except Exception as error:
        return f"does not run: {type(error).__name__}: {error}"
    exact = measured(reference, torch.float64)
    terms = {}
    if FORMS[rule].decay is Decay.SCALAR:
        flat = [x.flatten(0, 1) for x in (inputs["v"].detach(), exact["v"])]
        cuts = torch.arange(short.batch + 1) * short.length if cu_seqlens is None else cu_seqlens
        terms["log_decay"] = decay_gradient_terms(*flat, cuts)
    budgets = error_budget(candidate, measured(reference), exact, torch.bfloat16, terms)
    return "; ".join(str(budget) for budget in budgets if not budget.holds) or None


class Measured(NamedTuple):
    """Of one implementation."""

    forward_ms: float
    both_ms: float
    """Forward + backward."""
    peak: float
    """MiB of both, beyond the inputs."""
    timed: str
    """"replayed", or "called" from Python."""


def measure(run: Run, rule: str, shape: Shape, replayed: bool) -> Measured:
    """Times and memory of a scan."""
    # Leaves of a stream of their own: a gradient is made on its leaf's, and the default one is not captured.
    with torch.cuda.stream(torch.cuda.Stream()):
        inputs, cu_seqlens = draw(rule, shape), borders(shape)
        seed = torch.randn_like(inputs["v"])
    torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            run(inputs, cu_seqlens)

    def both() -> None:
        torch.autograd.grad(run(inputs, cu_seqlens), list(inputs.values()), seed)

    forward_ms, both_ms = (
        median_ms(captured(function).replay if replayed else function) for function in (forward, both)
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    return Measured(
        forward_ms, both_ms, (torch.cuda.max_memory_allocated() - before) / 2**20, "replayed" if replayed else "called"
    )


def copy_speed() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source)))


def row(rule: str, shape: Shape, speed: float, with_peer: bool) -> dict[str, object]:
    """One line of the table."""
    values: dict[str, object] = {"shape": str(shape), "rule": rule}
    inputs = draw(rule, shape._replace(length=1))
    token_bytes = sum(x.nbytes for x in inputs.values())
    once = (token_bytes + inputs["v"].nbytes) * shape.length
    floors = (once / speed, (3 * token_bytes + 2 * inputs["v"].nbytes) * shape.length / speed)
    times: dict[str, Measured] = {}
    for who, make in (("ours", lambda: ours(rule, "triton")), ("peer", lambda: peer(rule))):
        if who == "peer" and not with_peer:
            continue
        fault = wrong(make(), rule, shape)
        if fault:
            print(f"{who} {rule} {shape}: no time, {fault}", file=sys.stderr)
            continue
        times[who] = measure(make(), rule, shape, replayed=who == "ours" or shape.segments is None)
        made = times[who]
        values |= {f"{who}_forward_ms": round(made.forward_ms, 3), f"{who}_both_ms": round(made.both_ms, 3)}
        values |= {f"{who}_peak_MiB": round(made.peak, 1), f"{who}_timed": made.timed}
    if "ours" in times:
        values["forward_over_floor"] = round(1e-3 * times["ours"].forward_ms / floors[0], 2)
        values["both_over_floor"] = round(1e-3 * times["ours"].both_ms / floors[1], 2)
    if len(times) == 2:
        own, other = times["ours"], times["peer"]
        values["forward_speed_up"] = round(other.forward_ms / own.forward_ms, 2)
        values["both_speed_up"] = round(other.both_ms / own.both_ms, 2)
        values["memory_ratio"] = round(own.peak / other.peak, 2)
    return values


def compile_one(rule: str, shape: Shape, with_peer: bool) -> None:
    """Run everything that will be timed once."""
    for make in (lambda: ours(rule, "triton"), *([lambda: peer(rule)] if with_peer else [])):
        wrong(make(), rule, shape)
        inputs = draw(rule, shape)
        output = make()(inputs, borders(shape))
        torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))


def prepare(jobs: list[tuple[str, Shape]], processes: int, with_peer: bool) -> None:
    """Compile and tune in other processes, which share Triton's cache with this one."""

    def one(job: tuple[str, Shape]) -> None:
        command = [sys.executable, __file__, "--compile-only", "--rules", job[0], "--shapes", str(SHAPES.index(job[1]))]
        subprocess.run(command if with_peer else [*command, "--no-peer"], check=False, capture_output=True)

    with ThreadPoolExecutor(processes) as pool:
        for _ in track(pool.map(one, jobs), "compiling", total=len(jobs)):
            pass


def draw_plot(rows: list[dict[str, object]], path: Path) -> None:
    """Bars of the speed-ups, forward and forward + backward, a group a shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(str(row["shape"]) for row in rows))
    figure, axes = plt.subplots(2, 1, figsize=(10, 7), sharex=True)
    for axis, name, title in zip(
        axes, ("forward_speed_up", "both_speed_up"), ("forward", "forward + backward"), strict=True
    ):
        for at, rule in enumerate(FORMS):
            bars = {str(r["shape"]): r.get(name) for r in rows if r["rule"] == rule}
            places = [i + (at - len(FORMS) / 2 + 0.5) / (len(FORMS) + 1) for i in range(len(shapes))]
            axis.bar(places, [float(bars.get(shape) or 0) for shape in shapes], 1 / (len(FORMS) + 1), label=rule)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("times the peer's speed")
        axis.set_title(title)
    axes[1].set_xticks(range(len(shapes)), [shape.replace(" H", "\nH") for shape in shapes], fontsize=8)
    axes[0].legend(ncol=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, object]]) -> str:
    """The rows in Markdown."""
    lines = ["| shape | rule | forward ms | forward + backward ms | of the peer's speed | memory | over the floor |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        speed = f"{r['forward_speed_up']}x, {r['both_speed_up']}x" if "both_speed_up" in r else "-"
        lines.append(
            f"| {r['shape']} | `{r['rule']}` | {r.get('ours_forward_ms', '-')} | {r.get('ours_both_ms', '-')} | {speed} | "
            f"{r.get('memory_ratio', '-')} | {r.get('forward_over_floor', '-')}, {r.get('both_over_floor', '-')} |"
        )
    return "\n".join(lines)


def time_all(
    jobs: list[tuple[str, Shape]], with_peer: bool, output: Path, kept: list[dict[str, object]]
) -> list[dict[str, object]]:
    """Time them one after another, writing the file after each; returns all rows in it."""
    torch.manual_seed(0)
    speed = copy_speed()
    shared = {"copy_TB_per_s": round(speed / 1e12, 2), **provenance()}
    rows, timed = kept, []
    for rule, shape in jobs:
        timed.append(row(rule, shape, speed, with_peer) | shared)
        print(*(value for name, value in timed[-1].items() if name not in shared), sep="  ", flush=True)
        rows = updated(kept, timed, ("shape", "rule"))
        write_rows(output, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kernels.csv")
    parser.add_argument("--rules", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help="by number, 0 to 4")
    parser.add_argument(
        "--prepare", type=int, default=0, metavar="PROCESSES", help="compile and tune in parallel first"
    )
    parser.add_argument("--compile-only", action="store_true", help="compile and tune, and time nothing")
    parser.add_argument("--no-peer", action="store_true", help="time only this package")
    parser.add_argument("--update", action="store_true", help="keep the other rows that the output has")
    parser.add_argument("--plot", type=Path, help="also draw the speed-ups, of kept rows too")
    arguments = parser.parse_args()
    jobs = [(rule, SHAPES[index]) for index in arguments.shapes for rule in arguments.rules]
    if jobs and not torch.cuda.is_available():
        sys.exit("kernels.py times kernels on a GPU: it needs a CUDA device")
    # The peer keeps what its tuning found, and finds it again.
    os.environ["TRITON_CACHE_AUTOTUNING"] = "1"
    if arguments.compile_only:
        for rule, shape in jobs:
            compile_one(rule, shape, not arguments.no_peer)
        return
    if arguments.prepare:
        prepare(jobs, arguments.prepare, not arguments.no_peer)
    kept = read_rows(arguments.output) if arguments.update and arguments.output.exists() else []
    rows = time_all(jobs, not arguments.no_peer, arguments.output, kept) if jobs else kept
    print(table(rows))
    if arguments.plot:
        draw_plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
