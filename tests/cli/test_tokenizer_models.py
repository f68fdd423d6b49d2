"""Models with a tokeniser's file: text in and out of every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import write_tokenizer
from typer.testing import CliRunner

from linear_moe.cli import app
from linear_moe.data.tokenizer import FileTokenizer
from linear_moe.data.tokenizer_vocabulary import TokenizerVocabulary
from linear_moe.training.checkpoint import TrainerState, save_checkpoint

TEXT = "the quick brown fox jumps\nover the lazy dog, then rests\n" * 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return FileTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.json"))


@pytest.fixture(scope="module")
def checkpoint(tokenizer: FileTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, state = tmp_path_factory.mktemp("run"), TrainerState(1, *[{} for _ in TrainerState._fields[1:]])
    save_checkpoint(folder, small_model(tokenizer.vocab_size), state, attachments=tokenizer.files())
    return folder


def out(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return result.stdout


@settings(max_examples=50)
@given(st.text(st.sampled_from("the fox é€😀\n"), max_size=20))
def test_text_comes_as_it_is_decoded(tokenizer: FileTokenizer, text: str) -> None:
    vocabulary = TokenizerVocabulary(tokenizer)
    tokens, decoder, shown = vocabulary.encode(text), vocabulary.decoder(), ""
    for token in tokens:
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown + decoder.finish() == text == vocabulary.decode([*vocabulary.start, *tokens])
    assert len(vocabulary.labels(tokens)) == len(tokens)


def test_every_command_reads_and_writes_text(tokenizer: FileTokenizer, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    vocabulary, model = TokenizerVocabulary(tokenizer), small_model(tokenizer.vocab_size)
    prompt = torch.tensor([[*vocabulary.start, *vocabulary.encode("the fox")]])
    drawn = model.generate(prompt, max_new_tokens=9, stop_token=vocabulary.stop_token)[0, prompt.shape[1] :].tolist()
    (tmp_path / "p.txt").write_text("the fox\n")
    (row,) = map(json.loads, out("generate", checkpoint, "--prompts", tmp_path / "p.txt", "--tokens", 9).splitlines())
    assert row["completion"] == vocabulary.decode(drawn)
    assert out("generate", checkpoint, "--prompt", "the fox", "--tokens", 9).startswith("the fox")
    sizes = ("--lengths", "130", "--samples", 2, "--depths", "0.5", "--suite", "perplexity", "--suite", "needle")
    perplexity, needle = json.loads(out("eval", checkpoint, "--data", tmp_path / "t.txt", *sizes, "--json"))
    assert "tokens; all positions together" in perplexity["remarks"][0]
    assert needle["rows"][0]["length"] == 130
    out("inspect", checkpoint, "--text", tmp_path / "t.txt", "--output", tmp_path / "page.html", "--tokens", 20)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f">{label}</b>" in page for label in vocabulary.labels(vocabulary.encode("the quick brown fox")))
