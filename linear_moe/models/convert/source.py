"""A Hugging Face checkpoint folder: `config.json`, and weights in one safetensors file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_moe.models.extras import require
from linear_moe.models.model_folder import shown_names

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SourceFolder:
    """What a checkpoint says and holds. Tensors are read when they are taken; what nobody took is known in the end.

    Args:
        folder: of the checkpoint.

    Attributes:
        config: the contents of `config.json`.

    Raises:
        ValueError: naming the file that is missing, damaged or not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder")
        self.config = _read_json(folder / CONFIG_FILE)
        self._safetensors = require("safetensors", extra="train")
        self._file_of: dict[str, Path] = {}
        for file, expected in self._files().items():
            names = self._names(file)
            lacking = set(expected) - names
            if lacking:
                raise ValueError(f"{str(file)!r} lacks {shown_names(lacking)}, which {INDEX_FILE} says it holds")
            self._file_of |= dict.fromkeys(names, file)
        self._taken: set[str] = set()

    @property
    def config_path(self) -> str:
        """What errors about an option call the place it came from."""
        return str(self.folder / CONFIG_FILE)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._file_of

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name`, which must have this shape.

        Raises:
            ValueError: if it is missing, of another shape, or holds no floating-point numbers.
        """
        if name not in self._file_of:
            raise ValueError(f"{str(self.folder)!r} has no tensor {name}, which its {CONFIG_FILE} asks for")
        file = self._file_of[name]
        with self._safetensors.safe_open(str(file), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{str(file)!r}: {name} must be {list(shape)} by its {CONFIG_FILE}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{str(file)!r}: {name} is {tensor.dtype}; only float32, bfloat16, float16 and float64 are read"
            )
        self._taken.add(name)
        return tensor

    def drop(self, name: str) -> None:
        """Say that the tensor `name`, if there is one, is not needed."""
        self._taken.add(name)

    def untaken(self) -> list[str]:
        """Names that were neither taken nor dropped."""
        return sorted(self._file_of.keys() - self._taken)

    def _files(self) -> dict[Path, Iterable[str]]:
        """The files of weights, each with the names that it should hold as far as that is known."""
        index, single = self.folder / INDEX_FILE, self.folder / WEIGHTS_FILE
        if not index.is_file():
            if single.is_file():
                return {single: ()}
            others = sorted(file.name for file in self.folder.glob("*.bin"))
            hint = f"; {others[0]} is a pickle, which is not read: save it again as safetensors" if others else ""
            raise ValueError(f"{str(self.folder)!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{str(index)!r} has no weight_map from names to files")
        files: dict[Path, list[str]] = {}
        for name, file in places.items():
            if Path(file).name != file:
                raise ValueError(f"{str(index)!r}: the file of {name} must be one of its own folder, got {file!r}")
            files.setdefault(self.folder / file, []).append(name)
        for path, names in files.items():
            if not path.is_file():
                raise ValueError(f"the shard {str(path)!r} is missing: it holds {shown_names(names)}")
        return dict(files)

    def _names(self, file: Path) -> set[str]:
        """The tensors in a file. Opening it compares its length with what its header promises."""
        try:
            with self._safetensors.safe_open(str(file), framework="pt") as opened:
                return set(opened.keys())
        except self._safetensors.SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged or cut short: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{str(file.parent)!r} has no {file.name}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{str(file)!r} must hold a mapping, got {type(data).__name__}")
    return data
