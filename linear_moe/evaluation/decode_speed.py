"""The time and memory of decoding by the length of the context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from linear_moe.data.batch import seeded
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes
from linear_moe.models.decoding import WARM_UP_STEPS, DecodeStep, grows
from linear_moe.models.model import LanguageModel
from linear_moe.models.session import evaluating

NUM_PARTS = 5
"""The timed tokens are cut into so many parts, of which the median is reported."""

COLUMNS = (
    Column("model", "model"),
    Column("context", "context", ","),
    Column("ms_per_token", "ms a token", ".3f"),
    Column("fastest_ms", "fastest", ".3f"),
    Column("state_bytes", "state bytes", ","),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("read_per_s", "read, tokens/s", ",.0f"),
)


def decoding_by_context(
    models: Mapping[str, LanguageModel],
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    num_tokens: int = 100,
    batch_size: int = 1,
    capture: bool | None = None,
    seed: int = 0,
    sizes: Sizes | None = None,
    track: Track = untracked,
) -> Result:
    """How long a token takes, and how large the state is, after contexts of growing length.

    The context is one text of random tokens, read on from one length to the next. At each, `num_tokens` are decoded from
    a copy of the state, the likeliest of each step fed to the next, with a wait for the device only around each part.

    Args:
        models: by name.
        lengths: of the context, in tokens.
        num_tokens: that are decoded and timed at each length.
        batch_size: sequences decoded at once.
        capture: whether steps are CUDA graphs; on a GPU unless given.
        seed: of the context.
        sizes: how much is read at once.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    sizes, lengths = sizes or Sizes(), sorted(lengths)
    if not lengths or lengths[0] < 1:
        raise ValueError(f"lengths must name contexts of at least one token, got {lengths}")
    for name, value, least in (("num_tokens", num_tokens, NUM_PARTS), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rows: list[dict[str, Any]] = []
    total = len(models) * lengths[-1]
    for place, (name, model) in enumerate(models.items()):
        done = place * lengths[-1]
        rows += _measure(name, model, lengths, num_tokens, batch_size, capture, seed, sizes, done, total, track)
    remarks = [_remark(name, model, [row for row in rows if row["model"] == name]) for name, model in models.items()]
    return Result("decode-speed", f"decoding after a context, batch {batch_size}", COLUMNS, rows, tuple(remarks))


@torch.no_grad()
def _measure(
    name: str,
    model: LanguageModel,
    lengths: Sequence[int],
    num_tokens: int,
    batch_size: int,
    capture: bool | None,
    seed: int,
    sizes: Sizes,
    done: int,
    total: int,
    track: Track,
) -> list[dict[str, Any]]:
    device = next(model.parameters()).device
    text = torch.randint(model.config.vocab_size, (batch_size, lengths[-1]), generator=seeded(seed)).to(device)
    state, rows, read = model.new_state(batch_size), [], 0
    with evaluating(model):
        for length in lengths:
            begin = _now(device)
            for start in range(read, length, sizes.segment):
                model.hidden(text[:, start : min(start + sizes.segment, length)], state=state)
                track(done + min(start + sizes.segment, length), total)
            reading, more, read = _now(device) - begin, length - read, length
            size = state.nbytes
            # Room for all of it: a graph that is captured again on the way would be timed too.
            step = DecodeStep(model, state.clone(), capture=capture, reserve=WARM_UP_STEPS + num_tokens)
            parts, peak = _decode(step, text[:, length - 1], num_tokens)
            del step
            rows.append(
                {
                    "model": name,
                    "context": length,
                    "ms_per_token": 1e3 * statistics.median(parts),
                    "fastest_ms": 1e3 * min(parts),
                    "state_bytes": size,
                    "peak_mib": peak,
                    "read_per_s": more * batch_size / reading if more else None,
                }
            )
    return rows


def _decode(step: DecodeStep, token: torch.Tensor, num_tokens: int) -> tuple[list[float], float | None]:
    """Seconds a token in each part, and on a GPU the most MiB that were allocated meanwhile."""
    for _ in range(WARM_UP_STEPS):
        token = step(token).argmax(-1)
    on_gpu = step.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(step.device)
    parts, size = [], num_tokens // NUM_PARTS
    for _ in range(NUM_PARTS):
        begin = _now(step.device)
        for _ in range(size):
            token = step(token).argmax(-1)
        parts.append((_now(step.device) - begin) / size)
    return parts, torch.cuda.max_memory_allocated(step.device) / 2**20 if on_gpu else None


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _remark(name: str, model: LanguageModel, rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    time_ratio = last["ms_per_token"] / first["ms_per_token"]
    size_ratio = last["state_bytes"] / first["state_bytes"]
    kind = "has full attention, whose state grows" if grows(model) else "has a state of one size"
    return (
        f"{name} ({model.num_parameters():,} parameters, {model.num_active_parameters():,} active) {kind}: after "
        f"{last['context']:,} tokens {time_ratio:.2f} times the time a token and {size_ratio:.2f} times the state of "
        f"after {first['context']:,}."
    )
