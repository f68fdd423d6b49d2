"""`linear-moe convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from linear_moe.cli.console import make_console
from linear_moe.models.convert import convert_checkpoint
from linear_moe.models.model import build_model
from linear_moe.models.model_folder import shown_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A Hugging Face folder: config.json and safetensors files.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Where the model goes; must not be there yet, or be empty.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the parameters: {', '.join(DTYPES)}.  [default: as stored]")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="An unknown key of config.json that changes nothing of what the model computes; may be given "
            "several times."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint in the format of flash-linear-attention to a model of ours.

    Reads MoM and Gated DeltaNet, GLA, RetNet, Mamba2 and Transformer; writes model.safetensors and config.yaml. What can't
    be represented exactly is an error that names the option.

    Example: linear-moe convert MoM-Gated-Deltanet-1.3B models/mom-1.3b
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    conversion = convert_checkpoint(source, target, dtype=None if dtype is None else DTYPES[dtype], ignore=ignore or ())
    console = make_console()
    model = build_model(conversion.config, device="meta")
    stored = str(conversion.tensors["embedding.weight"].dtype).removeprefix("torch.")
    console.print(
        f"{conversion.model_type}: {model.num_parameters():,} parameters, {model.num_active_parameters():,} active a token, "
        f"in {stored}; layers {conversion.config.layers}",
        markup=False,
        soft_wrap=True,
    )
    if conversion.narrowed:
        console.print(f"rounded to {stored}: {shown_names(conversion.narrowed)}", markup=False, soft_wrap=True)
    console.print(f"model: {target}", markup=False, soft_wrap=True)
