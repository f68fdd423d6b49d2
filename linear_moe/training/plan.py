"""What a run was asked to do, as plain data: kept in every checkpoint, so that it can be gone on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linear_moe.data.mqar import MQAR, ZOOLOGY_TEST, ZOOLOGY_TRAIN
from linear_moe.data.rows import TEXT_KEY
from linear_moe.data.text import TEXT_PATTERNS, read_text, standard_library_text
from linear_moe.data.text_stream import HubStream
from linear_moe.data.tokenizer import BYTES, FileTokenizer, Tokenizer
from linear_moe.models.schema import ModelConfig
from linear_moe.training.logs import LOGS
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask, StreamTask, Task, TextTask

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
        text_key: of "text": under which a row of JSON lines, Parquet or a dataset has its text; "text" unless given.
        dataset: of "text": a dataset to stream in place of `data`.
        dataset_config: of `dataset`.
        split: of `dataset`.
        held_out_documents: of `dataset`: so many of its first documents are not learned from.
        tokenizer: of "text": a tokenizer.json; None for bytes.
        document_start: the token of `tokenizer` that begins a document; None for the first of the usual ones.
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
    text_key: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    held_out_documents: int = 100
    tokenizer: str | None = None
    document_start: str | None = None
    held_out_bytes: int = 100_000
    context: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.data is not None and self.dataset is not None:
            raise ValueError(f"data ({self.data!r}) and dataset ({self.dataset!r}) can't both be what is learned from")


@dataclass(frozen=True)
class RunPlan:
    """A run: its task, its settings, and when it reports.

    Args:
        task: what is trained on.
        settings: how.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints; 0 for the final one only.
        evaluate_every: steps between two held-out scores; 0 for the final one only.
        logs: where the metrics go beside their file: "tensorboard", "trackio".
    """

    task: TaskOptions = field(default_factory=TaskOptions)
    settings: TrainSettings = field(default_factory=TrainSettings)
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    logs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {self.log_every}")
        for name in ("checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in self.logs:
            if name not in LOGS:
                raise ValueError(f"log must be one of {', '.join(LOGS)}, got {name!r}")

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
        logs = tuple(data.get("logs", ()))
        return cls(**{**data, "logs": logs, "task": TaskOptions(**task), "settings": TrainSettings(**settings)})


def build_task(options: TaskOptions, config: ModelConfig, seed: int, tokenizer: Tokenizer | None = None) -> Task:
    """The task for a model of `config`.

    Args:
        options: which task.
        config: of the model.
        seed: of the order of the data.
        tokenizer: in place of the one that the options name.

    Raises:
        ValueError: if the data can't be read, or does not fit the vocabulary.
        MissingExtraError: if a package that reads it is not installed.
    """
    if options.task == "text":
        return _text_task(options, config, seed, tokenizer or _tokenizer(options))
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


def _tokenizer(options: TaskOptions) -> Tokenizer:
    return BYTES if options.tokenizer is None else FileTokenizer(options.tokenizer, options.document_start)


def _text_task(options: TaskOptions, config: ModelConfig, seed: int, tokenizer: Tokenizer) -> Task:
    tokenizer.check_model(config.vocab_size, config.name or "the model")
    tokens = options.batch_size * options.context
    if options.dataset is not None:
        stream = HubStream(
            options.dataset,
            config=options.dataset_config,
            split=options.split,
            text_key=options.text_key or TEXT_KEY,
        )
        return StreamTask(
            stream,
            context=options.context,
            batch_tokens=tokens,
            held_out_documents=options.held_out_documents,
            held_out_bytes=options.held_out_bytes,
            seed=seed,
            tokenizer=tokenizer,
        )
    if options.data is None:
        corpus = standard_library_text(held_out=options.held_out)
    else:
        corpus = read_text(
            options.data, patterns=options.patterns, held_out=options.held_out, text_key=options.text_key
        )
    return TextTask(
        corpus,
        context=options.context,
        batch_tokens=tokens,
        seed=seed,
        held_out_bytes=options.held_out_bytes,
        tokenizer=tokenizer,
    )


def _problem(config: ModelConfig, options: TaskOptions, length: int, pairs: int) -> MQAR:
    return MQAR(vocab_size=config.vocab_size, length=length, num_pairs=pairs, filler=options.filler)


def _sizes(text: str) -> tuple[int, int]:
    length, colon, pairs = text.partition(":")
    if not (colon and length.isdecimal() and pairs.isdecimal()):
        raise ValueError(f"a recall problem is LENGTH:PAIRS such as 64:14, or {ZOOLOGY} alone; got {text!r}")
    return int(length), int(pairs)
