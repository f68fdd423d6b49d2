"""The language model as transformers sees it: loss, cache, loading and saving around the one model class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from linear_moe.layers.auxiliary import AuxiliaryLoss, collect_auxiliary_losses
from linear_moe.layers.balance import BalanceBias
from linear_moe.models.hf.cache import LinearMoECache
from linear_moe.models.hf.config import LinearMoEConfig
from linear_moe.models.hf.loading import check_tokenizer, check_weights, refuse_other_tensors
from linear_moe.models.hf.loss import next_token_loss
from linear_moe.models.hf.offload import bring_mixers_whole
from linear_moe.models.model import LanguageModel


class LinearMoEForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A `LanguageModel` with the interface of transformers.

    Args:
        config: what to build.
        impl: "auto", "triton", "chunked" or "recurrent": how the memory layers run. `from_pretrained` takes it, too.
        language_model: an existing model of that configuration to wrap, instead of a new one. Its auxiliary losses are
            collected from then on, whatever they were before.

    Attributes:
        model: the `LanguageModel`.
        auxiliary: where the auxiliary losses are attached when there are no labels; see `forward`.

    Raises:
        ValueError: if a part can't be built, or `language_model` is of another configuration.
    """

    config_class = LinearMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Its loss takes `num_items_in_batch`.
    accepts_loss_kwargs = True
    # A memory can't be put back by some tokens, which speculative decoding would ask for.
    _is_stateful = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("cache", "state")

    def __init__(
        self, config: LinearMoEConfig, *, impl: str = "auto", language_model: LanguageModel | None = None
    ) -> None:
        super().__init__(config)
        declared = config.declaration()
        if language_model is None:
            language_model = LanguageModel(declared, impl=impl, auxiliary="collect")
        elif language_model.config.fingerprint() != declared.fingerprint():
            raise ValueError("language_model is of another configuration than config")
        for part in language_model.modules():
            if isinstance(part, AuxiliaryLoss):
                part.mode = "collect"
        self.model = language_model
        self.auxiliary = AuxiliaryLoss("attach")
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel) -> LinearMoEForCausalLM:
        """Wrap a model that was built or trained without transformers. The parameters are shared, not copied."""
        return cls(LinearMoEConfig(model=model.config), language_model=model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: LinearMoECache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The logits of the token after each token, and the loss if there are labels.

        The auxiliary losses of routers count in training, each exactly once: with labels they are part of the loss (what
        scales the loss scales them); without, their gradient is attached to the logits, for any loss that is made of them,
        and what that loss is multiplied by before `backward` has to be told to `linear_moe.set_auxiliary_scale`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, or `[B, columns of the cache + T]`: 0 at pads, which may stand anywhere.
            cache: to go on from; updated by this call's tokens.
            inputs_embeds: not supported.
            labels: `[B, T]`, not shifted, usually `input_ids`; -100 where one is not counted. A label at a pad, or right
                after one, is not counted either.
            use_cache: whether to return a cache to go on from; the configuration's choice unless given, but never in
                training or with labels.
            output_attentions: not supported.
            output_hidden_states: not supported.
            return_dict: a tuple instead if false.
            logits_to_keep: the last so many columns only, or the columns of that index; 0 for all.
            num_items_in_batch: labels counted in all micro-batches of the step, which the loss is divided by.

        Returns:
            `loss`, `logits` `[B, T, vocab_size]` (0 at pads) and `cache`, each if there is one.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        _refuse(
            inputs_embeds=inputs_embeds, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        if input_ids is None:
            raise ValueError("input_ids is required")
        if labels is not None:
            _check_labels(labels, input_ids)
        _check_cache(cache)
        padding_mask = _padding_mask(attention_mask, input_ids, 0 if cache is None else cache.num_columns)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if cache is None and use_cache:
            cache = LinearMoECache()
        state = None if cache is None else cache.state_for(self.model, input_ids.shape[0])
        hidden = self.model.hidden(input_ids, padding_mask=padding_mask, state=state)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        # Out of training there are none, and looking through all parts would be felt in each step of decoding.
        auxiliary = collect_auxiliary_losses(self.model) if self.training else hidden.new_zeros(())

        loss = None
        if labels is None:
            logits = self.model.logits(slice_logits_to_keep(hidden, logits_to_keep))
            logits = self.auxiliary(logits, auxiliary.to(logits.device))
        else:
            every = self.model.logits(hidden)
            logits = slice_logits_to_keep(every, logits_to_keep)
            loss = next_token_loss(
                every, labels, auxiliary, padding_mask=padding_mask, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load what `save_pretrained` wrote; arguments as in transformers, and `impl`.

        Raises:
            ValueError: naming the shard that is missing or damaged, the tensors that are missing or of another shape, or
                the tokenizer beside the model that has other tokens.
            ConfigError: (a ValueError) for a configuration of another version or with unknown keys.
        """
        if kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                "ignore_mismatched_sizes would leave parameters without values: use resize_token_embeddings"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        folder = Path(os.fspath(pretrained_model_name_or_path or "")) / kwargs.get("subfolder", "")
        # An adapter's folder holds no model, and transformers finds the one it belongs to.
        plain = pretrained_model_name_or_path is not None and not (folder / "adapter_config.json").is_file()
        if plain and folder.is_dir():
            _check_folder(cls, folder, kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if plain and getattr(model, "hf_quantizer", None) is None:
            refuse_other_tensors(str(pretrained_model_name_or_path), info["missing_keys"], info["unexpected_keys"])
        bring_mixers_whole(model)
        return (model, info) if wants_info else model

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: LinearMoECache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; a token that was generated is no pad, so no mask goes with it."""
        first = kwargs.get("is_first_iteration", False)
        if cache is not None and cache.num_columns and not first:
            attention_mask = None
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, cache=cache, attention_mask=attention_mask, **kwargs
        )
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None: the model has one kind of cache, its state; "
                f"got {generation_config.cache_implementation!r}"
            )
        _check_cache(model_kwargs.get("cache"))
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask must end with a real token in every row: pad prompts on the left "
                "(tokenizer.padding_side = 'left')"
            )
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = LinearMoECache()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take other embeddings."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embeddings' own matrix."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take another head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Take a vocabulary of another size; arguments as in transformers. The declaration follows."""
        embeddings: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        self.model.declare(self.config.declaration())
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Every layer draws its own weights when it is built; what no checkpoint holds is set here after loading."""
        if isinstance(module, AuxiliaryLoss):
            module.reset_parameters()
        elif isinstance(module, BalanceBias):
            module.pending.zero_()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(
                "use_reentrant must be False: a reentrant checkpoint runs its first pass without gradients, and the "
                "auxiliary losses would be lost"
            )
        for index, block in enumerate(self.model.blocks):
            block.gradient_checkpointing = enable and index % every_n_layers == 0  # type: ignore[assignment]
            block._gradient_checkpointing_func = gradient_checkpointing_func  # type: ignore[assignment]


