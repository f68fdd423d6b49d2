"""`linear-moe generate`: one text, a file of them, a conversation, and a state that is gone on from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import MIXTURE, saved, small_model
from typer.testing import CliRunner, Result

from linear_moe.cli import app
from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.vocabulary import vocabulary_of
from linear_moe.models import LanguageModel, Session

LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 5


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return small_model()


@pytest.fixture(scope="module")
def checkpoint(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("text"), model)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("numbers"), small_model(11))


def run(checkpoint: Path, *arguments: str | Path | int, stdin: str | None = None) -> Result:
    words = ["generate", str(checkpoint), "--device", "cpu", *map(str, arguments)]
    return CliRunner().invoke(app, words, input=stdin)


def out(checkpoint: Path, *arguments: str | Path | int, stdin: str | None = None) -> str:
    result = run(checkpoint, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(checkpoint: Path, *arguments: str | Path | int, says: str) -> None:
    result = run(checkpoint, *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    assert says in re.sub(r"\s+", " ", result.stderr)


def greedy(model: LanguageModel, text: str, count: int) -> list[int]:
    """Without a state, the whole text every time."""
    tokens = [DOCUMENT_START, *text.encode()]
    begin = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] == DOCUMENT_START:
                break
    return tokens[begin:]


def completions(text: str) -> list[str]:
    return [json.loads(line)["completion"] for line in text.splitlines()]


def test_a_batch_writes_what_each_prompt_would_alone(model: LanguageModel, checkpoint: Path, tmp_path: Path) -> None:
    prompts = ["a", "the quick brown fox", "αβγ", "one more"]
    (tmp_path / "p.txt").write_text("\n".join([*prompts[:2], "", *prompts[2:]]) + "\n", encoding="utf-8")
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    wanted = [vocabulary_of(257).decode(greedy(model, prompt, 12)) for prompt in prompts]
    # Batches of 3 and 1, padded.
    assert completions(out(checkpoint, "--prompts", tmp_path / "p.txt", "--tokens", 12, "--batch-size", 3)) == wanted
    target = tmp_path / "o.jsonl"
    assert out(checkpoint, "--prompts", tmp_path / "p.jsonl", "--tokens", 12, "--output", target) == ""
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row["completion"] for row in written] == wanted
    assert [row["id"] for row in written] == [0, 1, 2, 3]
    assert [row["prompt"] for row in written] == prompts
    assert [row["num_tokens"] for row in written] == [len(greedy(model, prompt, 12)) for prompt in prompts]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "p.jsonl", "p.txt"]


def test_one_prompt_is_shown_with_what_follows(numbers: Path) -> None:
    model = small_model(11)
    wanted = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6)[0].tolist()
    assert out(numbers, "--prompt", "1 2, 3", "--tokens", 6) == " ".join(map(str, wanted)) + "\n"
    assert out(numbers, "--prompt", "1 2", "--tokens", 0) == "1 2\n"


def test_a_text_ends_before_a_stop_text(numbers: Path, tmp_path: Path) -> None:
    written = out(numbers, "--prompt", "1 2", "--tokens", 12).split()[2:]
    place = next(i for i in range(1, 11) if written[i : i + 2] not in [written[j : j + 2] for j in range(i)])
    stop = " ".join(written[place : place + 2])
    assert out(numbers, "--prompt", "1 2", "--tokens", 12, "--stop", stop).split()[2:] == written[:place]
    (tmp_path / "p.txt").write_text("1 2\n3\n")
    rows = [
        json.loads(line)
        for line in out(numbers, "--prompts", tmp_path / "p.txt", "--tokens", 12, "--stop", stop).splitlines()
    ]
    assert rows[0] == {
        "prompt": "1 2",
        "completion": " ".join(written[:place]),
        "num_tokens": place + 2,
        "stopped": True,
    }
    refused(numbers, "--prompt", "1", "--stop", "", says="a stop text must not be empty")


def test_draws_follow_the_seed_and_its_bounds(numbers: Path) -> None:
    sampled = ("--prompt", "1", "--tokens", 30, "--temperature", 2.0)
    first = out(numbers, *sampled, "--seed", 1)
    assert out(numbers, *sampled, "--seed", 1) == first
    assert out(numbers, *sampled, "--seed", 2) != first
    greedy = out(numbers, "--prompt", "1", "--tokens", 30)
    assert out(numbers, *sampled, "--top-k", 1) == out(numbers, *sampled, "--top-p", 1e-9) == greedy


def test_a_context_is_read_once_and_gone_on_from(checkpoint: Path, tmp_path: Path) -> None:
    """From a file as in one go: from the same state the same bits, and of a long text the same words."""
    (tmp_path / "long.txt").write_text(LONG)
    state, after = tmp_path / "state.bin", tmp_path / "after.bin"
    whole = out(checkpoint, "--context", tmp_path / "long.txt", "--prompt", "Then", "--tokens", 20)
    assert out(checkpoint, "--context", tmp_path / "long.txt", "--tokens", 0, "--save-state", state) == "\n"
    again = out(checkpoint, "--load-state", state, "--prompt", "Then", "--tokens", 20, "--save-state", after)
    assert again == whole
    assert again.startswith("Then")
    # The text went on without a prompt, in two parts and in one.
    halves = out(checkpoint, "--load-state", state, "--tokens", 7, "--save-state", tmp_path / "half.bin")[:-1]
    rest = out(checkpoint, "--load-state", tmp_path / "half.bin", "--tokens", 8)
    assert len(halves.encode()) <= 30
    in_memory = small_model()
    session = Session.load(state, in_memory)
    drawn = [int(token[0]) for token in session.write(7)]
    drawn += [int(token[0]) for token in session.write(8)]
    assert halves + rest.removesuffix("\n") == _shown(drawn[:7]) + _shown(drawn[7:])
    # Many questions about one text.
    (tmp_path / "p.txt").write_text("Then\nWhy?\n")
    answers = completions(out(checkpoint, "--load-state", state, "--prompts", tmp_path / "p.txt", "--tokens", 20))
    assert _clean(answers[0]) == whole.removeprefix("Then").removesuffix("\n")
    assert (
        completions(
            out(checkpoint, "--context", tmp_path / "long.txt", "--prompts", tmp_path / "p.txt", "--tokens", 20)
        )
        == answers
    )


def _shown(tokens: list[int]) -> str:
    return _clean(vocabulary_of(257).decode(tokens))


def _clean(text: str) -> str:
    from linear_moe.data.text import printable

    return printable(text)


def test_a_state_that_does_not_fit_is_refused(checkpoint: Path, numbers: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.bin"
    out(numbers, "--prompt", "1 2", "--tokens", 3, "--save-state", state)
    refused(checkpoint, "--load-state", state, says="state.bin belongs to a model of another configuration")
    other = saved(tmp_path / "other", small_model(11, seed=1))
    refused(other, "--load-state", state, says="with other weights")
    state.write_bytes(state.read_bytes()[:-1])
    refused(
        numbers,
        "--load-state",
        state,
        says="state.bin holds no text state of format 2: it is another file, or was cut short",
    )
    both = Session(small_model(11), 2)
    both.read(torch.tensor([[1], [2]]))
    both.save(state)
    refused(numbers, "--load-state", state, says="holds the states of 2 texts; here one is gone on from")


def test_a_conversation_keeps_its_state(numbers: Path, tmp_path: Path) -> None:
    """Turn by turn as if it had been one text, through saving, forgetting and loading."""
    model = small_model(11)
    session, wanted = Session(model), []
    for turn in ([1, 2], [3], []):
        if turn:
            session.read(torch.tensor([turn]))
        wanted.append(" ".join(str(int(token[0])) for token in session.write(4)))
    file = tmp_path / "s.bin"
    lines = [
        "1 2",
        f"/save {file}",
        "x",
        "3",
        "/nonsense",
        "/save",
        "/state",
        "/reset",
        f"/load {file}",
        "3",
        "",
        "/quit",
        "5",
    ]
    result = run(numbers, "-i", "--tokens", 4, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [wanted[0], wanted[1], wanted[1], wanted[2]]
    assert "'x' in the prompt is none" in result.stderr
    assert "there is no command /nonsense" in result.stderr
    assert "/save needs the name of a file" in result.stderr
    # Two tokens, four, one, four; the last of them is read with what comes next.
    assert "10 tokens read" in result.stderr
    refused(numbers, "-i", "--prompt", "1", says="--interactive reads its prompts from the terminal")


def test_a_conversation_in_text_ends_its_turns(model: LanguageModel, checkpoint: Path) -> None:
    result = out(checkpoint, "-i", "--tokens", 5, stdin="hello\n//odd\n")
    session, wanted = Session(model), ""
    for text in ([DOCUMENT_START, *b"hello\n"], list(b"/odd\n")):
        session.read(torch.tensor([text]))
        wanted += _shown([int(token[0]) for token in session.write(5, stop_token=DOCUMENT_START)]) + "\n"
    assert result == wanted


def test_bfloat16_is_the_model_in_bfloat16(tmp_path: Path) -> None:
    model = small_model(11, MIXTURE)
    checkpoint = saved(tmp_path / "run", model)
    wanted = model.bfloat16().generate(torch.tensor([[1, 2]]), max_new_tokens=5)[0].tolist()
    assert out(checkpoint, "--prompt", "1 2", "--tokens", 5, "--precision", "bfloat16").split() == list(
        map(str, wanted)
    )


def test_mistakes_are_explained(checkpoint: Path, numbers: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "empty").touch()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "none.jsonl").write_text('{"prompt": ""}\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    (tmp_path / "far.txt").write_text("1 2\n3 11\n")
    refused(checkpoint, "--prompts", tmp_path / "blank.txt", says="blank.txt' has no prompts")
    refused(checkpoint, "--prompts", tmp_path / "empty", says="empty' has no prompts")
    refused(checkpoint, "--prompts", tmp_path / "bad.jsonl", says="bad.jsonl' has no text under the key 'prompt'")
    refused(checkpoint, "--prompts", tmp_path / "broken.jsonl", says="line 1 of")
    refused(checkpoint, "--prompts", tmp_path / "none.jsonl", says="has an empty prompt")
    refused(checkpoint, "--prompts", tmp_path / "bytes.txt", says="is no valid UTF-8 text")
    refused(numbers, "--prompts", tmp_path / "far.txt", says="line 2 of")
    refused(numbers, "--prompts", tmp_path / "far.txt", says="tokens must be in [0, vocab_size = 11), got 11")
    refused(numbers, "--context", tmp_path / "bytes.txt", says="holds no token numbers")
    refused(checkpoint, "--context", tmp_path / "empty", says="is empty")
    refused(checkpoint, "--context", tmp_path / "nowhere", says="--context: there is no file")
    refused(checkpoint, "--load-state", tmp_path / "nowhere", says="--load-state: there is no file")
    refused(checkpoint, "--save-state", tmp_path / "no" / "where", says="--save-state: there is no folder")
    refused(checkpoint, "--output", tmp_path / "o", says="--output would be ignored")
    far = tmp_path / "far.txt"
    refused(checkpoint, "--prompts", far, "--prompt", "a", says="--prompts and --prompt can't be given together")
    refused(checkpoint, "--prompts", far, "--save-state", tmp_path / "s", says="it can't be given with --prompts")
    refused(checkpoint, "--tokens", -1, says="--tokens must be at least 0, got -1")
    refused(checkpoint, "--top-k", 3, says="top_k = 3 would be ignored at temperature 0")
    refused(checkpoint, "--precision", "int4", says="precision must be one of float32, bfloat16, got 'int4'")
    refused(checkpoint, "--graph", says="a CUDA graph needs a CUDA device")
    assert not (tmp_path / "s").exists() and not (tmp_path / "o").exists()
