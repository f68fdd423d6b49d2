"""A run: a model trained by a plan into a folder, that can be stopped in any way and gone on with.

RUN/metrics.jsonl   RUN/checkpoints/step-*/   RUN/sample.txt
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linear_moe.data.tokenizer import load_tokenizer
from linear_moe.kernels.launch_tables import describe_tables
from linear_moe.models.extras import require
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.training.checkpoint import (
    CHECKPOINTS,
    TrainerState,
    checkpoint_folder,
    find_checkpoint,
    read_model,
    read_trainer_state,
    remove_leftovers,
    save_checkpoint,
    set_damaged_aside,
)
from linear_moe.training.distributed import ALONE, World, shard, whole_tensors
from linear_moe.training.divergence import DivergedError, save_batches
from linear_moe.training.files import full_disk_named
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
from linear_moe.whole_files import replace_text

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
    """A run in memory: at `step`, ready to be trained. Of several processes each has its own, and all do the same with it."""

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
    world: World = ALONE
    size: str = ""
    """How large the model is, in words: counted while it is in one piece."""
    _saved: tuple[int, Path] | None = field(default=None, repr=False)

    def describe(self) -> str:
        """The model and where it is trained, in a line."""
        device = str(self._device)
        where = device if self.world.size == 1 else f"{self.world.size} processes ({device} here)"
        return f"{self.model.config.name or 'model'}: {self.size}; {where}"

    def train(self, display: Display) -> Outcome:
        """Train to the plan's last step, or until Ctrl-C; either way a checkpoint is left.

        Raises:
            DivergedError: if the loss stops being a number; the checkpoints so far stay, and the step's batches are saved.
            DiskFullError: if there is no room for a checkpoint or the metrics; the checkpoints so far stay.
            ValueError: if another process is training this run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(repeatable(self.plan.settings.deterministic))
            # Of several processes one writes, and one is enough to be asked.
            metrics = self._open(stack) if self.world.is_main else _Metrics(None, [])
            interrupt = stack.enter_context(InterruptGuard())
            with display:
                interrupted = self._optimise(metrics, display, interrupt)
            checkpoint = self.save()
            if interrupted and self.step < self.plan.settings.steps:
                return Outcome(self.step, True, checkpoint, {}, None)
            return self._finish(metrics, checkpoint)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self) -> Path:
        """Write a checkpoint of the current step, unless that has been done. All processes must ask, one writes."""
        if self._saved is None or self._saved[0] != self.step:
            tensors = whole_tensors(self.model.state_dict(), self.world)
            optimizer = optimizer_state(self.model, self.optimizer, self.world)
            folder = checkpoint_folder(self.folder, self.step)
            if self.world.is_main:
                state = TrainerState(
                    step=self.step,
                    optimizer=optimizer,
                    run=self.plan.as_dict(),
                    data=self.task.state(),
                    random=random_state(self._device),
                    environment=_environment(self._device, self.impl, self.world),
                )
                save_checkpoint(self.folder, self.model, state, tensors=tensors, attachments=self.task.files())
            self.world.wait()
            self._saved = self.step, folder
        return self._saved[1]

    def _open(self, stack: contextlib.ExitStack) -> _Metrics:
        stack.enter_context(RunLock(self.folder))
        remove_leftovers(self.folder)
        if self._saved is not None:
            set_damaged_aside(self.folder, self._saved[1])
        file = stack.enter_context(MetricsFile(self.folder / METRICS_FILE, keep_to_step=self.step))
        config = self.plan.as_dict()
        logs = stack.enter_context(open_logs(self.plan.logs, self.folder, start=self.step, config=config))
        return _Metrics(file, logs)

    def _optimise(self, metrics: _Metrics, display: Display, interrupt: InterruptGuard) -> bool:
        """The steps that are left; whether they were interrupted."""
        plan, speed = self.plan, Speed()
        for report in self._steps():
            self.step = report.step
            speed.add(report.tokens)
            display.update(report)
            if report.step % plan.log_every == 0 or report.step == plan.settings.steps:
                self._log(metrics, report, speed.restart())
            # Before the checkpoint: a run that goes on from it has what comes before it behind it.
            if plan.evaluate_every and report.step % plan.evaluate_every == 0:
                with speed.paused():
                    scores, _ = self._evaluate()
                metrics.write(report.step, held_out=scores)
                display.evaluated(report.step, scores)
            # A signal reaches the processes at different steps.
            if self.world.total(int(interrupt.requested), self._device):
                return True
            if plan.checkpoint_every and report.step % plan.checkpoint_every == 0:
                with speed.paused():
                    self.save()
        return interrupt.requested

    def _steps(self) -> Iterator[StepReport]:
        settings = self.plan.settings
        try:
            yield from optimise(self.model, self.optimizer, self.task, settings, start=self.step, world=self.world)
        except DivergedError as error:
            file = save_batches(error, self.folder, self.world)
            error.args = (f"{error}. What the step was to learn from is in {file}",)
            raise

    def _evaluate(self, sample: bool = False) -> tuple[dict[str, float], str | None]:
        """The held-out scores, and if wanted a sample; on the main process, of a model in one piece."""
        if self.world.size == 1:
            return self.task.evaluate(self.model), self.task.sample(self.model) if sample else None
        tensors = whole_tensors(self.model.state_dict(), self.world)
        scores: dict[str, float] = {}
        words = None
        if self.world.is_main:
            device = self._device
            # Its first numbers are drawn and thrown away.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                replica = build_model(self.model.config, device=device, impl=self.impl)
            replica.load_state_dict(tensors)
            scores = self.task.evaluate(replica)
            words = self.task.sample(replica) if sample else None
        self.world.wait()
        return scores, words

    def _finish(self, metrics: _Metrics, checkpoint: Path) -> Outcome:
        scores, sample = self._evaluate(sample=True)
        if sample is not None:
            with full_disk_named(SAMPLE_FILE, self.folder, "The run itself is done and saved"):
                replace_text(self.folder / SAMPLE_FILE, sample + "\n")
        # Last: a run that has this line has everything.
        metrics.write(self.step, held_out=scores, final=True)
        return Outcome(self.step, False, checkpoint, scores, sample)

    def details(self, tokens_per_second: float) -> str:
        """What is worth showing beside the loss: utilisation, and the loads of the memories."""
        used = self._utilisation.of(tokens_per_second)
        parts = [f"MFU {used:.1%}" if used is not None else "", loads_in_words(self.model)]
        return "  ".join(filter(None, parts))

    @functools.cached_property
    def _utilisation(self) -> Utilisation:
        device = self._device
        return Utilisation(self.model.config, self.task.context, device, self.plan.settings.precision, self.world.size)

    def _log(self, metrics: _Metrics, report: StepReport, tokens_per_second: float) -> None:
        if metrics.file is None:
            return
        values = report._asdict() | {"tokens_per_second": round(tokens_per_second, 1)}
        used = self._utilisation.of(tokens_per_second)
        if used is not None:
            values["mfu"] = round(used, 4)
        routing = routing_summary(self.model)
        metrics.write(values.pop("step"), **values, **({"routing": routing} if routing else {}))


