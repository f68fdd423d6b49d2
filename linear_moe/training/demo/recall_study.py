"""The recall study: one memory, one widened memory and a mixture of memories, trained alike.

Every design gets the same task, tokens, seeds and steps, and its own learning rate: the best of a few on a seed that is not
used again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from linear_moe.data.mqar import MQAR
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.recurrent_mixer import RecurrentMixer
from linear_moe.models.model import LanguageModel, build_model
from linear_moe.models.schema import ModelConfig
from linear_moe.training.demo.parallel import Report, run_jobs
from linear_moe.training.divergence import DivergedError
from linear_moe.training.loop import optimise
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask

TUNING_SEED = 1000
"""Of the runs that choose a learning rate; the study's own seeds are 0, 1, 2, ..."""


@dataclass(frozen=True)
class StudySize:
    """How large the study is.

    Args:
        problem: what is to be recalled, and scored.
        practice: easier problems that training alternates with it, as the published training mix does: without them a run
            may take most of its steps to begin to learn, and the spread between seeds is that of this wait.
        designs: a configuration for each design, by its name.
        settings: of every run, but for learning rate and seed.
        learning_rates: among which each design's is chosen.
        num_seeds: runs of each design.
        batch_size: sequences a step.
        held_out_size: sequences of the final score.
    """

    problem: MQAR
    practice: tuple[MQAR, ...]
    designs: dict[str, ModelConfig]
    settings: TrainSettings
    learning_rates: tuple[float, ...]
    num_seeds: int = 3
    batch_size: int = 16
    held_out_size: int = 2000


class RecallJob(NamedTuple):
    """One run of a design."""

    design: str
    config: ModelConfig
    problem: MQAR
    practice: tuple[MQAR, ...]
    settings: TrainSettings
    batch_size: int
    held_out_size: int
    device: str
    curve_points: int = 10


class RecallResult(NamedTuple):
    """What came out of a run."""

    design: str
    seed: int
    learning_rate: float
    accuracy: float
    """On held-out problems, after the last step."""
    curve: list[tuple[int, float]]
    """Steps done, and accuracy on a smaller held-out set."""
    seconds: float
    parameters: int
    active_state: int
    """Numbers of memory that a token reads and may change, over all layers."""
    total_state: int
    diverged: bool


