"""The options of a checkpoint's `config.json`: read with the peer's defaults, refused by name, none overlooked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from linear_moe.models.errors import choices

WITHOUT_EFFECT = frozenset(
    {
        # Bookkeeping of the library that wrote the file.
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
        # Training, generation, and how kernels are chosen.
        *("attn_mode", "bos_token_id", "chunk_size_feed_forward", "eos_token_id", "fuse_cross_entropy"),
        *("fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "initializer_range", "is_decoder"),
        *("keys_to_ignore_at_inference", "max_position_embeddings", "output_attentions", "output_hidden_states"),
        *("pad_token_id", "rescale_prenorm_residual", "return_dict", "use_cache", "use_l2warp"),
    }
)
"""Keys that change nothing of what a model computes from tokens, in every family."""


class Options:
    """The options of one checkpoint.

    Args:
        data: the contents of `config.json`.
        defaults: what the peer's configuration class takes where a key is not given; the keys that a family reads.
        source: what errors call the file.
        without_effect: further keys that this family's model does not compute with.
    """

    def __init__(
        self, data: Mapping[str, Any], defaults: Mapping[str, Any], source: str, without_effect: Collection[str] = ()
    ) -> None:
        self._data = data
        self._defaults = defaults
        self.source = source
        self._without_effect = WITHOUT_EFFECT | frozenset(without_effect)

    def value(self, name: str) -> Any:
        """As it stands in the file, or the peer's default."""
        return self._data.get(name, self._defaults[name])

    def given(self, name: str) -> bool:
        """Whether it stands in the file."""
        return name in self._data

    def integer(self, name: str) -> int:
        """A whole number of at least 1."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "must be a whole number of at least 1")
        return value

    def optional_integer(self, name: str) -> int | None:
        """The same, or None."""
        return None if self.value(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error(name, "must be a number above 0")
        return value

    def truth(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raise unless the option has one of the values that can be represented."""
        value = self.value(name)
        # True == 1 in Python, but not in JSON.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            shown = " or ".join(_json(one) for one in allowed)
            raise self.error(name, f"can't be represented; {shown} can")

    def error(self, name: str, message: str) -> ValueError:
        """What to raise of an option: names it, its value and `message`."""
        where = "" if self.given(name) else " (the default)"
        return ValueError(f"{self.source}: {name} = {_json(self.value(name))}{where} {message}")

    def finish(self, ignore: Collection[str] = ()) -> None:
        """Raise for a key that is neither read nor known to have no effect, nor in `ignore`.

        What is unknown may be an option that changes what the model computes.
        """
        for name in ignore:
            if name in self._defaults:
                raise ValueError(f"{self.source}: {name} can't be ignored: the conversion reads it")
            if name not in self._data:
                raise ValueError(f"{self.source}: {name} can't be ignored: there is no such key")
        for name, hint in self.unknown().items():
            if name not in ignore:
                raise ValueError(
                    f"{self.source}: unknown key {name} = {_json(self._data[name])}; {hint}if it changes nothing of what the "
                    f"model computes, ignore it: --ignore {name}"
                )

    def unknown(self) -> dict[str, str]:
        """The keys that are neither read nor known to have no effect, each with the nearest that is read."""
        known = frozenset(self._defaults) | self._without_effect
        near = {name: choices(name, sorted(self._defaults)) for name in self._data if name not in known}
        return {name: text.partition("allowed:")[0] for name, text in near.items()}


def _json(value: Any) -> str:
    """As it stands in the file, cut short."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
