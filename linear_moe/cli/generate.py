"""`linear-moe generate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linear_moe.cli.generate_batch import complete_prompts, read_prompts
from linear_moe.cli.loading import load_with_vocabulary
from linear_moe.cli.options import Device, Precision, Threads, choose_device, choose_dtype, set_threads
from linear_moe.cli.writer import Writer, converse
from linear_moe.models.sampling import Sampling


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    prompt: Annotated[
        str, typer.Option(help="Text to continue; for a model of tokens (recall), their numbers: '1 33 2 34'.")
    ] = "",
    context: Annotated[Path | None, typer.Option(help="A file that is read before the prompt, however long.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Continue each prompt of a file: one a line, or JSONL with `prompt`. Writes JSONL."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --prompts: where to; standard output unless given.")] = None,
    batch_size: Annotated[int, typer.Option(help="With --prompts: texts that are written at once.")] = 16,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Read prompts from the terminal, in turns of one text.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Tokens to add, of each text and turn.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws from the model's own odds.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest likeliest tokens of this probability together only.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    load_state: Annotated[
        Path | None, typer.Option(help="Go on from a state that --save-state wrote, without reading its text again.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="When done, write the state to this file: what the text is gone on from.")
    ] = None,
    precision: Precision = "float32",
    graph: Annotated[
        bool | None,
        typer.Option("--graph/--no-graph", help="Decode by a CUDA graph.  [default: on a GPU]", show_default=False),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Continue a prompt, a file of prompts, or a conversation with a trained model. Text appears as it is written.

    Prompts are text for a model that was trained with a tokeniser's file, or on bytes (a vocabulary of 257). Any other takes
    and prints token numbers.

    With --tokens 0, --context and --save-state a long text is read once; --load-state goes on from it at once, with the
    same bits, as often as you like: with --prompts each prompt follows it.

    Example: linear-moe generate runs/text-small-text --prompt "def main(" --tokens 100 --temperature 0.8
    """
    set_threads(threads)
    _refuse_together(prompt, context, prompts, output, interactive, load_state, save_state)
    for name, value, least in (("tokens", tokens, 0), ("batch-size", batch_size, 1)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    sampling, where = Sampling(temperature, top_k, top_p), choose_device(device)
    model, vocabulary = load_with_vocabulary(checkpoint, where, choose_dtype(precision))
    rows = None if prompts is None else read_prompts(prompts, vocabulary)
    writer = Writer(
        model,
        vocabulary,
        max_new_tokens=tokens,
        sampling=sampling,
        seed=seed,
        stop=stop or (),
        load_state=load_state,
        capture=graph,
    )
    if context is not None:
        writer.read_file(context)
    if rows is not None:
        complete_prompts(writer, rows, output, batch_size=batch_size)
    elif interactive:
        converse(writer)
    else:
        writer.read_text(prompt, shown=True)
        writer.write()
    if save_state is not None:
        writer.session.save(save_state)


def _refuse_together(
    prompt: str,
    context: Path | None,
    prompts: Path | None,
    output: Path | None,
    interactive: bool,
    load_state: Path | None,
    save_state: Path | None,
) -> None:
    if prompts is None and output is not None:
        raise ValueError("--output would be ignored: it is for the texts of --prompts")
    if prompts is not None and (prompt or interactive):
        raise ValueError(f"--prompts and {'--prompt' if prompt else '--interactive'} can't be given together")
    if prompts is not None and save_state is not None:
        raise ValueError("--save-state writes the state of one text: it can't be given with --prompts")
    if interactive and prompt:
        raise ValueError("--interactive reads its prompts from the terminal: --prompt can't be given with it")
    for name, file in (("context", context), ("prompts", prompts), ("load-state", load_state)):
        if file is not None and not file.is_file():
            raise ValueError(f"--{name}: there is no file {str(file)!r}")
    for name, file in (("output", output), ("save-state", save_state)):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {str(file.parent)!r}")
