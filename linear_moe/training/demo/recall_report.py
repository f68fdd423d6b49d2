"""The recall study as a table, as CSV and as a plot."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from linear_moe.models.extras import require
from linear_moe.training.demo.recall_study import DesignSummary, RecallResult, Study, StudySize, compared

COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3", "#937860")
STILL_RISING = 0.02
"""Accuracy that the last fifth of the steps, at a learning rate near 0, adds to a run that is called unfinished."""


def study_table(study: Study) -> Table:
    """One row a design."""
    table = Table(title="recall of held-out problems", title_justify="left")
    for column in ("design", "learning rate", "accuracy by seed", "mean ± sd", "parameters", "state a token uses (of)"):
        table.add_column(column, justify="left" if column == "design" else "right")
    for design in study.designs:
        first = design.results[0]
        table.add_row(
            design.design,
            f"{design.learning_rate:g}",
            "  ".join(_accuracy(result) for result in design.results),
            f"{design.mean:.3f} ± {design.deviation:.3f}",
            f"{first.parameters:,}",
            f"{first.active_state:,} ({first.total_state:,})",
        )
    return table


def study_remarks(study: Study, size: StudySize) -> Iterator[str]:
    """What the table does and does not say."""
    problem, chance = size.problem, 2 / size.problem.vocab_size
    yield (
        f"Scored: {problem.num_pairs} pairs in {problem.length} tokens, vocabulary {problem.vocab_size}; guessing gives "
        f"{chance:.3f}. Every run {size.settings.steps} steps of {size.batch_size} sequences."
    )
    if size.practice:
        easier = ", ".join(f"{practice.num_pairs} pairs in {practice.length}" for practice in size.practice)
        yield f"Trained on such problems and, each as often, on {easier}, so that every seed begins to learn early."
    rates = ", ".join(f"{rate:g}" for rate in size.learning_rates)
    yield f"Learning rates: of {rates}, the one that did best for the design on another seed."
    for design in study.designs:
        notes = [f"the last fifth of the steps added {design.late_gain:+.3f}"]
        if design.late_gain > STILL_RISING:
            notes.append("it is still learning")
        if design.mean < 3 * chance:
            notes.append("it has hardly learned anything yet")
        if len(size.learning_rates) > 1 and design.learning_rate in (
            min(size.learning_rates),
            max(size.learning_rates),
        ):
            notes.append("its learning rate is at the edge of those tried")
        if any(result.diverged for result in design.results):
            notes.append("a run diverged and counts as it ended")
        yield f"{design.design}: {'; '.join(notes)}."
    ranked = sorted(study.designs, key=lambda design: -design.mean)
    for better, worse in itertools.pairwise(ranked):
        yield compared(better, worse)


def write_csv(study: Study, path: Path) -> None:
    """A row a run, tuning runs included."""
    phases = [("tuning", study.tuning), *(("study", design.results) for design in study.designs)]
    rows = [{"phase": phase, **_row(result)} for phase, results in phases for result in results]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _row(result: RecallResult) -> dict[str, Any]:
    row = result._asdict() | {"accuracy": f"{result.accuracy:.4f}", "seconds": f"{result.seconds:.1f}"}
    curve = row.pop("curve")
    return row | {"steps": curve[-1][0], "curve": " ".join(f"{step}:{accuracy:.3f}" for step, accuracy in curve)}


def plot_study(study: Study, path: Path) -> None:
    """Accuracy over the steps, a line a seed; and at the end, a dot a seed and a bar for the mean.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = new_figure(1, 2, width=10, height=4)
    curves, ends = axes.flat
    for place, (design, colour) in enumerate(zip(study.designs, COLOURS, strict=False)):
        for result in design.results:
            steps, accuracies = zip(*result.curve, strict=True)
            label = design.design if result is design.results[0] else None
            curves.plot(steps, accuracies, color=colour, alpha=0.8, label=label)
        ends.bar(place, design.mean, color=colour, alpha=0.35)
        spots = [place + 0.12 * (i - (len(design.results) - 1) / 2) for i in range(len(design.results))]
        ends.plot(spots, design.accuracies, "o", color=colour)
    curves.set(xlabel="steps", ylabel="accuracy on held-out problems", ylim=(0, 1.02), title="training")
    curves.legend(loc="upper left")
    ends.set(ylim=(0, 1.02), title="after training: seeds and their mean")
    ends.set_xticks(range(len(study.designs)), [_label(design) for design in study.designs])
    figure.savefig(path, dpi=150)


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, for a file: no window and no global state of pyplot.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", extra="plot").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _accuracy(result: RecallResult) -> str:
    return f"{result.accuracy:.3f}{' (diverged)' if result.diverged else ''}"


def _label(design: DesignSummary) -> str:
    return f"{design.design}\n{design.mean:.3f} ± {design.deviation:.3f}"
