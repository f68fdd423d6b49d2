"""`linear-moe train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linear_moe.cli.console import make_console
from linear_moe.cli.errors import INTERRUPTED, tell
from linear_moe.cli.explain import CONFIG_HELP
from linear_moe.cli.options import Device, Threads, choose_device, set_threads
from linear_moe.models.library import load_config
from linear_moe.training.distributed import joined_world
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.progress import make_display
from linear_moe.training.run import METRICS_FILE, Outcome, Run, resume_run, start_run
from linear_moe.training.settings import TrainSettings

_TASK, _SETTINGS, _PLAN = TaskOptions(), TrainSettings(), RunPlan()
_OF_STREAMS = ("dataset_config", "split", "held_out_documents")
_OF_TEXT = ("data", "pattern", "held_out", "text_key", "dataset", *_OF_STREAMS, "tokenizer", "document_start", "length")
_OF_TASKS = {"mqar": ("problem", "filler"), "text": _OF_TEXT}
_WITH_RESUME = frozenset({"resume", "steps", "device", "impl", "threads"})


def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(help=CONFIG_HELP)] = None,
    task: Annotated[str, typer.Option(help="mqar (recall of pairs) or text.")] = _TASK.task,
    output: Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/CONFIG-TASK]")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run of this folder, by its own settings; --steps may give it another length."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _SETTINGS.steps,
    batch_size: Annotated[
        int, typer.Option(help="Sequences of a batch; of text, a batch has this many times --length tokens.")
    ] = _TASK.batch_size,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches a step, of all processes together.  [default: one a process]")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The schedule's peak.")] = _SETTINGS.learning_rate,
    schedule: Annotated[
        str, typer.Option(help="cosine, wsd (stable, then down), one-cycle or constant.")
    ] = _SETTINGS.schedule,
    warmup: Annotated[
        float | None, typer.Option(help="Fraction of the steps before the peak.  [default: 0.05, one-cycle 0.3]")
    ] = _SETTINGS.warmup,
    decay: Annotated[float, typer.Option(help="wsd: fraction of the steps on the way down.")] = _SETTINGS.decay,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = _SETTINGS.weight_decay,
    gradient_clip: Annotated[
        float, typer.Option(help="Largest norm of all gradients together.")
    ] = _SETTINGS.gradient_clip,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = _SETTINGS.precision,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On a GPU, only algorithms that repeat their bits: slower.")
    ] = _SETTINGS.deterministic,
    capture: Annotated[
        bool, typer.Option(help="On one GPU, replay forward and backward from CUDA graphs: faster.")
    ] = _SETTINGS.capture,
    seed: Annotated[int, typer.Option(help="Of the parameters and of the data's order.")] = _SETTINGS.seed,
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help="mqar: LENGTH:PAIRS, may be given several times; or zoology, the published mix.  [default: 64:14]"
        ),
    ] = None,
    filler: Annotated[str, typer.Option(help="mqar: what stands between queries, zero or uniform.")] = _TASK.filler,
    data: Annotated[
        Path | None,
        typer.Option(
            help="text: a file or folder of text, JSON lines or Parquet.  [default: the Python standard library's sources]"
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="text: names of a folder's files, such as '*.txt'; may be given several times."),
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option(help="text: under which a row of JSON lines, Parquet or a dataset has it.  [default: text]"),
    ] = _TASK.text_key,
    dataset: Annotated[
        str | None, typer.Option(help="text: a dataset of the hub, or a folder, streamed by the `datasets` library.")
    ] = _TASK.dataset,
    dataset_config: Annotated[str | None, typer.Option(help="--dataset: its configuration.")] = _TASK.dataset_config,
    split: Annotated[str, typer.Option(help="--dataset: its split.")] = _TASK.split,
    held_out_documents: Annotated[
        int, typer.Option(help="--dataset: so many of its first documents are held out.")
    ] = _TASK.held_out_documents,
    tokenizer: Annotated[
        Path | None, typer.Option(help="text: a tokenizer.json.  [default: every byte is a token]")
    ] = None,
    document_start: Annotated[
        str | None,
        typer.Option(
            help="--tokenizer: the token that begins a document.  [default: its <|endoftext|>, <s> or the like]"
        ),
    ] = _TASK.document_start,
    length: Annotated[int, typer.Option(help="text: tokens of a segment, at most.")] = _TASK.context,
    held_out: Annotated[float, typer.Option(help="text: fraction of the documents held out.")] = _TASK.held_out,
    log_every: Annotated[int, typer.Option(help="Steps between two lines of metrics.")] = _PLAN.log_every,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between two checkpoints; 0: the last one only.")
    ] = _PLAN.checkpoint_every,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between two held-out scores; 0: the last one only.")
    ] = _PLAN.evaluate_every,
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log",
            # torchrun reads the whole line, and takes --log for a beginning of several of its own.
            "--log-to",
            help="tensorboard or trackio, beside metrics.jsonl; may be given several times. Under torchrun --log-to.",
        ),
    ] = None,
    impl: Annotated[
        str,
        typer.Option(help="How memory layers run: auto, triton, chunked or recurrent; --resume keeps to what it was."),
    ] = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train a declared model on recall or on text.

    The run's folder gets metrics.jsonl and checkpoints (model.safetensors, config.yaml, state.pt and
    their checksums). Ctrl-C ends the step, leaves a checkpoint and exits with 130; --resume goes on from there, or after a
    crash from the newest checkpoint that is undamaged, bit for bit.

    Under torchrun (torchrun --nproc-per-node 8 -m linear_moe train ...) the processes train one model on their shares of
    each step's batches, its parameters sharded (FSDP2). Checkpoints are the same for any number of them.

    Example: linear-moe train text-small --task text --data my_notes/ --steps 500 --output runs/notes
    """
    set_threads(threads)
    with joined_world(choose_device(device)) as (world, where):
        if resume is not None:
            _refuse_with_resume(context)
            new_length = steps if _given(context, "steps") else None
            new_impl = impl if _given(context, "impl") else None
            run = resume_run(resume, steps=new_length, device=where, impl=new_impl, world=world)
        else:
            if config is None:
                raise ValueError(
                    "train needs a CONFIG (a YAML file or a shipped model), or --resume with a run's folder"
                )
            _refuse_ignored(context, task, schedule, data, dataset, tokenizer)
            options = TaskOptions(
                task=task,
                problems=tuple(problem) if problem else _TASK.problems,
                filler=filler,
                data=None if data is None else str(data),
                patterns=tuple(pattern) if pattern else _TASK.patterns,
                held_out=held_out,
                text_key=text_key,
                dataset=dataset,
                dataset_config=dataset_config,
                split=split,
                held_out_documents=held_out_documents,
                tokenizer=None if tokenizer is None else str(tokenizer),
                document_start=document_start,
                context=length,
                batch_size=batch_size,
            )
            settings = TrainSettings(
                steps=steps,
                learning_rate=learning_rate,
                schedule=schedule,
                warmup=warmup,
                decay=decay,
                weight_decay=weight_decay,
                gradient_clip=gradient_clip,
                deterministic=deterministic,
                capture=capture,
                accumulate=world.size if accumulate is None else accumulate,
                seed=seed,
                precision=precision,
            )
            plan = RunPlan(options, settings, log_every, checkpoint_every, evaluate_every, tuple(log or ()))
            folder = output or Path("runs", f"{Path(config).stem}-{task}")
            run = start_run(load_config(config), plan, folder, device=where, impl=impl, world=world)
        # One speaks for all.
        _train(run, make_console() if world.is_main else Console(quiet=True))


