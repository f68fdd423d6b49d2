"""What a declared model is made of and costs: counted on the model itself, built without memory for its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linear_moe.forms import Decay, Erase
from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.mixture_of_experts import MixtureOfExperts
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.recurrent_mixer import RecurrentMixer
from linear_moe.layers.routing import Router
from linear_moe.models.model import Block, LanguageModel, inactive_parameters
from linear_moe.models.schema import ModelConfig

if TYPE_CHECKING:
    from rich.console import Group

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table."""

    index: int
    block: str
    mixer: str
    ffn: str
    parameters: int
    active_parameters: int
    """Without the memories and experts that a token does not use."""
    state_bytes: int
    """Of one sequence, however long."""
    state_bytes_per_token: int
    """What each further token adds (full attention)."""
    flops_per_token: int


@dataclass(frozen=True)
class Explanation:
    """A model's layers and totals. FLOPs are those of a forward pass at `context` tokens; training takes 3 times as many.

    Counted are, as 2 a multiply-add: every matrix a token goes through, each once; the short convolutions; for each
    memory that a token uses and each number of its state, 1 for a decay, 2 for a delta erase, 2 for the write and 2 for
    the read (a rule without a declared form: write and read); for attention, scores and reads over the mean number of
    visible tokens. Not counted: the embedding (a look-up), norms, gates and activations.
    """

    name: str
    layers: list[LayerRow]
    parameters: int
    active_parameters: int
    embedding_parameters: int
    """Embeddings, and the head where it is not tied to them; part of both counts."""
    state_bytes: int
    state_bytes_per_token: int
    flops_per_token: int
    context: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=self.name, title_justify="left")
        table.add_column("layer", justify="right")
        table.add_column("block")
        for column in ("parameters", "active", "state bytes", "MFLOP/token"):
            table.add_column(column, justify="right")
        for row in self.layers:
            growing = f" + {row.state_bytes_per_token:,}/token" if row.state_bytes_per_token else ""
            table.add_row(
                str(row.index),
                row.block,
                f"{row.parameters:,}",
                f"{row.active_parameters:,}",
                f"{row.state_bytes:,}{growing}",
                f"{row.flops_per_token / 1e6:,.2f}",
            )
        # Below the table, once each: beside every layer they would not fit a terminal.
        blocks = {row.block: f"{row.mixer}; feed-forward: {row.ffn}" for row in self.layers}
        return Group(table, *(f"{name}: {parts}" for name, parts in blocks.items()), *self.lines())

    def lines(self) -> Iterator[str]:
        """The totals, a line each."""
        growing = f" + {self.state_bytes_per_token:,} a token" if self.state_bytes_per_token else ""
        yield f"parameters        {self.parameters:,}, of them {self.embedding_parameters:,} in embeddings and head"
        yield f"active a token    {self.active_parameters:,}"
        yield f"state a sequence  {self.state_bytes:,} bytes{growing} (parameters in {self.dtype})"
        yield f"FLOPs a token     {self.flops_per_token:,} forward at {self.context:,} tokens of context"


def explain(config: ModelConfig, *, context: int = DEFAULT_CONTEXT, dtype: torch.dtype = torch.float32) -> Explanation:
    """Count what `config` declares.

    Args:
        config: the model.
        context: tokens of a sequence, for the cost of attention.
        dtype: of the parameters, for the bytes of keys, values and convolution inputs.

    Raises:
        ValueError: if `context` is not positive.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    model = LanguageModel(config, device="meta", dtype=dtype)
    rows = []
    for index, (name, block) in enumerate(zip(config.layer_names(), model.blocks, strict=True)):
        assert isinstance(block, Block)
        declared = config.blocks[name]
        total = _count(block)
        fixed, growing = _state_bytes(block.mixer)
        rows.append(
            LayerRow(
                index=index,
                block=name,
                mixer=declared.mixer.summary(),
                ffn=declared.ffn.summary(config.hidden_size),
                parameters=total,
                active_parameters=total - inactive_parameters(block),
                state_bytes=fixed,
                state_bytes_per_token=growing,
                flops_per_token=_matrix_flops(block) + _mixing_flops(block.mixer, context),
            )
        )
    head = model.embedding.weight.numel()
    return Explanation(
        name=config.name or "model",
        layers=rows,
        parameters=model.num_parameters(),
        active_parameters=model.num_active_parameters(),
        embedding_parameters=head + (0 if model.head is None else _count(model.head)),
        state_bytes=sum(row.state_bytes for row in rows),
        state_bytes_per_token=sum(row.state_bytes_per_token for row in rows),
        flops_per_token=sum(row.flops_per_token for row in rows) + 2 * head,
        context=context,
        dtype=str(dtype).removeprefix("torch."),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _state_bytes(mixer: nn.Module) -> tuple[int, int]:
    """Bytes of one sequence's state, and what a token adds to it."""
    state = mixer.new_state(1)  # type: ignore[operator]
    grows = isinstance(state, AttentionState) and state.num_columns == 0
    return state.nbytes, state.bytes_per_column if grows else 0


def _matrix_flops(block: nn.Module) -> int:
    """Of the matrices that one token goes through."""
    numbers = 0
    for part in block.modules():
        if isinstance(part, (nn.Linear, Router)):
            numbers += part.weight.numel()
        elif isinstance(part, MixtureOfExperts):
            numbers += part.top_k * (part.in_weight[0].numel() + part.out_weight[0].numel())
        elif isinstance(part, RecurrentMixer):
            uses = _memories_a_token(part)
            numbers += 0 if part.memory_weight is None else uses * part.memory_weight[0].numel()
            numbers += 0 if part.token_weight is None else part.token_weight.numel()
            for name, second in part.second_stage.items():
                numbers += second[0].numel() * (uses if name in part.memory_projections else 1)
    return 2 * numbers


def _mixing_flops(mixer: nn.Module, context: int) -> int:
    """Of what mixes tokens: convolution and scan, or attention over the mean number of visible tokens."""
    if isinstance(mixer, SoftmaxAttention):
        seen = min(mixer.window or context, context)
        # 1, 2, ... up to what a token can see, then always that many.
        visible = seen * (seen + 1) // 2 + seen * (context - seen)
        return 4 * mixer.num_heads * mixer.head_dim * visible // context
    assert isinstance(mixer, RecurrentMixer)
    uses = _memories_a_token(mixer)
    rows, columns = mixer.rule.state_shape()
    form = mixer.rule.form
    per_number = 4
    if form is not None:
        per_number += (form.decay is not Decay.NONE) + 2 * (form.erase is not Erase.NONE)
    scan = uses * mixer.rule.dims.num_value_heads * rows * columns * per_number
    if mixer.conv_weight is None:
        return scan
    return scan + 2 * mixer.conv_weight.numel() * (1 if mixer.conv_scope == "sequence" else uses)


def _memories_a_token(mixer: RecurrentMixer) -> int:
    return mixer.top_k + mixer.shared_memory if isinstance(mixer, MoMLayer) else 1
