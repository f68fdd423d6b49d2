"""`linear-moe eval`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from linear_moe.cli.console import make_console, make_progress
from linear_moe.cli.loading import load_with_vocabulary
from linear_moe.cli.options import Device, Precision, Threads, choose_device, choose_dtype, set_threads
from linear_moe.data.vocabulary import Vocabulary, vocabulary_of
from linear_moe.evaluation.plots import plot_result
from linear_moe.evaluation.result import Result
from linear_moe.evaluation.segments import Sizes
from linear_moe.evaluation.suites import SUITES, EvaluationOptions, check_suites, run_suite, suites_of
from linear_moe.models.extras import MissingExtraError
from linear_moe.models.library import load_config, shipped_configs
from linear_moe.models.model import LanguageModel, build_model

_DEFAULTS = EvaluationOptions()
_LENGTHS = ",".join(map(str, _DEFAULTS.lengths))
_DEPTHS = ",".join(f"{depth:g}" for depth in _DEFAULTS.depths)
_OWNERS = {
    "data": ("perplexity", "needle"),
    "trained_length": ("perplexity",),
    "problem": ("mqar",),
    "depths": ("needle",),
    "tokens": ("decode-speed",),
    "batch_size": ("decode-speed",),
    "twin": ("decode-speed",),
    "graph": ("decode-speed",),
    "lengths": ("perplexity", "needle", "decode-speed"),
    "samples": ("perplexity", "mqar", "needle"),
}
"""Options that are for some suites only."""


def eval_(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, or one of its checkpoints; for decode-speed alone also a YAML file or a shipped model, with "
            "random weights."
        ),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SUITES)}; may be given several times.  [default: all that fit the model]"),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens, with commas: of needle and decode-speed. Perplexity goes up to the largest.")
    ] = _LENGTHS,
    samples: Annotated[
        int | None,
        typer.Option(help="Pieces of text, problems a kind, or texts a length and depth.  [default: 8, 256, 8]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text, a file or folder, all of it.  [default: what training holds out of Python's sources]"),
    ] = None,
    trained_length: Annotated[
        int | None, typer.Option(help="perplexity: what the model was trained on, to mark what lies beyond.")
    ] = None,
    problem: Annotated[
        list[str] | None,
        typer.Option(help="mqar: LENGTH:PAIRS, may be given several times.  [default: the published ones that fit]"),
    ] = None,
    depths: Annotated[str, typer.Option(help="needle: where it stands, from 0 to 1, with commas.")] = _DEPTHS,
    tokens: Annotated[int, typer.Option(help="decode-speed: tokens timed at each length.")] = _DEFAULTS.num_tokens,
    batch_size: Annotated[int, typer.Option(help="decode-speed: sequences decoded at once.")] = _DEFAULTS.batch_size,
    twin: Annotated[
        bool, typer.Option("--twin", help="decode-speed: beside it a softmax-attention model of the same size.")
    ] = False,
    graph: Annotated[
        bool | None,
        typer.Option("--graph/--no-graph", help="decode-speed: CUDA graphs.  [default: on a GPU]", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for CSV, JSON and plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    segment: Annotated[int, typer.Option(help="Tokens read in one pass.")] = _DEFAULTS.sizes.segment,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a batch, about: fewer take less memory.")
    ] = _DEFAULTS.sizes.batch_tokens,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    precision: Precision = "float32",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure a trained model: perplexity by position, recall, a needle in a haystack, the speed of decoding.

    Long texts are read in segments, so that memory does not grow with them.

    Example: linear-moe eval runs/text-small-text --suite perplexity --lengths 2048 --output evaluation
    """
    set_threads(threads)
    options = EvaluationOptions(
        lengths=tuple(_numbers("lengths", lengths, int)),
        samples=samples,
        data=data,
        trained_length=trained_length,
        problems=tuple(problem or ()),
        depths=tuple(_numbers("depths", depths, float)),
        num_tokens=tokens,
        batch_size=batch_size,
        twin=twin,
        capture=graph,
        seed=seed,
        sizes=Sizes(segment, batch_tokens),
    )
    where = choose_device(device)
    dtype = choose_dtype(precision)
    model, vocabulary = _load(checkpoint, tuple(suite or ()), where, dtype)
    names = tuple(dict.fromkeys(suite or suites_of(vocabulary)))
    check_suites(names, vocabulary)
    _refuse_ignored(context, names)
    console, results = make_console(), []
    for name in names:
        result = _run(name, model, vocabulary, options)
        results.append(result)
        if not as_json:
            _show(result, console)
        if output is not None:
            _write(result, output)
    if as_json:
        typer.echo(json.dumps([result.as_dict() for result in results], indent=2))


def _load(
    checkpoint: Path, suites: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, Vocabulary]:
    """The model of a checkpoint; or one that nothing was learned by, where only its speed is asked for."""
    is_config = checkpoint.is_file() or (not checkpoint.exists() and str(checkpoint) in shipped_configs())
    if not is_config:
        return load_with_vocabulary(checkpoint, device, dtype)
    if set(suites) != {"decode-speed"}:
        raise ValueError(
            f"{str(checkpoint)!r} is a configuration, without weights: only --suite decode-speed says something of it"
        )
    model = build_model(load_config(checkpoint), device=device, dtype=dtype).eval()
    return model, vocabulary_of(model.config.vocab_size)


def _run(name: str, model: LanguageModel, vocabulary: Vocabulary, options: EvaluationOptions) -> Result:
    with make_progress() as bar:
        task = bar.add_task(name, total=None)
        return run_suite(
            name, model, vocabulary, options, lambda done, total: bar.update(task, completed=done, total=total)
        )


def _show(result: Result, console: Console) -> None:
    console.print(result.table())
    for remark in result.remarks:
        console.print(remark, markup=False, soft_wrap=True)


def _write(result: Result, folder: Path) -> None:
    result.write(folder)
    try:
        plot_result(result, folder / f"{result.name}.png")
    except MissingExtraError as error:
        # The numbers are there; the picture is an extra.
        typer.echo(f"no plot of {result.name}: {error}", err=True)


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{name} must be numbers with commas between them, got {text!r}") from None


def _refuse_ignored(context: typer.Context, names: tuple[str, ...]) -> None:
    """Raises ValueError for an option that none of the suites would heed."""
    for name, owners in _OWNERS.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and not set(owners) & set(names):
            raise ValueError(
                f"--{name.replace('_', '-')} would be ignored: it belongs to {', '.join(owners)}, not {', '.join(names)}"
            )
