"""The demo: what a mixture of memories is good for, measured on this machine, with whatever comes out."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from linear_moe.models.extras import require
from linear_moe.training.demo.parallel import num_cores
from linear_moe.training.demo.progress import StudyDisplay
from linear_moe.training.demo.recall_report import plot_study, study_remarks, study_table, write_csv
from linear_moe.training.demo.recall_study import run_study
from linear_moe.training.demo.sizes import demo_size
from linear_moe.training.demo.text_part import run_text

GPU_WORKERS = 6
"""Processes that share a GPU: small models leave most of it idle, waiting for launches."""


def run_demo(folder: Path, console: Console, *, size: str = "auto", workers: int | None = None) -> None:
    """Both halves of the demo; files go to `folder`.

    Args:
        folder: made if need be; the text part's run in it is replaced.
        console: where it is told.
        size: "auto" (by whether there is a GPU), "quick", "cpu" or "gpu".
        workers: processes of the study; one a core unless given.

    Raises:
        ValueError: naming the argument that does not fit.
        MissingExtraError: before anything is run, if a package is missing.
    """
    require("matplotlib.figure", extra="plot")
    require("safetensors.torch", extra="train")
    device = "cuda" if torch.cuda.is_available() and size in ("auto", "gpu") else "cpu"
    if size == "gpu" and device != "cuda":
        raise ValueError("size 'gpu' needs a CUDA device, and torch finds none")
    plan = demo_size(("gpu" if device == "cuda" else "cpu") if size == "auto" else size)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    workers = workers or (min(GPU_WORKERS, num_cores()) if device == "cuda" else num_cores())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    console.rule("1. recall: one memory, a widened one, a mixture")
    with StudyDisplay(console) as display:
        study = run_study(plan.study, workers=workers, device=device, on_steps=display.update)
    console.print(study_table(study))
    for remark in study_remarks(study, plan.study):
        console.print(remark, markup=False, soft_wrap=True)
    write_csv(study, folder / "recall.csv")
    plot_study(study, folder / "recall.png")
    console.print(f"{study.seconds:.0f} s on {workers} processes; {folder / 'recall.csv'}, {folder / 'recall.png'}")

    console.rule("2. real text: a hybrid of memories and attention")
    text_start = time.perf_counter()
    pictures = run_text(plan.text, folder, console, device=device)
    files = ", ".join(map(str, pictures))
    console.print(f"{time.perf_counter() - text_start:.0f} s; {files}", soft_wrap=True)
    console.print(f"the whole demo: {time.perf_counter() - start:.0f} s")
