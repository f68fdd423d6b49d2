"""What a folder must hold before a model is loaded from it: said by name, where a loader would fail late or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

MAX_NAMED = 5


def check_weights(folder: Path, expected: Mapping[str, Tensor], vocab_size: int, variant: str | None = None) -> None:
    """Look at the safetensors files of a folder, at their headers only.

    Args:
        folder: where the files are. One without safetensors files is left to transformers.
        expected: a tensor of each name that the model has, of the right shape.
        vocab_size: of the configuration, for what is said about embeddings of another.
        variant: as in `from_pretrained`.

    Raises:
        ValueError: naming the shard that is missing or damaged, or the tensors that are missing, not the model's, or of
            another shape.
    """
    found: dict[str, list[int]] = {}
    for file in _weight_files(folder, variant):
        try:
            with safe_open(str(file), framework="pt") as content:
                found |= {name: list(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged or no safetensors file: {error}") from error
    if not found:
        return
    # A checkpoint of the bare language model has the same names without the prefix.
    prefix = "" if any(name.startswith("model.") for name in found) else "model."
    shapes = {prefix + name: shape for name, shape in found.items()}
    refuse_other_tensors(str(folder), expected.keys() - shapes.keys(), shapes.keys() - expected.keys())
    for name, tensor in expected.items():
        if shapes[name] != list(tensor.shape):
            hint = ""
            if name in ("model.embedding.weight", "model.head.weight"):
                hint = f": the weights are of a vocabulary of {shapes[name][0]}, the configuration says {vocab_size}"
            raise ValueError(
                f"{str(folder)!r}: {name} must be {list(tensor.shape)} for this configuration, is {shapes[name]}{hint}"
            )


def refuse_other_tensors(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ValueError, by name, unless both are empty: a tensor that is not there would be drawn at random."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        raise ValueError(f"{source!r} lacks {_some(missing)}")
    if unexpected:
        raise ValueError(f"{source!r} has {_some(unexpected)}, which this configuration has not")


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Compare the tokenizer that lies beside a model, if there is one, with the model's vocabulary.

    Raises:
        ValueError: if it has tokens that the model has not. Fewer are no error: embeddings are often padded.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    needed = max(ids, default=-1) + 1
    if needed > vocab_size:
        raise ValueError(
            f"{str(file)!r} has token {needed - 1}, the model has vocab_size = {vocab_size}: take the tokenizer that the "
            f"model was trained with, or load the model from a folder without one and call "
            f"resize_token_embeddings({needed})"
        )


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Those that transformers takes: one file, or the shards of an index."""
    single, index = (
        folder / (name if variant is None else _with_variant(name, variant))
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = sorted(set(_weight_map(index).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {_some(missing)}, of the {len(shards)} shards in {index.name}")
    return [folder / shard for shard in shards]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(index)!r} is damaged: no JSON with a weight_map") from error


def _with_variant(name: str, variant: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
