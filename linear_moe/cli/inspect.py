"""`linear-moe inspect`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from linear_moe.cli.loading import load_with_vocabulary
from linear_moe.cli.options import Device, Threads, choose_device, set_threads
from linear_moe.evaluation.inspection import inspect_text
from linear_moe.evaluation.page import page_of


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    text: Annotated[
        Path, typer.Option(help="A file: any bytes for a model of bytes, token numbers for one of tokens (recall).")
    ],
    output: Annotated[Path, typer.Option(help="The page, an HTML file.")] = Path("memories.html"),
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are shown, at most.")] = 4000,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Write a page that shows which memories each token of a text used, layer by layer.

    One file without scripts, that any browser shows offline: the text coloured by the memories of a layer that you choose,
    the loads of all layers, and the tokens that each memory holds.

    Example: linear-moe inspect runs/text-small-text --text notes.txt --output memories.html
    """
    set_threads(threads)
    if tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {tokens}")
    if not text.is_file():
        raise ValueError(f"--text: there is no file {str(text)!r}")
    if not output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {str(output.parent)!r}")
    model, vocabulary = load_with_vocabulary(checkpoint, choose_device(device))
    content = vocabulary.read(text)
    if not content:
        raise ValueError(f"the text file {str(text)!r} is empty")
    shown = [*vocabulary.start, *content][:tokens]
    cut = len(vocabulary.start) + len(content) - len(shown)
    remark = f"The text goes on for {cut:,} more, which are not shown." if cut else ""
    page = page_of(inspect_text(model, shown), vocabulary, remark=remark)
    aside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(page, encoding="utf-8")
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    if not model.memory_layers():
        typer.echo("this model has no mixture of memories: the page shows the text without colours", err=True)
    typer.echo(f"{output}: {len(shown):,} tokens")
