"""A run: a model trained by a plan into a folder, that can be stopped and gone on with.

RUN/metrics.jsonl   RUN/checkpoints/step-*/   RUN/sample.txt
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.training.checkpoint import (
    CHECKPOINTS,
    TrainerState,
    find_checkpoint,
    load_model,
    load_trainer_state,
    save_checkpoint,
)
from linear_moe.training.extras import require
from linear_moe.training.interrupt import InterruptGuard
from linear_moe.training.loop import StepReport, optimise
from linear_moe.training.metrics import MetricsFile, routing_summary
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.plan import RunPlan, build_task
from linear_moe.training.progress import Display, Speed
from linear_moe.training.tasks import Task

METRICS_FILE, SAMPLE_FILE = "metrics.jsonl", "sample.txt"


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    interrupted: bool
    checkpoint: Path
    scores: dict[str, float]
    """Of the held-out data; empty if the run was interrupted."""
    sample: str | None


@dataclass
class Run:
    """A run in memory: at `step`, ready to be trained."""

    folder: Path
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    task: Task
    plan: RunPlan
    step: int = 0
    _saved: tuple[int, Path] | None = field(default=None, repr=False)

    def train(self, display: Display) -> Outcome:
        """Train to the plan's last step, or until Ctrl-C; either way a checkpoint is left.

        Raises:
            DivergedError: if the loss stops being a number; the checkpoints so far stay.
        """
        plan, speed = self.plan, Speed()
        scores: dict[str, float] = {}
        with (
            MetricsFile(self.folder / METRICS_FILE, keep_to_step=self.step) as metrics,
            InterruptGuard() as interrupt,
        ):
            with display:
                for report in optimise(self.model, self.optimizer, self.task, plan.settings, start=self.step):
                    self.step = report.step
                    speed.add(report.tokens)
                    display.update(report)
                    if report.step % plan.log_every == 0 or report.step == plan.settings.steps:
                        self._log(metrics, report, speed.restart())
                    if interrupt.requested:
                        break
                    if plan.checkpoint_every and report.step % plan.checkpoint_every == 0:
                        self.save()
                    if plan.evaluate_every and report.step % plan.evaluate_every == 0:
                        scores = self.task.evaluate(self.model)
                        metrics.write(report.step, held_out=scores)
            checkpoint = self.save()
            if interrupt.requested and self.step < plan.settings.steps:
                return Outcome(self.step, True, checkpoint, {}, None)
            scores = self.task.evaluate(self.model)
            metrics.write(self.step, held_out=scores, final=True)
            sample = self.task.sample(self.model)
        if sample is not None:
            (self.folder / SAMPLE_FILE).write_text(sample + "\n", encoding="utf-8")
        return Outcome(self.step, False, checkpoint, scores, sample)

    def save(self) -> Path:
        """Write a checkpoint of the current step, unless that has been done."""
        if self._saved is None or self._saved[0] != self.step:
            state = TrainerState(self.step, self.optimizer.state_dict(), self.plan.as_dict())
            self._saved = self.step, save_checkpoint(self.folder, self.model, state)
        return self._saved[1]

    def _log(self, metrics: MetricsFile, report: StepReport, tokens_per_second: float) -> None:
        values = report._asdict() | {"tokens_per_second": round(tokens_per_second, 1)}
        routing = routing_summary(self.model)
        metrics.write(values.pop("step"), **values, **({"routing": routing} if routing else {}))


def start_run(
    config: ModelConfig, plan: RunPlan, folder: Path, *, device: torch.device | str = "cpu", impl: str = "auto"
) -> Run:
    """A new run in `folder`, which is made.

    Raises:
        ValueError: if the folder already holds a run, or the task can't be had.
        MissingExtraError: if checkpoints could not be written.
    """
    require("safetensors.torch", extra="train")
    if (folder / METRICS_FILE).exists() or (folder / CHECKPOINTS).exists():
        raise ValueError(
            f"{str(folder)!r} already holds a run; go on with it (--resume {folder}), or name another folder"
        )
    task = build_task(plan.task, config, plan.settings.seed)
    torch.manual_seed(plan.settings.seed)
    model = build_model(config, device=device, impl=impl)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, model, build_optimizer(model, plan.settings), task, plan)


def resume_run(
    folder: Path, *, steps: int | None = None, device: torch.device | str = "cpu", impl: str = "auto"
) -> Run:
    """The run of `folder` at its newest checkpoint, with its own plan; `steps` gives it another length.

    Raises:
        ValueError: if there is nothing to go on from, or nothing left to do.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint == folder:
        raise ValueError(
            f"{str(folder)!r} is a checkpoint; --resume takes the run's folder, {str(folder.parent.parent)!r}"
        )
    state = load_trainer_state(checkpoint)
    plan = RunPlan.from_dict(state.run)
    if steps is not None:
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, steps=steps))
    if state.step >= plan.settings.steps:
        raise ValueError(
            f"the run {str(folder)!r} has done {state.step} of {plan.settings.steps} steps: nothing is left; "
            f"a larger number of steps would go on"
        )
    model = load_model(checkpoint, device=device, impl=impl)
    optimizer = build_optimizer(model, plan.settings)
    optimizer.load_state_dict(state.optimizer)
    task = build_task(plan.task, model.config, plan.settings.seed)
    return Run(folder, model, optimizer, task, plan, state.step, (state.step, checkpoint))
