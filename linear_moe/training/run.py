"""A run: a model trained by a plan into a folder, that can be stopped in any way and gone on with.

RUN/metrics.jsonl   RUN/checkpoints/step-*/   RUN/sample.txt
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linear_moe.data.tokenizer import load_tokenizer
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.training.checkpoint import (
    CHECKPOINTS,
    TrainerState,
    find_checkpoint,
    read_model,
    read_trainer_state,
    remove_leftovers,
    save_checkpoint,
    set_damaged_aside,
)
from linear_moe.training.divergence import DivergedError, save_batches
from linear_moe.training.extras import require
from linear_moe.training.files import full_disk_named, replace_text
from linear_moe.training.interrupt import InterruptGuard
from linear_moe.training.logs import Log, open_logs, require_logs, scalars
from linear_moe.training.loop import StepReport, optimise
from linear_moe.training.metrics import MetricsFile, loads_in_words, read_metrics, routing_summary
from linear_moe.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
from linear_moe.training.plan import RunPlan, build_task
from linear_moe.training.progress import Display
from linear_moe.training.randomness import random_state, repeatable, restore_random_state, seed_all
from linear_moe.training.run_lock import RunLock
from linear_moe.training.tasks import Task
from linear_moe.training.throughput import Speed, Utilisation

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
    impl: str = "auto"
    """How the memory layers run: kept for whoever goes on with the run."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was gone on with."""
    _saved: tuple[int, Path] | None = field(default=None, repr=False)

    def train(self, display: Display) -> Outcome:
        """Train to the plan's last step, or until Ctrl-C; either way a checkpoint is left.

        Raises:
            DivergedError: if the loss stops being a number; the checkpoints so far stay, and the step's batches are saved.
            DiskFullError: if there is no room for a checkpoint or the metrics; the checkpoints so far stay.
            ValueError: if another process is training this run.
        """
        plan, speed = self.plan, Speed()
        with RunLock(self.folder), repeatable(plan.settings.deterministic):
            remove_leftovers(self.folder)
            if self._saved is not None:
                set_damaged_aside(self.folder, self._saved[1])
            with (
                MetricsFile(self.folder / METRICS_FILE, keep_to_step=self.step) as file,
                open_logs(plan.logs, self.folder, start=self.step, config=plan.as_dict()) as logs,
                InterruptGuard() as interrupt,
            ):
                metrics = _Metrics(file, logs)
                with display:
                    for report in self._steps():
                        self.step = report.step
                        speed.add(report.tokens)
                        display.update(report)
                        if report.step % plan.log_every == 0 or report.step == plan.settings.steps:
                            self._log(metrics, report, speed.restart())
                        # Before the checkpoint: a run that goes on from it has what comes before it behind it.
                        if plan.evaluate_every and report.step % plan.evaluate_every == 0:
                            scores = self.task.evaluate(self.model)
                            metrics.write(report.step, held_out=scores)
                            display.evaluated(report.step, scores)
                        if interrupt.requested:
                            break
                        if plan.checkpoint_every and report.step % plan.checkpoint_every == 0:
                            self.save()
                checkpoint = self.save()
                if interrupt.requested and self.step < plan.settings.steps:
                    return Outcome(self.step, True, checkpoint, {}, None)
                return self._finish(metrics, checkpoint)

    def save(self) -> Path:
        """Write a checkpoint of the current step, unless that has been done."""
        if self._saved is None or self._saved[0] != self.step:
            device = next(self.model.parameters()).device
            state = TrainerState(
                step=self.step,
                optimizer=optimizer_state(self.model, self.optimizer),
                run=self.plan.as_dict(),
                data=self.task.state(),
                random=random_state(device),
                environment=_environment(device, self.impl),
            )
            folder = save_checkpoint(self.folder, self.model, state, attachments=self.task.files())
            self._saved = self.step, folder
        return self._saved[1]

    def _steps(self) -> Any:
        try:
            yield from optimise(self.model, self.optimizer, self.task, self.plan.settings, start=self.step)
        except DivergedError as error:
            file = save_batches(error, self.folder)
            error.args = (f"{error}. What the step was to learn from is in {file}",)
            raise

    def details(self, tokens_per_second: float) -> str:
        """What is worth showing beside the loss: utilisation, and the loads of the memories."""
        used = self._utilisation.of(tokens_per_second)
        parts = [f"MFU {used:.1%}" if used is not None else "", loads_in_words(self.model)]
        return "  ".join(filter(None, parts))

    @functools.cached_property
    def _utilisation(self) -> Utilisation:
        device = next(self.model.parameters()).device
        return Utilisation(self.model.config, self.task.context, device, self.plan.settings.precision)

    def _finish(self, metrics: _Metrics, checkpoint: Path) -> Outcome:
        scores = self.task.evaluate(self.model)
        sample = self.task.sample(self.model)
        if sample is not None:
            with full_disk_named(SAMPLE_FILE, self.folder, "The run itself is done and saved"):
                replace_text(self.folder / SAMPLE_FILE, sample + "\n")
        # Last: a run that has this line has everything.
        metrics.write(self.step, held_out=scores, final=True)
        return Outcome(self.step, False, checkpoint, scores, sample)

    def _log(self, metrics: _Metrics, report: StepReport, tokens_per_second: float) -> None:
        values = report._asdict() | {"tokens_per_second": round(tokens_per_second, 1)}
        used = self._utilisation.of(tokens_per_second)
        if used is not None:
            values["mfu"] = round(used, 4)
        routing = routing_summary(self.model)
        metrics.write(values.pop("step"), **values, **({"routing": routing} if routing else {}))


