"""The configuration of a model: a typed, documented schema, read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, StringConstraints, ValidationError, model_validator

from linear_moe.models.errors import ConfigError, Problem, ProblemsFoundError
from linear_moe.models.feed_forward_config import FeedForwardConfig, SwiGLUConfig
from linear_moe.models.mixer_config import MixerConfig
from linear_moe.models.pattern import NAME, PatternError, expand_pattern
from linear_moe.models.rule_config import STRICT
from linear_moe.models.validation import problems_of
from linear_moe.models.yaml_reader import Path, read_yaml

BlockName = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]


class BlockConfig(BaseModel):
    """A layer of the model: x + mixer(norm(x)), then x + ffn(norm(x))."""

    model_config = STRICT

    mixer: MixerConfig = Field(description="What mixes the tokens of a sequence.")
    ffn: FeedForwardConfig = Field(
        default=SwiGLUConfig(type="swiglu"),
        description="What each token goes through by itself; {type: none} for nothing.",
    )


class ModelConfig(BaseModel):
    """A language model: embeddings, blocks with norms before their parts, a final norm, a head.

    `ModelConfig(...)` itself raises pydantic's ValidationError, which is a ValueError; `from_yaml` and `from_dict` say the
    same in a `ConfigError`, with key paths and near names.
    """

    model_config = STRICT

    format: Literal[1] = Field(default=1, description="Version of this format.")
    name: str | None = Field(default=None, description="What the model is called.")
    description: str | None = Field(default=None, description="What it is for.")
    hidden_size: PositiveInt = Field(description="D, the width of the model.")
    vocab_size: PositiveInt = Field(description="Tokens of the vocabulary.")
    blocks: dict[BlockName, BlockConfig] = Field(description="The kinds of layers, by a name that `layers` uses.")
    layers: str = Field(
        description='Which block stands where: names, "*" and a count, parentheses, as in "(memory*7 recall)*3".'
    )
    tie_embeddings: bool = Field(default=False, description="Whether the head uses the embeddings' matrix.")
    norm_eps: PositiveFloat = Field(default=1e-5, description="Added to the mean square in every norm.")

    @model_validator(mode="after")
    def _check_together(self) -> ModelConfig:
        problems = list(self._problems())
        if problems:
            raise ProblemsFoundError(problems)
        return self

    def _problems(self) -> Iterator[Problem]:
        for name, block in self.blocks.items():
            for key, part in (("mixer", block.mixer), ("ffn", block.ffn)):
                for problem in part.problems(self.hidden_size):
                    yield Problem(f"blocks.{name}.{key}.{problem.path}", problem.message)
        try:
            used = self.layer_names()
        except PatternError as error:
            yield Problem("layers", str(error))
            return
        for name in self.blocks:
            if name not in used:
                yield Problem(f"blocks.{name}", f"would be ignored: layers = {self.layers!r} does not use it")

    def layer_names(self) -> list[str]:
        """The block name of each layer."""
        return expand_pattern(self.layers, self.blocks)

    def fingerprint(self) -> str:
        """A short hash of what determines the model's shape: a carried state belongs to models of one fingerprint."""
        shape = self.model_dump(mode="json", exclude={"name", "description"})
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_yaml(cls, text: str, source: str = "the configuration") -> ModelConfig:
        """Read a configuration from YAML text; `source` is what errors call it.

        Raises:
            ConfigError: with the path and line of each key that is wrong, what came, what is allowed and the nearest name.
        """
        data, lines = read_yaml(text, source)
        return cls._read(data, source, lines)

    @classmethod
    def from_dict(cls, data: Any, source: str = "the configuration") -> ModelConfig:
        """Read a configuration from nested mappings.

        Raises:
            ConfigError: as `from_yaml`, without lines.
        """
        return cls._read(data, source, {})

    @classmethod
    def _read(cls, data: Any, source: str, lines: dict[Path, int]) -> ModelConfig:
        if not isinstance(data, dict):
            came = "nothing" if data is None else f"{type(data).__name__} {data!r:.60}"
            keys = "hidden_size, vocab_size, blocks, layers"
            raise ConfigError(source, [Problem("", f"must be a mapping with the keys {keys}; got {came}")])
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(source, problems_of(error, cls, lines)) from None

    def to_yaml(self) -> str:
        """YAML text of what was set, which `from_yaml` reads to an equal configuration."""
        data = _type_first(self.model_dump(mode="json", exclude_unset=True))
        text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
        return text


def _type_first(data: Any) -> Any:
    """Mappings as people write them: what it is, then its options."""
    if not isinstance(data, dict):
        return data
    return {key: _type_first(data[key]) for key in sorted(data, key=lambda key: key != "type")}