class _Metrics(NamedTuple):
    """The metrics' file, and the logs that get the same numbers."""

    file: MetricsFile | None
    """None in a process that leaves them to another."""
    logs: list[Log]

    def write(self, step: int, **values: Any) -> None:
        """One line, and what is a number of it."""
        if self.file is not None:
            self.file.write(step, **values)
        numbers = scalars(values)
        for log in self.logs:
            log.write(step, numbers)


def start_run(
    config: ModelConfig,
    plan: RunPlan,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    world: World = ALONE,
) -> Run:
    """A new run in `folder`, which is made.

    Args:
        config: of the model.
        plan: of the run.
        folder: that it leaves everything in.
        device: to train on.
        impl: how the memory layers run.
        world: the processes that train it together: each must call this.

    Raises:
        ValueError: if the folder already holds a run, or the task can't be had, or its batches can't be shared.
        MissingExtraError: if checkpoints or logs could not be written.
    """
    require("safetensors.torch", extra="train")
    require_logs(plan.logs)
    world.check_accumulate(plan.settings.accumulate)
    if (folder / METRICS_FILE).exists() or (folder / CHECKPOINTS).exists():
        raise ValueError(
            f"{str(folder)!r} already holds a run; go on with it (--resume {folder}), or name another folder"
        )
    task = build_task(plan.task, config, plan.settings.seed)
    seed_all(plan.settings.seed)
    model = build_model(config, device=device, impl=impl)
    size = _size(model)
    shard(model, world)
    folder.mkdir(parents=True, exist_ok=True)
    # Nobody writes before everybody has looked.
    world.wait()
    return Run(folder, model, build_optimizer(model, plan.settings), task, plan, impl=impl, world=world, size=size)