class DesignSummary(NamedTuple):
    """A design over its seeds."""

    design: str
    learning_rate: float
    results: list[RecallResult]

    @property
    def accuracies(self) -> list[float]:
        """One a seed."""
        return [result.accuracy for result in self.results]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation of the seeds (n - 1); 0 for one seed."""
        return statistics.stdev(self.accuracies) if len(self.results) > 1 else 0.0

    @property
    def late_gain(self) -> float:
        """What the last fifth of the steps still added to the mean accuracy: near 0 when training has settled."""
        gains = []
        for result in self.results:
            last = result.curve[-1][0]
            before = [accuracy for step, accuracy in result.curve if step <= 0.8 * last] or [result.curve[0][1]]
            gains.append(result.curve[-1][1] - before[-1])
        return statistics.fmean(gains)


class Study(NamedTuple):
    """The whole outcome."""

    designs: list[DesignSummary]
    tuning: list[RecallResult]
    seconds: float


def run_study(size: StudySize, *, workers: int, device: str, on_steps: Callable[[str, int, int], None]) -> Study:
    """Tune, then run every design on every seed.

    Args:
        size: the study.
        workers: processes beside each other.
        device: of the models.
        on_steps: called with a phase's name, steps done so far in it and all its steps.
    """
    start = time.perf_counter()
    tuning = _run_all("tuning the learning rates", tuning_jobs(size, device), workers, on_steps)
    rates = {design: best_rate([result for result in tuning if result.design == design]) for design in size.designs}
    results = _run_all("the study", study_jobs(size, rates, device), workers, on_steps)
    summaries = [
        DesignSummary(design, rates[design], sorted((r for r in results if r.design == design), key=lambda r: r.seed))
        for design in size.designs
    ]
    return Study(summaries, tuning, time.perf_counter() - start)


def tuning_jobs(size: StudySize, device: str) -> list[RecallJob]:
    """Every design with every learning rate, on the tuning seed, at full length: shorter runs favour what rises early."""
    return [
        _job(size, design, device, learning_rate=rate, seed=TUNING_SEED)
        for design in _slowest_first(size.designs)
        for rate in size.learning_rates
    ]


def study_jobs(size: StudySize, rates: dict[str, float], device: str) -> list[RecallJob]:
    """Every design on every seed."""
    return [
        _job(size, design, device, learning_rate=rates[design], seed=seed)
        for design in _slowest_first(size.designs)
        for seed in range(size.num_seeds)
    ]


def best_rate(results: Sequence[RecallResult]) -> float:
    """The learning rate of the highest accuracy; of two alike the smaller."""
    return min(results, key=lambda result: (-result.accuracy, result.learning_rate)).learning_rate


def run_recall_job(job: RecallJob, report: Report) -> RecallResult:
    """Train one model and score it."""
    start = time.perf_counter()
    settings = job.settings
    torch.manual_seed(settings.seed)
    model = build_model(job.config, device=job.device)
    task, small = (
        RecallTask(
            [*job.practice, job.problem],
            batch_size=job.batch_size,
            seed=settings.seed,
            held_out_size=held_out,
            held_out_problems=[job.problem],
        )
        for held_out in (job.held_out_size, min(job.held_out_size, 256))
    )
    every = max(settings.steps // job.curve_points, 1)
    curve: list[tuple[int, float]] = []
    diverged, reported, done = False, 0, 0
    try:
        for step in optimise(model, build_optimizer(model, settings), task, settings):
            done = step.step
            if done % every == 0 or done == settings.steps:
                curve.append((done, small.evaluate(model)["accuracy"]))
                report(done - reported)
                reported = done
    except DivergedError:
        diverged = True
    report(settings.steps - reported)
    accuracy = task.evaluate(model)["accuracy"]
    return RecallResult(
        design=job.design,
        seed=settings.seed,
        learning_rate=settings.learning_rate,
        accuracy=accuracy,
        curve=curve or [(done, accuracy)],
        seconds=time.perf_counter() - start,
        parameters=model.num_parameters(),
        active_state=sum(active for active, _ in state_sizes(model)),
        total_state=sum(total for _, total in state_sizes(model)),
        diverged=diverged,
    )


def state_sizes(model: LanguageModel) -> Iterator[tuple[int, int]]:
    """Of each memory layer, numbers of memory of a sequence: those a token uses, and all."""
    for module in model.modules():
        if isinstance(module, RecurrentMixer):
            total = module.new_state(1).memory.numel()
            used = module.top_k + module.shared_memory if isinstance(module, MoMLayer) else module.num_states
            yield total * used // module.num_states, total


def _job(size: StudySize, design: str, device: str, **settings: float) -> RecallJob:
    return RecallJob(
        design=design,
        config=size.designs[design],
        problem=size.problem,
        practice=size.practice,
        settings=dataclasses.replace(size.settings, **settings),  # type: ignore[arg-type]
        batch_size=size.batch_size,
        held_out_size=size.held_out_size,
        device=device,
    )


def _slowest_first(designs: dict[str, ModelConfig]) -> list[str]:
    """So that no core is left with a long run in the end: a mixture's steps take longest."""

    def states(config: ModelConfig) -> int:
        return sum(total for _, total in state_sizes(build_model(config)))

    return sorted(designs, key=lambda design: -states(designs[design]))


def _run_all(
    phase: str, jobs: Sequence[RecallJob], workers: int, on_steps: Callable[[str, int, int], None]
) -> list[RecallResult]:
    total = sum(job.settings.steps for job in jobs)
    done, results = 0, []
    on_steps(phase, 0, total)
    for message in run_jobs(run_recall_job, jobs, workers=workers):
        done += message.done
        if message.result is not None:
            results.append(message.result)
        on_steps(phase, done, total)
    return results


def compared(first: DesignSummary, second: DesignSummary) -> str:
    """A sentence on two designs that claims no more than the seeds show."""
    difference = first.mean - second.mean
    spread = math.sqrt((first.deviation**2 + second.deviation**2) / 2)
    a, b = first.accuracies, second.accuracies
    apart = min(a) > max(b) or min(b) > max(a)
    relation = "above" if difference > 0 else "below"
    verdict = (
        "no seed of one reaches a seed of the other" if apart else "the seeds overlap, so this order could be chance"
    )
    return (
        f"{first.design} is {abs(difference):.3f} {relation} {second.design} on average "
        f"(standard deviation between seeds {spread:.3f}); {verdict}."
    )
