"""A file of prompts to a file of texts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from linear_moe.cli.console import make_progress
from linear_moe.cli.writer import Writer
from linear_moe.data.vocabulary import Vocabulary
from linear_moe.models.session import Session


class Prompt(NamedTuple):
    """One prompt of a file."""

    row: dict[str, Any]
    """What its line held: `prompt`, and whatever else."""
    tokens: list[int]


def read_prompts(path: Path, vocabulary: Vocabulary) -> list[Prompt]:
    """The prompts of a file: its lines that are not blank, or of one named *.jsonl the `prompt` of each.

    Raises:
        ValueError: naming the line that holds none, or the file if it has no prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no valid UTF-8 text: {error}") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        row = _json_row(line, where) if path.suffix == ".jsonl" else {"prompt": line.removesuffix("\r")}
        try:
            tokens = vocabulary.encode(row["prompt"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not tokens:
            raise ValueError(f"{where} has an empty prompt")
        prompts.append(Prompt(row, tokens))
    if not prompts:
        raise ValueError(f"the prompt file {str(path)!r} has no prompts: only blank lines")
    return prompts


def complete_prompts(writer: Writer, prompts: list[Prompt], output: Path | None, *, batch_size: int) -> None:
    """Continue each prompt, after what the writer has read, and write a line of JSON each, in their order.

    A line is the prompt's own with `completion` (without the stop text), `num_tokens` (drawn) and `stopped` (whether it
    came to an end of its own).
    """
    if output is None:
        _complete_all(writer, prompts, sys.stdout, batch_size)
        return
    aside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            _complete_all(writer, prompts, file, batch_size)
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)


def _complete_all(writer: Writer, prompts: list[Prompt], file: TextIO, batch_size: int) -> None:
    with make_progress() as bar:
        task = bar.add_task("prompts", total=len(prompts))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            for prompt, completed in zip(batch, _complete(writer, batch), strict=True):
                file.write(json.dumps({**prompt.row, **completed}, ensure_ascii=False) + "\n")
            bar.advance(task, len(batch))


def _complete(writer: Writer, batch: list[Prompt]) -> list[dict[str, Any]]:
    """The texts of one batch, padded on the left."""
    start = list(writer.vocabulary.start) if writer.session.is_new else []
    rows = [start + prompt.tokens for prompt in batch]
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=writer.device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=writer.device)
    if writer.session.is_new:
        session = Session(writer.model, len(batch), capture=writer.capture)
    else:
        session = writer.session.repeated(len(batch))
    session.read(tokens, padding_mask=None if bool(mask.all()) else mask)

    written = [writer.new_text() for _ in batch]
    texts, counts, ended = [""] * len(batch), [0] * len(batch), [False] * len(batch)
    end = writer.vocabulary.stop_token
    for drawn in session.write(writer.max_new_tokens, writer.sampling, generator=writer.generator, stop_token=end):
        for i, token in enumerate(drawn.tolist()):
            if ended[i]:
                continue
            counts[i] += 1
            texts[i] += "" if token == end else written[i].push(token)
            ended[i] = written[i].stopped or token == end
        if all(ended):
            break
    return [
        {"completion": text + rest.finish(), "num_tokens": count, "stopped": over}
        for text, rest, count, over in zip(texts, written, counts, ended, strict=True)
    ]


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{where} has no text under the key 'prompt'")
    return row