def _train(run: Run, console: Console) -> None:
    console.print(run.describe(), markup=False, soft_wrap=True)
    console.print(run.task.describe(), markup=False, soft_wrap=True)
    for note in run.notes if run.world.is_main else ():
        tell(note, kind="note")
    display = make_display(console, steps=run.plan.settings.steps, start=run.step, details=run.details)
    outcome = run.train(display)
    if outcome.interrupted:
        console.print(f"interrupted after step {outcome.step}; checkpoint: {outcome.checkpoint}", soft_wrap=True)
        console.print(f"go on with: linear-moe train --resume {run.folder}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    _report(run, outcome, console)


def _report(run: Run, outcome: Outcome, console: Console) -> None:
    for name, value in outcome.scores.items():
        console.print(f"held-out {name.replace('_', ' ')}: {value:.4f}")
    if outcome.sample is not None:
        console.rule("sample")
        console.print(outcome.sample, markup=False, soft_wrap=True)
        console.rule()
    console.print(f"checkpoint: {outcome.checkpoint}; metrics: {run.folder / METRICS_FILE}", soft_wrap=True)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_with_resume(context: typer.Context) -> None:
    for name in context.params:
        if name not in _WITH_RESUME and _given(context, name):
            shown = "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{shown} can't be given with --resume: a run goes on by the settings it began with")


def _refuse_ignored(
    context: typer.Context,
    task: str,
    schedule: str,
    data: Path | None,
    dataset: str | None,
    tokenizer: Path | None,
) -> None:
    """Raises ValueError for an option that the run would ignore, by what makes it do so."""
    why: dict[str, str] = {}
    if data is None or data.is_file():
        why["pattern"] = "it chooses among the files of a folder, which --data names"
    if dataset is None:
        why |= dict.fromkeys(_OF_STREAMS, "it belongs to --dataset")
        if data is None:
            why["text_key"] = "it belongs to rows, of --data or --dataset"
    else:
        why["held_out"] = "a stream's first documents are held out"
    if tokenizer is None:
        why["document_start"] = "it names a token of --tokenizer"
    if schedule != "wsd":
        why["decay"] = f"it belongs to --schedule wsd, not {schedule}"
    if task in _OF_TASKS:
        for owner, names in _OF_TASKS.items():
            why |= dict.fromkeys(names if owner != task else (), f"it belongs to --task {owner}, not {task}")
    for name, reason in why.items():
        if _given(context, name):
            raise ValueError(f"--{name.replace('_', '-')} would be ignored: {reason}")
