"""What the first call costs a fresh process with no compiled kernel on the disk, on one GPU.

    python benchmarks/first_use.py [--head-dims 128 256] [--output benchmarks/results/first_use.csv]

A process for each rule, one for all rules, and one for a layer's training step; each has an empty Triton cache of its own.
Counted are the seconds of the forward and backward pass until the GPU has done it, and those of the whole process, imports
included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import provenance, write_rows
from torch import Tensor

from linear_moe import MoMLayer, ops
from linear_moe.rules.registry import rule_names

HERE = Path(__file__).resolve().parent
BATCH, TOKENS, HEADS = 2, 4096, 4
ALL, LAYER = "all rules", "layer"


def rules(head_dim: int) -> dict[str, list[Tensor]]:
    """Each rule's arguments, on the GPU: [B, T, H, head_dim] in bfloat16, gates in float32."""

    def normal(*last: int) -> Tensor:
        return torch.randn(BATCH, TOKENS, HEADS, *last, device="cuda")

    qkv = [F.normalize(normal(head_dim), dim=-1).bfloat16().requires_grad_() for _ in range(3)]
    beta, decay = (torch.sigmoid(normal()).requires_grad_() for _ in range(2))
    channels = (F.logsigmoid(normal(head_dim)) / 16).detach().requires_grad_()
    rates, skip = -torch.linspace(1, 16, HEADS, device="cuda"), torch.ones(HEADS, device="cuda")
    return {
        "linear_attention": qkv,
        "retnet": qkv,
        "gla": [*qkv, channels],
        "mamba2": [*qkv, decay, rates, skip],
        "deltanet": [*qkv, beta],
        "gated_deltanet": [*qkv, (-decay).detach().requires_grad_(), beta],
    }


def pass_of(what: str, head_dim: int) -> float:
    """Seconds of the first forward and backward pass, and of all that it compiles."""
    if what == LAYER:
        layer = MoMLayer(1024, rule="gated_deltanet", num_heads=4, head_dim=head_dim, device="cuda")
        x = torch.randn(BATCH, TOKENS, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            output = layer(x)
        output.float().square().mean().backward()
    else:
        arguments = rules(head_dim)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for rule in arguments if what == ALL else [what]:
            getattr(ops, rule)(*arguments[rule], impl="triton").output.float().square().mean().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(what: str, head_dim: int) -> dict[str, object]:
    """The same in a fresh process."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, __file__, "--child", what, "--head-dims", str(head_dim)],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        whole = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{what} failed:\n{child.stderr}")
    return {
        "what": what,
        "head_dim": head_dim,
        "pass_s": round(float(child.stdout.split()[-1]), 2),
        "process_s": round(whole, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 256], help="K = V")
    parser.add_argument("--only", nargs="+", help=f"rules, '{ALL}', '{LAYER}'; everything unless given")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "first_use.csv")
    options = parser.parse_args()
    if options.child:
        print(pass_of(options.child, options.head_dims[0]))
        return
    # Its package takes half a second, which the children's time is not to have.
    from linear_moe.training.demo.parallel import num_cores

    about = {**provenance(), "cores": num_cores()}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = []
    for head_dim in options.head_dims:
        for what in options.only or [*rule_names(), ALL, LAYER]:
            row = measure(what, head_dim)
            print(f"{what:<18}{head_dim:>5}{row['pass_s']:>8} s, process {row['process_s']:>6} s", flush=True)
            rows.append({**row, **about})
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
