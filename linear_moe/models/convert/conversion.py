"""From a checkpoint in the format of flash-linear-attention to one of ours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.models.convert.backbone import read_config, read_options, read_tensors
from linear_moe.models.convert.families import find_family
from linear_moe.models.convert.source import FLOATS, SourceFolder
from linear_moe.models.model import build_model
from linear_moe.models.model_folder import check_new_folder, shown_names, write_model_folder
from linear_moe.models.schema import ModelConfig


class Conversion(NamedTuple):
    """A checkpoint in our terms."""

    model_type: str
    """Of the checkpoint."""
    config: ModelConfig
    tensors: dict[str, Tensor]
    """The state of the model that `config` declares, in the checkpoint's dtype; a rule's gate parameters float32."""
    narrowed: list[str]
    """Names of tensors that were stored in a dtype that the one they have now does not hold."""


def read_checkpoint(
    source: Path | str, *, dtype: torch.dtype | None = None, ignore: Collection[str] = ()
) -> Conversion:
    """Read a checkpoint folder of MoM, Gated DeltaNet, GLA, RetNet, Mamba2 or a Transformer.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or shards and their index.
        dtype: of the parameters; that of the stored embeddings unless given.
        ignore: unknown keys of `config.json` that change nothing of what the model computes.

    Raises:
        ValueError: naming the file, the option or the tensor that can't be read or represented.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    folder = SourceFolder(Path(source))
    family = find_family(folder.config, folder.config_path)
    options = read_options(family, folder)
    config = read_config(family, options, folder.folder.absolute().name)
    options.finish(ignore)
    came = read_tensors(family, options, folder, build_model(config, device="meta"))
    if left := folder.untaken():
        raise ValueError(
            f"{str(folder.folder)!r} holds {shown_names(left)}, which a {family.model_type} of its config.json does not have"
        )
    model = build_model(config, device="meta", dtype=dtype or came["embedding.weight"].dtype)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    narrowed = [
        name for name, tensor in came.items() if torch.promote_types(tensor.dtype, wanted[name]) != wanted[name]
    ]
    tensors = {name: tensor.to(wanted[name]) for name, tensor in came.items()}
    return Conversion(family.model_type, config, tensors, narrowed)


def convert_checkpoint(
    source: Path | str, target: Path | str, *, dtype: torch.dtype | None = None, ignore: Collection[str] = ()
) -> Conversion:
    """Read a checkpoint and write it as a folder of ours, whole or not at all.

    Args:
        source: as in `read_checkpoint`.
        target: where it goes; must not be there yet, or be empty.
        dtype: as in `read_checkpoint`.
        ignore: as in `read_checkpoint`.

    Raises:
        ValueError: naming what can't be read, represented or overwritten.
        OSError: if it can't be written.
    """
    check_new_folder(Path(target))
    conversion = read_checkpoint(source, dtype=dtype, ignore=ignore)
    write_model_folder(Path(target), conversion.config, conversion.tensors)
    return conversion
