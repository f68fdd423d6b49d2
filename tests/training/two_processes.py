"""Trains with two processes on the CPU (gloo) and with one, and compares.

    python tests/training/two_processes.py FOLDER

Imported once and forked, as in killing.py.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# What a sharded run imports on its way, once for all.
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
from killing import forked, outcome
from test_run import Watcher

from linear_moe.models import ModelConfig
from linear_moe.training.checkpoint import checkpoints_of, load_model, load_trainer_state
from linear_moe.training.distributed import ALONE, World
from linear_moe.training.divergence import DivergedError
from linear_moe.training.metrics import read_metrics
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.run import resume_run, start_run
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask

STEPS = 3


def config() -> ModelConfig:
    """Parameters of one number a head, an odd number of heads, experts, a tied head, and every kind of balancing."""
    balance = {"balance_weight": 0.1, "z_loss_weight": 0.1, "balance_bias_rate": 0.01}
    mixture = {"type": "mom", "num_heads": 3, "head_dim": 4, "num_memories": 3, **balance}
    experts = {"type": "moe", "num_experts": 3, "top_k": 2, "width": 8, **balance}
    blocks = {
        "memory": {"mixer": mixture, "ffn": {"type": "swiglu", "width": 8}},
        "recall": {"mixer": {"type": "attention", "num_heads": 2}, "ffn": experts},
    }
    sizes = {"hidden_size": 8, "vocab_size": 16, "tie_embeddings": True}
    return ModelConfig.from_dict({**sizes, "blocks": blocks, "layers": "memory recall"})


def plan(steps: int = STEPS) -> RunPlan:
    options = TaskOptions(task="mqar", problems=("16:3", "24:2"), batch_size=2)
    settings = TrainSettings(steps=steps, accumulate=4, learning_rate=3e-3)
    return RunPlan(options, settings, log_every=1, checkpoint_every=2, evaluate_every=2)


def start(folder: Path, world: World) -> None:
    start_run(config(), plan(), folder, world=world).train(Watcher())


def go_on(folder: Path, world: World) -> None:
    resume_run(folder, steps=2 * STEPS, world=world).train(Watcher())


def diverge(folder: Path, world: World) -> None:
    """One process's embedding has a number that is none."""
    run = start_run(config(), plan(), folder, world=world)
    if world.rank == 1:
        weight = run.model.embedding.weight
        with torch.no_grad():
            weight.to_local().fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(DivergedError, match=rf"rank{world.rank}\.pt") as caught:
        run.train(Watcher())
    assert caught.value.layer == "embedding"


def in_two(work: object, folder: Path) -> None:
    """Do `work(folder, world)` in two processes that know of one another."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    meeting = folder.with_name(folder.name + ".meeting")
    meeting.unlink(missing_ok=True)

    def one(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        work(folder, World(rank, 2))  # type: ignore[operator]
        dist.destroy_process_group()

    children = [forked(functools.partial(one, rank)) for rank in (0, 1)]
    assert [outcome(child) for child in children] == [0, 0]


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By the largest number: Adam divides by small gradients, whose last bits are the order of sums."""
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-3 * float(other.abs().max())


def compare(one: Path, two: Path) -> None:
    """The same numbers in the metrics, the model and the optimiser, up to the order of sums."""
    lines, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
            if name in line:
                torch.testing.assert_close(line[name], other[name], rtol=1e-4, atol=1e-6)
        for name, value in line.get("held_out", {}).items():
            assert abs(value - other["held_out"][name]) < 0.03, (name, value)
    model, other_model = load_model(one).state_dict(), load_model(two).state_dict()
    for name, tensor in model.items():
        assert near(other_model[name], tensor), name
    state, other_state = load_trainer_state(one), load_trainer_state(two)
    assert state.optimizer.keys() == other_state.optimizer.keys()
    for name, values in state.optimizer.items():
        for key, tensor in values.items():
            assert near(other_state.optimizer[name][key], tensor), (name, key)
    assert [folder.name for folder in checkpoints_of(one)] == [folder.name for folder in checkpoints_of(two)]


def main(root: Path) -> None:
    torch.set_num_threads(1)
    # A thousand problems of each kind would take most of the time.
    RecallTask.__init__.__kwdefaults__["held_out_size"] = 40
    start(root / "one", ALONE)
    in_two(start, root / "two")
    compare(root / "one", root / "two")
    print("the same losses")
    go_on(root / "one", ALONE)
    in_two(go_on, root / "two")
    compare(root / "one", root / "two")
    print("gone on with in two, the same")
    go_on_alone = root / "then-one"
    in_two(start, go_on_alone)
    go_on(go_on_alone, ALONE)
    compare(root / "one", go_on_alone)
    print("gone on with in one, the same")
    in_two(diverge, root / "diverged")
    assert {path.name for path in (root / "diverged").glob("*.pt")} == {
        f"diverged-step-00000001-rank{rank}.pt" for rank in (0, 1)
    }
    print("divergence named")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
