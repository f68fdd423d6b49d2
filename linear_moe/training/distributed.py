"""Several processes training one model on shards of the data and of the model: FSDP2, PyTorch's own machinery.

`torchrun` starts the processes and tells each its rank. Each takes every n-th batch of a step; parameters, gradients and the
optimiser's state are sharded over them, layer by layer. What is written to files is whole, and the same for any number.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.models.model import LanguageModel


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Make `tensor` the sum of every process's."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: int, device: torch.device) -> int:
        """The sum of every process's number; of one alone the number, without waiting for the device."""
        return number if self.size == 1 else int(self.sum_(torch.tensor(number, device=device)))

    def gather(self, value: Any) -> list[Any]:
        """Every process's small object, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """For every process to come here."""
        if self.size > 1:
            dist.barrier()

    def batches(self, step: int, accumulate: int) -> range:
        """The numbers of this process's batches of a step of `accumulate` batches."""
        return range(step * accumulate + self.rank, (step + 1) * accumulate, self.size)

    def check_accumulate(self, accumulate: int) -> None:
        """Raises ValueError unless a step's batches can be shared evenly."""
        if accumulate % self.size:
            raise ValueError(
                f"accumulate, the batches of a step, must be a multiple of the {self.size} processes, got {accumulate}"
            )


ALONE = World()


@contextlib.contextmanager
def joined_world(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started and this one's own device among those like `device`; without it this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


def shard(model: LanguageModel, world: World) -> None:
    """Shard the parameters over the processes, each layer gathered when it is its turn. Before the optimiser is built.

    Without another precision for what is gathered: autocast casts what is to be cast, and gates stay float32.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Sharding makes other parameters of them, which do not have what was said on these.
    marks = {name: getattr(p, "no_weight_decay", False) for name, p in model.named_parameters()}
    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        parameter.no_weight_decay = marks[name]  # type: ignore[attr-defined]


def reduce_gradients(model: LanguageModel, wanted: bool) -> None:
    """Whether the next backward adds up the gradients of all processes; the last of a step's must."""
    switch = getattr(model, "set_requires_gradient_sync", None)
    if switch is not None:
        switch(wanted)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, which all processes must ask for; any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def like(tensor: Tensor, model_tensor: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded as `model_tensor` of its shape is."""
    mesh = getattr(model_tensor, "device_mesh", None)
    if mesh is None or tensor.shape != model_tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placements = model_tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(model_tensor.device), mesh, placements)


def whole_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Tensors by name, in one piece each: all processes must ask, the main one gets them."""
    gathered = {}
    for name, tensor in tensors.items():
        piece = whole(tensor)
        # One after another to the CPU: a GPU has no room for all at once.
        if world.is_main:
            gathered[name] = piece if world.size == 1 else piece.cpu()
    return gathered
