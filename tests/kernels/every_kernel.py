"""Every kernel once, on small shapes on a GPU: for tools that watch what kernels do to memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/every_kernel.py
    compute-sanitizer --tool racecheck python tests/kernels/every_kernel.py

Prints the kernels that ran. `--only` takes parts of it by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from linear_moe.kernels import launch, scalar_scan
from linear_moe.layers import MemoryLayer, MoMLayer
from linear_moe.models import ModelConfig, build_model

RULES = ("linear_attention", "retnet", "gla", "mamba2", "deltanet", "gated_deltanet")
WIDTH = 64
CONFIG = """
hidden_size: 64
vocab_size: 300
blocks:
  memory: {mixer: {type: mom, rule: gated_deltanet, num_heads: 1, head_dim: 64}, ffn: {type: swiglu, width: 96}}
  experts:
    mixer: {type: memory, rule: gla, num_heads: 1, head_dim: 64}
    ffn: {type: moe, num_experts: 4, top_k: 2, width: 32, num_shared_experts: 1}
layers: "memory experts"
"""


def learn(layer: nn.Module, x: Tensor, **given: Any) -> None:
    """Forward and backward."""
    layer(x.requires_grad_(), **given).float().square().mean().backward()


@torch.no_grad()
def decode(layer: nn.Module, batch: int) -> None:
    """A prompt, and two tokens after it."""
    state = layer.new_state(batch)  # type: ignore[operator]
    for length in (150, 1, 1):
        layer(tokens(batch, length), state=state)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, device="cuda", dtype=torch.bfloat16)


def of_rule(rule: str, head_dim: int, long: int) -> None:
    """A mixture and one memory; packed, padded, long enough to be split, decoded."""
    options: dict[str, Any] = {"num_heads": 1, "head_dim": head_dim, "device": "cuda", "dtype": torch.bfloat16}
    mixture, memory = MoMLayer(WIDTH, rule, num_memories=3, top_k=2, **options), MemoryLayer(WIDTH, rule, **options)
    learn(mixture, tokens(1, 150), cu_seqlens=torch.tensor([0, 1, 1, 70, 140], device="cuda"))
    mask = torch.rand(2, 70, device="cuda") < 0.8
    learn(mixture, tokens(2, 70), padding_mask=mask)
    # Its pieces are short for a launch for mild decays.
    with mock.patch.object(scalar_scan, "MILD_CHUNKS", 0):
        learn(memory, tokens(1, long))
    for layer in (mixture, memory):
        for batch in (1, 3, 40):
            decode(layer, batch)


def of_model() -> None:
    """What stands around the mixers, the loss included."""
    model = build_model(ModelConfig.from_yaml(CONFIG), device="cuda")
    places = torch.randint(300, (2, 40), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model(places, labels=places.flatten()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*RULES, "model"])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--long", type=int, default=2048, help="tokens of the sequence that is split")
    options = parser.parse_args()
    torch.manual_seed(0)
    runs: list[Callable[[], None]] = [of_model] if "model" in options.only else []
    for rule in RULES:
        if rule in options.only:
            runs += [lambda r=rule, d=head_dim: of_rule(r, d, options.long) for head_dim in options.head_dims]
    for run in runs:
        run()
        torch.cuda.synchronize()
    names = sorted({compiled.kernel.name for compiled in launch._compiled.values()})
    print(f"{len(names)} kernels ran: {', '.join(names)}")


if __name__ == "__main__":
    main()
