"""What a run was asked to do, as plain data: kept in every checkpoint, so that it can be gone on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linear_moe.data.mqar import MQAR, ZOOLOGY_TEST, ZOOLOGY_TRAIN
from linear_moe.data.text import TEXT_PATTERNS, read_text, standard_library_text
from linear_moe.models.schema import ModelConfig
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask, Task, TextTask, check_text_vocabulary

TASKS = ("mqar", "text")
ZOOLOGY = "zoology"


@dataclass(frozen=True)
class TaskOptions:
    """Which task, and its sizes.

    Args:
        task: "mqar" or "text".
        problems: of "mqar": kinds as "LENGTH:PAIRS", drawn alike often; or "zoology" alone, the published mix and tests.
        filler: of "mqar": "zero" or "uniform".
        data: of "text": a file or folder; None for the Python standard library's own sources.
        patterns: of "text": names of a folder's files.
        held_out: of "text": fraction of the documents that is not learned from.
        context: of "text": tokens of a segment, at most.
        held_out_bytes: of "text": how much of the held-out text is scored, at most.
        batch_size: sequences of a batch; for "text" a batch has `batch_size * context` tokens.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    task: str = "text"
    problems: tuple[str, ...] = ("64:14",)
    filler: str = "zero"
    data: str | None = None
    patterns: tuple[str, ...] = TEXT_PATTERNS
    held_out: float = 0.05
    held_out_bytes: int = 100_000
    context: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class RunPlan:
    """A run: its task, its settings, and when it reports.

    Args:
        task: what is trained on.
        settings: how.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; 0 for the final one only.
        evaluate_every: steps between two held-out scores; 0 for the final one only.
    """

    task: TaskOptions = field(default_factory=TaskOptions)
    settings: TrainSettings = field(default_factory=TrainSettings)
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {self.log_every}")
        for name in ("checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, that `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunPlan:
        """The plan that `as_dict` wrote."""
        task, settings = dict(data["task"]), dict(data["settings"])
        for values, names in ((task, ("problems", "patterns")), (settings, ("betas",))):
            for name in names:
                values[name] = tuple(values[name])
        return cls(**{**data, "task": TaskOptions(**task), "settings": TrainSettings(**settings)})


def build_task(options: TaskOptions, config: ModelConfig, seed: int) -> Task:
    """The task for a model of `config`.

    Raises:
        ValueError: if the data can't be read, or does not fit the vocabulary.
    """
    if options.task == "text":
        check_text_vocabulary(config.vocab_size, config.name or "the model")
        if options.data is None:
            corpus = standard_library_text(held_out=options.held_out)
        else:
            corpus = read_text(options.data, patterns=options.patterns, held_out=options.held_out)
        tokens = options.batch_size * options.context
        return TextTask(
            corpus,
            context=options.context,
            batch_tokens=tokens,
            seed=seed,
            held_out_bytes=options.held_out_bytes,
        )
    if options.problems == (ZOOLOGY,):
        return RecallTask(
            [_problem(config, options, length, pairs) for length, pairs, _ in ZOOLOGY_TRAIN],
            weights=[examples for *_, examples in ZOOLOGY_TRAIN],
            batch_size=options.batch_size,
            seed=seed,
            held_out_problems=[_problem(config, options, length, pairs) for length, pairs in ZOOLOGY_TEST],
        )
    problems = [_problem(config, options, *_sizes(text)) for text in options.problems]
    return RecallTask(problems, batch_size=options.batch_size, seed=seed)


def _problem(config: ModelConfig, options: TaskOptions, length: int, pairs: int) -> MQAR:
    return MQAR(vocab_size=config.vocab_size, length=length, num_pairs=pairs, filler=options.filler)


def _sizes(text: str) -> tuple[int, int]:
    length, colon, pairs = text.partition(":")
    if not (colon and length.isdecimal() and pairs.isdecimal()):
        raise ValueError(f"a recall problem is LENGTH:PAIRS such as 64:14, or {ZOOLOGY} alone; got {text!r}")
    return int(length), int(pairs)
