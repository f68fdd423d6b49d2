"""Training of the paper's 380M model on one GPU, in tokens a second, against flash-linear-attention's model of the same config.

    python benchmarks/training.py --output benchmarks/results/training.csv

Both: float32 parameters, bfloat16 by autocast, gradients clipped, fused AdamW, random tokens, a context of 2048. Ours runs as
`linear-moe train` does, captured graphs and all. The peer needs `flash-linear-attention` and `transformers`, and some minutes
for its autotuning the first time; `--largest 8 10 12 16` takes the largest of these batches that it fits. Each has a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import provenance, write_rows
from torch import nn

from linear_moe.data.batch import Batch
from linear_moe.models import build_model, load_config
from linear_moe.training.loop import optimise
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import IndexedTask
from linear_moe.training.throughput import Utilisation

HERE = Path(__file__).resolve().parent
WARM_UP = 4
WHO = ("ours", "ours, no graphs", "fla")


class RandomTokens(IndexedTask):
    """Batches `[B, T]` of random tokens, every one predicted."""

    score_name = "none"

    def __init__(self, vocab_size: int, batch: int, length: int) -> None:
        self.vocab_size, self.size, self.context = vocab_size, (batch, length), length

    def describe(self) -> str:
        return f"random tokens {self.size}"

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self.vocab_size, (self.size[0], self.size[1] + 1), generator=generator)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def sample(self, model: nn.Module) -> str | None:
        return None


def ours(name: str, batch: int, length: int, capture: bool) -> Iterator[float]:
    """Losses of a run's steps, each one done."""
    torch.manual_seed(0)
    config = load_config(name)
    settings = TrainSettings(steps=10**6, learning_rate=3e-4, weight_decay=0.01, precision="bfloat16", capture=capture)
    model = build_model(config, device="cuda")
    task = RandomTokens(config.vocab_size, batch, length)
    for report in optimise(model, build_optimizer(model, settings), task, settings):
        yield report.loss


def peer(name: str, batch: int, length: int) -> Iterator[float]:
    """The same of the peer's model."""
    from fla.models.mom import MomConfig, MomForCausalLM

    torch.manual_seed(0)
    config = load_config(name)
    mixer: Any = next(iter(config.blocks.values())).mixer
    model = MomForCausalLM(
        MomConfig(
            hidden_size=config.hidden_size, num_heads=mixer.num_heads, head_dim=mixer.head_dim, expand_v=1.0,
            conv_size=mixer.conv_width, hidden_ratio=3, num_hidden_layers=len(config.layer_names()),
            num_memories=mixer.num_memories, topk=mixer.top_k, shared_mem=mixer.shared_memory,
            vocab_size=config.vocab_size, max_position_embeddings=length, use_cache=False,
        )
    ).cuda()  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    task = RandomTokens(config.vocab_size, batch, length)
    for index in range(10**6):
        tokens = task.batch(index).tokens.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss)


def measure(steps: Iterator[float], batch: int, length: int, count: int) -> dict[str, object]:
    """Tokens a second, and the peak of memory, of a run's steps after the first few."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    first = next(steps)
    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - began
    for _ in range(WARM_UP - 1):
        next(steps)
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = next(steps)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "batch": batch, "length": length, "step_ms": round(1e3 * statistics.median(times), 1),
        "tokens_per_second": round(batch * length / statistics.median(times)),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2), "first_step_s": round(first_seconds, 1),
        "first_loss": round(first, 3), "last_loss": round(loss, 3),
    }  # fmt: skip


def kernel_table(steps: Iterator[float], rows: int) -> None:
    """Where the time of a step goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(2):
            next(steps)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total, count = (
        sum(event.self_device_time_total for event in events) / 2e3,
        sum(event.count for event in events) // 2,
    )
    print(f"    {count} kernels, {total:.1f} ms")
    for event in events[:rows]:
        print(f"    {event.self_device_time_total / 2e3:8.2f} ms  x{event.count // 2:<5} {event.key[:110]}")


def run(options: argparse.Namespace) -> dict[str, object]:
    """One measurement, in this process."""
    (batch,) = options.batch
    if options.only == "fla":
        steps = peer(options.config, batch, options.length)
    else:
        steps = ours(options.config, batch, options.length, capture=options.only == "ours")
    row = {"model": options.config, "who": options.only, **measure(steps, batch, options.length, options.steps)}
    use = Utilisation(load_config(options.config), options.length, torch.device("cuda"), "bfloat16")
    used = use.of(float(row["tokens_per_second"]))  # type: ignore[arg-type]
    row["mfu"] = "" if used is None else round(used, 3)
    if options.show:
        kernel_table(steps, options.show)
    return row | provenance()


def run_apart(options: argparse.Namespace, who: str, batch: int) -> dict[str, str] | None:
    """The same in a process of its own, which leaves no memory behind; None if there was not enough of it."""
    command = [sys.executable, __file__, "--only", who, "--batch", str(batch)]
    for name in ("config", "length", "steps", "show"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *shown, last = done.stdout.strip().splitlines() or [""]
    print(*shown, sep="\n" if shown else "", end="\n" if shown else "")
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            print(f"{who} does not fit {batch} sequences", flush=True)
            return None
        raise SystemExit(done.stderr)
    row: dict[str, str] = json.loads(last)
    print(*list(row.values())[: -len(provenance())], sep="  ", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mom-380m")
    parser.add_argument("--batch", type=int, nargs="*", default=[8], help="sequences, of each measurement")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--who", nargs="*", choices=WHO, default=["ours", "fla"])
    parser.add_argument("--largest", type=int, nargs="*", help="the peer's largest of these batches instead of --batch")
    parser.add_argument("--show", type=int, default=0, help="kernels of a step to list")
    parser.add_argument("--only", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training.csv")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("training.py times training on a GPU: it needs a CUDA device")
    if options.only:
        print(json.dumps(run(options)))
        return
    rows: list[dict[str, str]] = []
    batches = options.batch
    for batch in sorted(options.largest or [], reverse=True):
        row = run_apart(options, "fla", batch)
        if row is not None:
            rows, batches = [row], [batch]
            break
    for batch in batches:
        for who in options.who:
            if not any(row["who"] == who for row in rows if options.largest):
                row = run_apart(options, who, batch)
                rows += [] if row is None else [row]
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
