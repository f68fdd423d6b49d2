"""The layer laws of sequences: padded, packed, split, carried, reordered and saved."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.routing import Routing
from linear_moe.layers.state import MemoryState
from linear_moe.testing.laws import (
    Case,
    Law,
    require,
    require_all_close,
    require_close,
    require_same_bits,
    require_zero,
)
from linear_moe.testing.layer_cases import (
    choices,
    dense_input,
    gradients,
    mixture,
    packed_input,
    padded_input,
    present,
    require_close_states,
)

STATISTICS = ("load", "entropy", "balance_loss", "z_loss")


def _alone(layer: MoMLayer, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """Output and state of tokens `[t, D]` that are a sequence by themselves."""
    state = layer.new_state(1) if state is None else state
    return layer(x[None], state=state)[0], state


def _routing(layer: MoMLayer) -> Routing:
    assert layer.routing is not None
    return layer.routing


@torch.no_grad()
def _padding(case: Case) -> None:
    layer = mixture(case)
    x, mask = padded_input(case)
    state = layer.new_state(len(case.lengths))
    output = layer(x, padding_mask=mask, state=state)
    statistics = _routing(layer)
    require_zero("output at pads", output[~mask])
    require_close("tokens seen", state.tokens_seen, torch.tensor(case.lengths), 0)
    for b in range(len(case.lengths)):
        alone, state_alone = _alone(layer, x[b, mask[b]])
        require_close(f"output of sequence {b} among pads", output[b, mask[b]], alone)
        require_close_states(state.select(torch.tensor([b])), state_alone, f"state of sequence {b}")
    layer(x[mask][None], cu_seqlens=case.cu_seqlens)
    for name in STATISTICS:
        require_close(f"{name} among pads", getattr(statistics, name), getattr(_routing(layer), name))


def _garbage(case: Case) -> None:
    layer = mixture(case)
    x, mask = padded_input(case)
    results = []
    for garbage in (0.0, float("nan")):
        filled = torch.where(mask[..., None], x, garbage).requires_grad_()
        state = layer.new_state(len(case.lengths))
        output = layer(filled, padding_mask=mask, state=state)
        found = gradients(layer, filled, output.square().sum() + state.memory.square().sum())
        at_pads = found.get("x")
        require_zero("gradient at pads", None if at_pads is None else at_pads[~mask])
        tensors = {f"gradient of {name}": gradient for name, gradient in found.items() if gradient is not None}
        tensors |= {f"state.{name}": tensor for name, tensor in state.tensors().items()}
        tensors |= {name: getattr(_routing(layer), name) for name in STATISTICS} | {"output": output}
        results.append(tensors)
    for name, tensor in results[0].items():
        require_same_bits(f"{name}, with NaN at pads,", results[1][name], tensor)


@torch.no_grad()
def _packing(case: Case) -> None:
    layer = mixture(case)
    x, borders = packed_input(case)
    state = layer.new_state(len(case.lengths))
    layer(dense_input(case, stream=1), state=state)
    before = state.clone()
    output = layer(x, cu_seqlens=borders, state=state)
    for n, (start, end) in enumerate(pairwise(borders.tolist())):
        alone, state_alone = _alone(layer, x[0, start:end], before.select(torch.tensor([n])))
        require_close(f"output of document {n}", output[0, start:end], alone)
        require_close_states(state.select(torch.tensor([n])), state_alone, f"state of document {n}")
    again = before.clone()
    require_close("output with 32-bit borders", layer(x, cu_seqlens=borders.int(), state=before), output, 0)
    longest = max(1, *case.lengths)
    bounded = layer(x, cu_seqlens=borders, max_length=longest, state=again)
    require_close("output with a bound on the documents' lengths", bounded, output)
    require_close_states(again, state, "state with a bound on the documents' lengths")


@torch.no_grad()
def _splits(case: Case) -> None:
    layer, x = mixture(case).eval(), dense_input(case)
    batch, length = x.shape[:2]
    whole_state = layer.new_state(batch)
    whole = layer(x, state=whole_state)
    chosen = choices(case)
    cuts = sorted(chosen.randint(0, length) for _ in range(3))
    for kind, borders in (("random splits", [0, *cuts, length]), ("single tokens", list(range(length + 1)))):
        state = layer.new_state(batch)
        storage = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        parts = [layer(x[:, start:end], state=state) for start, end in pairwise(borders)]
        require_close(f"output in {kind}", torch.cat([*parts, x[:, :0]], 1), whole)
        require_close_states(state, whole_state, f"state after {kind}")
        moved = [name for name, tensor in state.tensors().items() if tensor.data_ptr() != storage[name]]
        require(not moved, f"without gradients the state is updated in place, but {moved} were replaced")


@torch.no_grad()
def _ragged_splits(case: Case) -> None:
    layer = mixture(case).eval()
    x, mask = padded_input(case)
    whole_state = layer.new_state(len(case.lengths))
    whole = layer(x, padding_mask=mask, state=whole_state)
    cut = choices(case).randint(0, x.shape[1])
    state = layer.new_state(len(case.lengths))
    halves = [layer(x[:, at], padding_mask=mask[:, at], state=state) for at in (slice(0, cut), slice(cut, None))]
    require_close("output of a padded batch in two calls", torch.cat(halves, 1), whole)
    require_close_states(state, whole_state)


def _carried(case: Case) -> None:
    layer, x = mixture(case, balance_weight=0.0, z_loss_weight=0.0), dense_input(case).requires_grad_()
    batch, length = x.shape[:2]
    cotangent = case.randn(*x.shape, stream=1)
    whole_state = layer.new_state(batch)
    whole = gradients(layer, x, (layer(x, state=whole_state) * cotangent).sum() + whole_state.memory.sum())
    cut = choices(case).randint(min(1, length), max(length - 1, min(1, length)))
    state = layer.new_state(batch)
    first = layer(x[:, :cut], state=state)
    held, kept = state.memory, state.memory.detach().clone()
    second = layer(x[:, cut:], state=state)
    require_same_bits("the carried memory, which the graph still needs,", held.detach(), kept)
    parts = gradients(layer, x, (torch.cat((first, second), 1) * cotangent).sum() + state.memory.sum())
    require_all_close(present(parts), present(whole))

    state = layer.new_state(batch)
    layer(x[:, :cut], state=state)
    truncated = layer(x[:, cut:], state=state.detach())
    require_close("output from a detached state", truncated, second)
    gradient = gradients(layer, x, truncated.square().sum()).get("x")
    require_zero("gradient through a detached state", None if gradient is None else gradient[:, :cut])


@torch.no_grad()
def _reordering(case: Case) -> None:
    layer = mixture(case)
    x, mask = padded_input(case)
    state = layer.new_state(len(case.lengths))
    layer(x, padding_mask=mask, state=state)
    before = state.clone()
    chosen = torch.tensor(choices(case).choices(range(len(case.lengths)), k=3))
    more = case.randn(3, 2, case.hidden_size, stream=1)
    picked = state.select(chosen)
    output = layer(more, state=picked)
    for name, tensor in state.tensors().items():
        require_same_bits(f"state.{name}, of which another was selected and used,", tensor, before.tensors()[name])
    for i, b in enumerate(chosen.tolist()):
        alone, state_alone = _alone(layer, more[i], state.select(torch.tensor([b])))
        require_close(f"output of the sequence selected from {b}", output[i], alone)
        require_close_states(picked.select(torch.tensor([i])), state_alone)


@torch.no_grad()
def _saving(case: Case) -> None:
    layer = mixture(case)
    state = layer.new_state(len(case.lengths))
    layer(dense_input(case), state=state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        state.save(path)
        loaded = MemoryState.load(path)
    more = dense_input(case, stream=1)[:, :2]
    require_same_bits("output from a loaded state", layer(more, state=loaded), layer(more, state=state))
    for name, tensor in state.tensors().items():
        require_same_bits(f"state.{name} from a loaded state", loaded.tensors()[name], tensor)


SEQUENCE_LAWS: list[Law] = [
    Law("layer-padding", "padded sequences are the sequences alone; pads read 0 and are in no statistic", _padding),
    Law("layer-garbage", "what stands at pads changes nothing, in the backward pass either", _garbage),
    Law("layer-packing", "packed documents are the documents alone, each from its own state", _packing),
    Law("layer-splits", "one pass is any split with a carried state, and token-by-token decoding", _splits),
    Law("layer-ragged-splits", "a padded batch may be split as well", _ragged_splits),
    Law(
        "layer-carried-gradients",
        "a carried state passes gradients on as one pass does, until it is detached",
        _carried,
    ),
    Law("layer-reordering", "selected sequences continue as they would alone, and leave the others be", _reordering),
    Law("layer-saving", "a saved state continues with the same bits", _saving),
]
