"""The demo's second half: a small hybrid learns real text, and shows what it does with its memories."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from linear_moe.models.library import load_config
from linear_moe.training.demo.memory_picture import coloured, picks_of, plain, plot_picks
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.progress import make_display
from linear_moe.training.run import Run, start_run
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import TextTask

EXCERPT_BYTES = 480
CONFIG = "text-hybrid"


class TextSize(NamedTuple):
    """How large the text part is."""

    steps: int
    batch_size: int
    context: int
    accumulate: int = 1
    learning_rate: float = 3e-3
    held_out_bytes: int = 100_000
    excerpt_bytes: int = EXCERPT_BYTES


def run_text(size: TextSize, folder: Path, console: Console, *, device: str) -> list[Path]:
    """Train on the standard library's sources; print score, sample and picture.

    Returns:
        The files that were written. The run itself is in `folder / "text"`; an earlier one there is replaced.
    """
    home = folder / "text"
    shutil.rmtree(home, ignore_errors=True)
    settings = TrainSettings(steps=size.steps, learning_rate=size.learning_rate, accumulate=size.accumulate)
    options = TaskOptions(
        task="text", context=size.context, batch_size=size.batch_size, held_out_bytes=size.held_out_bytes
    )
    run = start_run(load_config(CONFIG), RunPlan(options, settings), home, device=device)
    console.print(f"{CONFIG}: {run.model.num_parameters():,} parameters; {run.task.describe()}", soft_wrap=True)
    outcome = run.train(make_display(console, steps=size.steps))
    if outcome.interrupted:
        raise KeyboardInterrupt
    scores = outcome.scores
    console.print(
        f"held-out text: {scores['bits_per_byte']:.3f} bits a byte; byte frequencies alone give "
        f"{scores['unigram_bits_per_byte']:.3f}, knowing nothing 8"
    )
    console.rule("what it writes from a document's start")
    console.print(outcome.sample, markup=False, soft_wrap=True)
    return [home, *_picture(run, size, folder, console)]


def _picture(run: Run, size: TextSize, folder: Path, console: Console) -> list[Path]:
    assert isinstance(run.task, TextTask)
    text = _typical(run.task.corpus.held_out, size.excerpt_bytes)
    layers = picks_of(run.model, text)
    files = [folder / "memories.txt", folder / "memories.png"]
    files[0].write_text("\n\n".join(plain(text, picks) for picks in layers) + "\n", encoding="utf-8")
    plot_picks(text, layers, files[1])
    console.rule("which memory each byte of a held-out document went to first (the shared memory gets every byte)")
    for picks in layers:
        console.print(
            coloured(text, picks) if console.is_terminal else plain(text, picks), markup=False, soft_wrap=True
        )
    return files


def _typical(documents: Sequence[bytes], length: int) -> bytes:
    """The beginning of the document of median length among those that are long enough; of the longest if none is."""
    ranked = sorted(documents, key=len)
    enough = [document for document in ranked if len(document) >= length] or ranked[-1:]
    return enough[len(enough) // 2][:length]
