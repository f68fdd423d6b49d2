"""The one model class: what a configuration declares, built."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.layers.checks import check_length
from linear_moe.layers.cross_entropy import summed_cross_entropy
from linear_moe.layers.initialization import normal_init_
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.residual_norm import ResidualNorm
from linear_moe.models.checkpointing import checkpoint_without_reentry, run_checkpointed
from linear_moe.models.generation import generate
from linear_moe.models.mixer_config import BuildContext
from linear_moe.models.schema import BlockConfig, ModelConfig
from linear_moe.models.state import LayerState, ModelState
from linear_moe.rules.looks import may_look
from linear_moe.rules.validate import check_padding_mask


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)), with the last addition left to the norm that reads the sum.

    What a block is called with, and what it returns, is therefore the residual stream and the branch that is still to be added
    to it. Adding it here would be a pass over the stream, and one more over its gradient; the next block's first norm, or the
    model's last, reads both anyway. Each norm is still used by its own block alone, which is what sharding by blocks needs.

    Attributes:
        gradient_checkpointing: whether a training forward without a state keeps the block's input only, and computes what
            is in between again in the backward pass.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(checkpoint_without_reentry)

    def __init__(self, config: BlockConfig, context: BuildContext) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": context.device, "dtype": context.dtype}
        self.mixer_norm = ResidualNorm(context.hidden_size, context.norm_eps, impl=context.impl, **factory)
        self.mixer = config.mixer.build(context)
        self.ffn = config.ffn.build(context)
        self.ffn_norm = None
        if self.ffn is not None:
            self.ffn_norm = ResidualNorm(context.hidden_size, context.norm_eps, impl=context.impl, **factory)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream `x` `[B, T, D]` and what is to be added to it `[B, T, D]`, both before and after; the rest as in
        `MoMLayer.forward`.
        """
        # Not with a state: computing it again would update it again.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and state is None:
            options = {"padding_mask": padding_mask, "cu_seqlens": cu_seqlens, "max_length": max_length}
            return run_checkpointed(self, self._run, self._gradient_checkpointing_func, x, branch, **options)
        return self._run(
            x, branch, padding_mask=padding_mask, cu_seqlens=cu_seqlens, max_length=max_length, state=state
        )

    def _run(
        self,
        x: Tensor,
        branch: Tensor | None,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.mixer_norm(x, branch)
        branch = self.mixer(
            normed, padding_mask=padding_mask, cu_seqlens=cu_seqlens, max_length=max_length, state=state
        )
        if self.ffn is not None and self.ffn_norm is not None:
            x, normed = self.ffn_norm(x, branch)
            branch = self.ffn(normed, padding_mask=padding_mask)
        return x, branch


class LanguageModel(nn.Module):
    """Embeddings, pre-norm blocks, norm and head, as a `ModelConfig` declares them.

    Args:
        config: what to build.
        impl: "auto", "triton", "chunked" or "recurrent": how the memory layers run, and by "auto" and "triton" whether the
            steps around them are kernels.
        auxiliary: "attach" the auxiliary losses to the gradient, or "collect" them for the user to add: see
            `linear_moe.layers.auxiliary`.
        device: of the parameters; "meta" for their shapes alone.
        dtype: of the parameters.

    Raises:
        ValueError: if a part can't be built.
    """

    generate = generate

    def __init__(
        self,
        config: ModelConfig,
        *,
        impl: str = "auto",
        auxiliary: str = "attach",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.declare(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        names = config.layer_names()
        context = BuildContext(config.hidden_size, config.norm_eps, 0, len(names), impl, auxiliary, device, dtype)
        table = torch.empty(config.vocab_size, config.hidden_size, **factory)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(
            Block(config.blocks[name], context._replace(layer_index=index)) for index, name in enumerate(names)
        )
        self.norm = ResidualNorm(config.hidden_size, config.norm_eps, impl=impl, **factory)
        # A tied head is no module: one matrix under one name in checkpoints.
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        for module in (self.embedding, self.head):
            if module is not None:
                normal_init_(module.weight)

    def declare(self, config: ModelConfig) -> None:
        """Take `config` for what the model is; whoever changes a part (the vocabulary, say) changes the declaration, too."""
        self.config = config
        self._fingerprint = config.fingerprint()

    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: ModelState | None = None,
        places: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token after each token.

        Args:
            tokens: `[B, T]` int64 or int32. What stands at a pad does not matter.
            padding_mask: `[B, T]` bool, true on real tokens; pads may stand anywhere.
            cu_seqlens: `[N + 1]` borders of packed documents, with B = 1. Not together with `padding_mask`.
            max_length: a bound on the tokens of a packed document, T unless given: see `MoMLayer.forward`.
            state: from `new_state`, for B sequences or N documents. Updated by this call's tokens.
            places: `[L]` int64 positions in the flattened `[B * T]`, to have the logits of those tokens only.
            labels: `[L]` int64 of those places, or of all `B * T`, to have the sum of their cross entropies in place of logits.

        Returns:
            `[B, T, vocab_size]`, or `[L, vocab_size]`, in the dtype of the parameters (autocast's under autocast), 0 at pads;
            with `labels` a scalar in float32 (float64 of a float64 model).

        Raises:
            ValueError: naming the argument that does not fit.
        """
        labelled = (tokens.numel(),) if places is None else tuple(places.shape)
        if labels is not None and tuple(labels.shape) != labelled:
            whose = "the tokens" if places is None else "the places"
            raise ValueError(f"labels must be one for each of {whose}, {list(labelled)}, got {list(labels.shape)}")
        hidden = self.hidden(
            tokens, padding_mask=padding_mask, cu_seqlens=cu_seqlens, max_length=max_length, state=state
        )
        if places is not None:
            hidden = hidden.flatten(0, 1)[places]
        if labels is None:
            return self.logits(hidden)
        hidden = hidden.flatten(0, -2)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return summed_cross_entropy(hidden, weight, labels)

    def hidden(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: ModelState | None = None,
    ) -> Tensor:
        """`forward` up to the final norm: `[B, T, D]`, in autocast's dtype where the norm is a kernel."""
        self._check_tokens(tokens, padding_mask)
        sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if state is not None:
            self._check_state(state, sequences)
        self._check_length(tokens, padding_mask, cu_seqlens, state)
        if padding_mask is not None:
            keep = padding_mask.to(tokens.device)
            x = self.embedding(torch.where(keep, tokens, 0))
            x = torch.where(keep[..., None], x, 0)
        else:
            x = self.embedding(tokens)
        branch: Tensor | None = None
        for index, block in enumerate(self.blocks):
            layer_state = None if state is None else state.layers[index]
            x, branch = block(
                x, branch, padding_mask=padding_mask, cu_seqlens=cu_seqlens, max_length=max_length, state=layer_state
            )
        output: Tensor
        _, output = self.norm(x, branch)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: `[..., D]` to `[..., vocab_size]`."""
        if self.head is not None:
            output: Tensor = self.head(hidden)
            return output
        # A model spread over devices ends on another than it begins on.
        return F.linear(hidden.to(self.embedding.weight.device), self.embedding.weight)

    def new_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> ModelState:
        """The state of `batch_size` sequences (or packed documents) before their first token.

        Args:
            batch_size: B.
            dtype: of keys, values and convolution inputs; the layers' unless given. Memories are float32 or float64.
            device: the layers' unless given.
        """
        states = [block.mixer.new_state(batch_size, dtype=dtype, device=device) for block in self.blocks]  # type: ignore[union-attr, operator]
        return ModelState(states, self._fingerprint)

    def memory_layers(self) -> list[tuple[int, MoMLayer]]:
        """The mixtures of memories, with the index of their layer."""
        mixers = ((index, block.mixer) for index, block in enumerate(self.blocks))
        return [(index, mixer) for index, mixer in mixers if isinstance(mixer, MoMLayer)]

    def num_parameters(self) -> int:
        """All parameters, embeddings included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """All but those of the memories and experts that a token does not use."""
        return self.num_parameters() - inactive_parameters(self)

    def _check_tokens(self, tokens: Tensor, padding_mask: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens must be int32 or int64 of shape [B, T], got {tokens.dtype} of {list(tokens.shape)}"
            )
        if padding_mask is not None:
            check_padding_mask(padding_mask, tokens.shape[0], tokens.shape[1])
        # Only where a look costs no synchronisation.
        if may_look(tokens.device):
            real = tokens if padding_mask is None else torch.where(padding_mask.cpu(), tokens, 0)
            outside = (real < 0) | (real >= self.config.vocab_size)
            if bool(outside.any()):
                worst = int(real[outside][0])
                raise ValueError(f"tokens must be in [0, vocab_size = {self.config.vocab_size}), got {worst}")

    def _check_length(
        self, tokens: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, state: ModelState | None
    ) -> None:
        """As `_check_state`: before any layer has gone on."""
        limits = {index: getattr(block.mixer, "max_length", None) for index, block in enumerate(self.blocks)}
        limits = {index: limit for index, limit in limits.items() if limit is not None}
        if not limits:
            return
        lengths = None
        if padding_mask is not None:
            lengths = padding_mask.sum(1)
        elif cu_seqlens is not None:
            lengths = cu_seqlens.diff()
        seen = None if state is None else state.tokens_seen
        for index, limit in limits.items():
            check_length(limit, f"the attention of layer {index}", lengths, tokens.shape[1], seen)

    def _check_state(self, state: ModelState, batch_size: int) -> None:
        """Before any layer is run: a state that is refused must not have been touched."""
        if not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState from new_state, got {type(state).__name__}")
        if state.fingerprint != self._fingerprint or len(state.layers) != len(self.blocks):
            raise ValueError(
                f"state belongs to a model of another configuration (fingerprint {state.fingerprint}, "
                f"{len(state.layers)} layers), this one is {self._fingerprint} with {len(self.blocks)}"
            )
        if state.batch_size != batch_size:
            raise ValueError(f"state is of {state.batch_size} sequences, this call has {batch_size}")

    def extra_repr(self) -> str:
        return (
            f"name={self.config.name}, layers={self.config.layers!r}, parameters={self.num_parameters():,}, "
            f"active={self.num_active_parameters():,}"
        )


def inactive_parameters(module: nn.Module) -> int:
    """Parameters in `module` of memories and experts that a token does not use."""
    counts = (getattr(part, "inactive_parameters", None) for part in module.modules())
    return sum(count() for count in counts if callable(count))


def build_model(
    config: ModelConfig,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
    *,
    auxiliary: str = "attach",
) -> LanguageModel:
    """The model that `config` declares; arguments as in `LanguageModel`."""
    return LanguageModel(config, impl=impl, auxiliary=auxiliary, device=device, dtype=dtype)
