"""A declared model as a Hugging Face configuration: `config.json` holds the declaration as plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from linear_moe.models.errors import ConfigError, Problem, choices
from linear_moe.models.library import load_config
from linear_moe.models.schema import ModelConfig

FORMAT = 1
"""Of the declaration, the only one that this version reads."""

# What transformers itself hands to a configuration beside the declared fields: kept as it is.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
    }
)


class LinearMoEConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of a `LinearMoEForCausalLM`.

    Args:
        model: the declaration: a `ModelConfig`, the same as nested mappings, or the path of a YAML file or the name of a
            shipped configuration, such as "mom-380m". It is kept as plain data, under the keys of the YAML files.
        use_cache: whether a forward pass out of training returns a cache unless it is told otherwise.
        pad_token_id: as everywhere in transformers; the model itself has no token of special meaning.
        bos_token_id: the same.
        eos_token_id: the same.
        kwargs: what every configuration of transformers takes, such as `dtype`.

    Raises:
        ConfigError: (a ValueError) for a declaration that can't be, one of another format, or an unknown key: with the key,
            what came and what is allowed.
    """

    model_type = "linear_moe"
    # A cache is no prediction that an evaluation should gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    model: Any
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown(kwargs)
        self.model = _plain(_read(self.model))
        super().__post_init__(**kwargs)

    def declaration(self) -> ModelConfig:
        """The declared model, checked."""
        return _read(self.model)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary. Setting it changes the declaration, not a model that is built already."""
        return int(self.model["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = _plain(_read({**self.model, "vocab_size": size}))

    @property
    def hidden_size(self) -> int:
        """D, the width of the model."""
        return int(self.model["hidden_size"])

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return len(self.declaration().layer_names())

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head uses the embeddings' matrix."""
        return bool(self.model.get("tie_embeddings", False))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`; arguments as in transformers.

        Raises:
            ConfigError: if a key was added that could not be loaded again.
        """
        _refuse_unknown({name: value for name, value in self.to_dict().items() if name not in _FIELDS})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


_FIELDS = frozenset(field.name for field in fields(LinearMoEConfig))


def _read(model: Any) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load_config(model)
    if isinstance(model, Mapping):
        written = model.get("format", FORMAT)
        if written != FORMAT:
            message = f"is {written!r}: written by another version of linear-moe; this one reads format {FORMAT}"
            raise ConfigError("LinearMoEConfig", [Problem("model.format", message)])
        model = dict(model)
    return ModelConfig.from_dict(model, source="LinearMoEConfig.model")


def _plain(declared: ModelConfig) -> dict[str, Any]:
    """What was set, with the format always: a later version must see which one it reads."""
    return {"format": FORMAT, **declared.model_dump(mode="json", exclude_unset=True)}


def _refuse_unknown(keys: Mapping[str, Any]) -> None:
    generation = GenerationConfig._get_default_generation_params()
    unknown = [name for name in keys if name not in _TRANSFORMERS_KEYS and name not in generation]
    own = ["model", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"]
    problems = []
    for name in unknown:
        if name in ModelConfig.model_fields:
            problems.append(Problem(name, f"belongs to the declaration: model = {{..., {name!r}: {keys[name]!r}}}"))
        else:
            problems.append(Problem(name, f"unknown key; {choices(name, own)}, and what every transformers config has"))
    if problems:
        raise ConfigError("LinearMoEConfig", problems)
