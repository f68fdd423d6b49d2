"""`linear-moe generate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from linear_moe.cli.options import Device, Threads, choose_device, set_threads
from linear_moe.data.text import VOCAB_SIZE, printable
from linear_moe.training.checkpoint import load_model
from linear_moe.training.tasks import sample_text


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    prompt: Annotated[
        str, typer.Option(help="Text to continue; for a model of tokens (recall), their numbers: '1 33 2 34'.")
    ] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws from the model's own odds.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Continue a prompt with a trained model.

    A model with a vocabulary of 257 is one of bytes: the prompt is text. Any other takes and prints token numbers.

    Example: linear-moe generate runs/text-small-text --prompt "def main(" --tokens 100 --temperature 0.8
    """
    set_threads(threads)
    model = load_model(checkpoint, device=choose_device(device))
    if model.config.vocab_size == VOCAB_SIZE:
        text = sample_text(model, prompt.encode("utf-8"), max_new_tokens=tokens, temperature=temperature, seed=seed)
        typer.echo(printable(text))
        return
    numbers = torch.tensor([parse_tokens(prompt)], device=next(model.parameters()).device)
    written = model.generate(numbers, max_new_tokens=tokens, temperature=temperature, seed=seed)
    typer.echo(" ".join(map(str, written[0].tolist())))


def parse_tokens(prompt: str) -> list[int]:
    """Numbers of tokens, separated by blanks or commas.

    Raises:
        ValueError: naming the first that is none, or if there is none.
    """
    words = prompt.replace(",", " ").split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(
                f"this model reads token numbers, such as --prompt '1 33 2 34'; {word!r} in the prompt is none"
            )
    if not words:
        raise ValueError("this model reads token numbers and needs at least one, such as --prompt '1 33 2 34'")
    return [int(word) for word in words]