def _check_folder(cls: type[LinearMoEForCausalLM], folder: Path, kwargs: dict[str, Any]) -> None:
    config = kwargs.get("config")
    if not isinstance(config, LinearMoEConfig):
        config = cls.config_class.from_pretrained(folder if config is None else config)
    check_tokenizer(folder, config.vocab_size)
    # Quantised or renamed tensors have names and shapes of their own.
    if getattr(config, "quantization_config", None) is None and not kwargs.get("key_mapping"):
        model = LanguageModel(config.declaration(), device="meta")
        expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        check_weights(folder, expected, config.vocab_size, kwargs.get("variant"))


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported, got {type(value).__name__}")


def _check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, LinearMoECache):
        raise ValueError(f"cache must be a LinearMoECache, got {type(cache).__name__}")


def _padding_mask(attention_mask: Tensor | None, input_ids: Tensor, num_columns: int) -> Tensor | None:
    """`[B, T]` bool, of this call's tokens."""
    if attention_mask is None:
        return None
    batch, length = input_ids.shape
    allowed = {length, num_columns + length}
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in allowed:
        shapes = " or ".join(str([batch, width]) for width in sorted(allowed))
        raise ValueError(f"attention_mask must be {shapes} for these input_ids, got {list(attention_mask.shape)}")
    return attention_mask[:, -length:] != 0


def _check_labels(labels: Tensor, input_ids: Tensor) -> None:
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must be of the shape of input_ids, {list(input_ids.shape)}, got {list(labels.shape)}")
