"""The evaluations by name, and which of them a model can take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from linear_moe.data.vocabulary import TextVocabulary, Vocabulary
from linear_moe.evaluation.decode_speed import decoding_by_context
from linear_moe.evaluation.needle import needle_in_a_haystack
from linear_moe.evaluation.perplexity import perplexity_by_position
from linear_moe.evaluation.recall import problem_of, published_problems, recall_by_size
from linear_moe.evaluation.result import Result, Track, untracked
from linear_moe.evaluation.segments import Sizes
from linear_moe.evaluation.texts import evaluation_documents
from linear_moe.evaluation.twin import attention_twin
from linear_moe.models.model import LanguageModel, build_model

SUITES = ("perplexity", "mqar", "needle", "decode-speed")
OF_TEXT = ("perplexity", "needle")
"""Suites for models of text only."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Sizes of the evaluations.

    Args:
        lengths: of needle and decode-speed; perplexity goes up to the largest.
        samples: pieces of perplexity, problems a kind of mqar, texts a length and depth of needle; 8, 256 and 8 unless given.
        data: a text file or folder; None for what training holds out of the standard library's sources.
        trained_length: what the model was trained on, to mark what lies beyond.
        problems: of mqar, as "LENGTH:PAIRS"; the published ones that fit if there are none.
        depths: of needle.
        num_tokens: that decode-speed times at each length.
        batch_size: sequences that decode-speed decodes at once.
        twin: whether decode-speed also measures the softmax-attention model of the same size.
        capture: whether decode-speed captures CUDA graphs; on a GPU unless given.
        seed: of the needles and of decode-speed's context.
        sizes: how much is done at once.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    samples: int | None = None
    data: Path | None = None
    trained_length: int | None = None
    problems: tuple[str, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_tokens: int = 100
    batch_size: int = 1
    twin: bool = False
    capture: bool | None = None
    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must name at least one, each at least 1, got {list(self.lengths)}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


def suites_of(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The suites that say something of a model with this vocabulary."""
    return (
        ("perplexity", "needle", "decode-speed") if isinstance(vocabulary, TextVocabulary) else ("mqar", "decode-speed")
    )


def check_suites(names: tuple[str, ...], vocabulary: Vocabulary) -> None:
    """Raises ValueError for a suite that is unknown, or not for a model with this vocabulary."""
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
        if name in OF_TEXT and not isinstance(vocabulary, TextVocabulary):
            raise ValueError(
                f"suite {name} reads text, and this model's tokens are numbers; it can take {', '.join(suites_of(vocabulary))}"
            )


def run_suite(
    name: str,
    model: LanguageModel,
    vocabulary: Vocabulary,
    options: EvaluationOptions | None = None,
    track: Track = untracked,
) -> Result:
    """One suite.

    Raises:
        ValueError: naming what does not fit.
    """
    check_suites((name,), vocabulary)
    options = options or EvaluationOptions()
    if name == "mqar":
        vocab_size = model.config.vocab_size
        problems = [problem_of(text, vocab_size) for text in options.problems] or published_problems(vocab_size)
        return recall_by_size(model, problems, num_examples=options.samples or 256, sizes=options.sizes, track=track)
    if name == "decode-speed":
        models = {model.config.name or "model": model}
        if options.twin:
            config = attention_twin(model.config)
            weight = next(model.parameters())
            models[config.name or "attention"] = build_model(config, device=weight.device, dtype=weight.dtype).eval()
        return decoding_by_context(
            models,
            lengths=options.lengths,
            num_tokens=options.num_tokens,
            batch_size=options.batch_size,
            capture=options.capture,
            seed=options.seed,
            sizes=options.sizes,
            track=track,
        )
    assert isinstance(vocabulary, TextVocabulary)
    documents = evaluation_documents(options.data)
    if name == "perplexity":
        return perplexity_by_position(
            model,
            documents,
            vocabulary,
            length=max(options.lengths),
            num_sequences=options.samples or 8,
            trained_length=options.trained_length,
            sizes=options.sizes,
            track=track,
        )
    return needle_in_a_haystack(
        model,
        documents,
        vocabulary,
        lengths=options.lengths,
        depths=options.depths,
        num_trials=options.samples or 8,
        seed=options.seed,
        sizes=options.sizes,
        track=track,
    )
