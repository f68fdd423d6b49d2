"""Models and tasks that train in milliseconds."""

from __future__ import annotations

from linear_moe.data.mqar import MQAR
from linear_moe.data.text import TextCorpus
from linear_moe.models import LanguageModel, ModelConfig, build_model
from linear_moe.training.tasks import RecallTask, TextTask

PROBLEM = MQAR(vocab_size=16, length=16, num_pairs=3)
CORPUS = TextCorpus(
    "test", (b"def f(x):\n    return x\n" * 20, b"class A: pass\n" * 10), (b"def g(y): return y\n" * 3,)
)


def small_config(vocab_size: int = 16, balance_weight: float = 0.01, **mixer: object) -> ModelConfig:
    options = {
        "type": "mom",
        "num_heads": 1,
        "head_dim": 4,
        "num_memories": 3,
        "balance_weight": balance_weight,
        **mixer,
    }
    block = {"mixer": options, "ffn": {"type": "swiglu", "width": 8}}
    return ModelConfig.from_dict(
        {"name": "small", "hidden_size": 8, "vocab_size": vocab_size, "blocks": {"m": block}, "layers": "m"}
    )


def small_model(vocab_size: int = 16, auxiliary: str = "attach", **mixer: object) -> LanguageModel:
    return build_model(small_config(vocab_size, **mixer), auxiliary=auxiliary)  # type: ignore[arg-type]


def recall_task(seed: int = 0) -> RecallTask:
    return RecallTask([PROBLEM], batch_size=4, seed=seed, held_out_size=6)


def text_task() -> TextTask:
    return TextTask(CORPUS, context=16, batch_tokens=32)