def resume_run(
    folder: Path,
    *,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    impl: str | None = None,
    world: World = ALONE,
) -> Run:
    """The run of `folder` at its newest good checkpoint, with its own plan.

    It goes on bit for bit: parameters, optimiser, routing biases, the place in the data, the schedule and every source of
    random numbers are as they were; on a CPU, and with the same versions, threads and processes, so are the losses.

    Args:
        folder: the run's.
        steps: another length.
        device: to train on.
        impl: how the memory layers run; as before unless given.
        world: the processes that train it together, as many as before or not: each must call this.

    Raises:
        ValueError: if there is nothing to go on from, or nothing left to do, or its batches can't be shared.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint == folder:
        raise ValueError(
            f"{str(folder)!r} is a checkpoint; --resume takes the run's folder, {str(folder.parent.parent)!r}"
        )
    state = read_trainer_state(checkpoint)
    plan = RunPlan.from_dict(state.run)
    world.check_accumulate(plan.settings.accumulate)
    if steps is not None:
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, steps=steps))
    if state.step > plan.settings.steps or (state.step == plan.settings.steps and _finished(folder, state.step)):
        raise ValueError(
            f"the run {str(folder)!r} has done {state.step} of {plan.settings.steps} steps: nothing is left; "
            f"a larger number of steps would go on"
        )
    impl = impl or state.environment.get("impl", "auto")
    model = read_model(checkpoint, device=device, impl=impl)
    size = _size(model)
    shard(model, world)
    optimizer = build_optimizer(model, plan.settings)
    load_optimizer_state(model, optimizer, state.optimizer)
    # The checkpoint's own tokeniser: the file that the run began with may be another by now, or gone.
    task = build_task(plan.task, model.config, plan.settings.seed, load_tokenizer(checkpoint))
    changed = task.load_state(state.data)
    where = next(model.parameters()).device
    if state.random:
        restore_random_state(state.random, where)
    notes = (*filter(None, [changed]), *_changes(state.environment, _environment(where, impl, world)))
    # Nobody moves a damaged checkpoint before everybody has read.
    world.wait()
    return Run(folder, model, optimizer, task, plan, state.step, impl, notes, world, size, (state.step, checkpoint))


def _size(model: LanguageModel) -> str:
    return f"{model.num_parameters():,} parameters, {model.num_active_parameters():,} active"


def _finished(folder: Path, step: int) -> bool:
    """Whether the run's last line, which comes after everything else, was written."""
    path = folder / METRICS_FILE
    return path.exists() and any(line.get("final") and line["step"] == step for line in read_metrics(path))


def _environment(device: torch.device, impl: str, world: World) -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "impl": impl,
        "launch tables": describe_tables(device),
        "processes": world.size,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    return (f"the last bits of the numbers may differ from here on: {'; '.join(changed)}",) if changed else ()