class _Metrics(NamedTuple):
    """The metrics' file, and the logs that get the same numbers."""

    file: MetricsFile
    logs: list[Log]

    def write(self, step: int, **values: Any) -> None:
        """One line, and what is a number of it."""
        self.file.write(step, **values)
        numbers = scalars(values)
        for log in self.logs:
            log.write(step, numbers)


def start_run(
    config: ModelConfig, plan: RunPlan, folder: Path, *, device: torch.device | str = "cpu", impl: str = "auto"
) -> Run:
    """A new run in `folder`, which is made.

    Raises:
        ValueError: if the folder already holds a run, or the task can't be had.
        MissingExtraError: if checkpoints could not be written.
    """
    require("safetensors.torch", extra="train")
    require_logs(plan.logs)
    if (folder / METRICS_FILE).exists() or (folder / CHECKPOINTS).exists():
        raise ValueError(
            f"{str(folder)!r} already holds a run; go on with it (--resume {folder}), or name another folder"
        )
    task = build_task(plan.task, config, plan.settings.seed)
    seed_all(plan.settings.seed)
    model = build_model(config, device=device, impl=impl)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, model, build_optimizer(model, plan.settings), task, plan, impl=impl)


def resume_run(
    folder: Path, *, steps: int | None = None, device: torch.device | str = "cpu", impl: str | None = None
) -> Run:
    """The run of `folder` at its newest good checkpoint, with its own plan.

    It goes on bit for bit: parameters, optimiser, routing biases, the place in the data, the schedule and every source of
    random numbers are as they were; on a CPU, and with the same versions and threads, so are the losses.

    Args:
        folder: the run's.
        steps: another length.
        device: to train on.
        impl: how the memory layers run; as before unless given.

    Raises:
        ValueError: if there is nothing to go on from, or nothing left to do.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint == folder:
        raise ValueError(
            f"{str(folder)!r} is a checkpoint; --resume takes the run's folder, {str(folder.parent.parent)!r}"
        )
    state = read_trainer_state(checkpoint)
    plan = RunPlan.from_dict(state.run)
    if steps is not None:
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, steps=steps))
    if state.step > plan.settings.steps or (state.step == plan.settings.steps and _finished(folder, state.step)):
        raise ValueError(
            f"the run {str(folder)!r} has done {state.step} of {plan.settings.steps} steps: nothing is left; "
            f"a larger number of steps would go on"
        )
    impl = impl or state.environment["impl"]
    model = read_model(checkpoint, device=device, impl=impl)
    optimizer = build_optimizer(model, plan.settings)
    load_optimizer_state(model, optimizer, state.optimizer)
    # The checkpoint's own tokeniser: the file that the run began with may be another by now, or gone.
    task = build_task(plan.task, model.config, plan.settings.seed, load_tokenizer(checkpoint))
    changed = task.load_state(state.data)
    where = next(model.parameters()).device
    restore_random_state(state.random, where)
    notes = (*filter(None, [changed]), *_changes(state.environment, _environment(where, impl)))
    return Run(folder, model, optimizer, task, plan, state.step, impl, notes, (state.step, checkpoint))


def _finished(folder: Path, step: int) -> bool:
    """Whether the run's last line, which comes after everything else, was written."""
    path = folder / METRICS_FILE
    return path.exists() and any(line.get("final") and line["step"] == step for line in read_metrics(path))


def _environment(device: torch.device, impl: str) -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "impl": impl,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    return (f"the last bits of the numbers may differ from here on: {'; '.join(changed)}",) if changed else ()
