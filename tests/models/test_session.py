"""A text in turns: what is read at once, in parts, from memory or from a file is one and the same."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hybrids import PATTERNS, model_of

from linear_moe.models import ModelState, Sampling, Session, decoding
from linear_moe.models.session import weights_fingerprint

TEXT = torch.randint(11, (1, 23), generator=torch.Generator().manual_seed(2))


def written(session: Session, count: int, **options: Any) -> list[int]:
    return [int(token[0]) for token in session.write(count, **options)]


def same_bits(a: Session, b: Session) -> None:
    assert torch.equal(a.logits(), b.logits())
    for name, tensor in a.state.tensors().items():
        assert torch.equal(b.state.tensors()[name], tensor), name


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("segment", [1, 5, 23, 99])
def test_a_text_read_in_segments_is_the_text(pattern: str, segment: int) -> None:
    model = model_of(pattern)
    session = Session(model)
    parts: list[int] = []
    session.read(TEXT, segment=segment, progress=parts.append)
    assert sum(parts) == 23 and max(parts) <= segment
    with torch.no_grad():
        torch.testing.assert_close(session.logits(), model(TEXT)[:, -1], rtol=0, atol=1e-10)
    assert session.state.tokens_seen.tolist() == [23]


@pytest.mark.parametrize("segment", [2, 3, 99])
def test_padded_texts_read_in_segments_are_the_texts_alone(segment: int) -> None:
    model, tokens = model_of(PATTERNS["full"]), TEXT[:, :21].view(3, 7)
    # A row may have nothing in the first or the last segment.
    mask = torch.tensor([[True] * 7, [False] * 4 + [True] * 3, [True] + [False] * 6])
    session = Session(model, 3)
    session.read(tokens, padding_mask=mask, segment=segment)
    with torch.no_grad():
        alone = torch.cat([model(tokens[i][mask[i]][None])[:, -1] for i in range(3)])
    torch.testing.assert_close(session.logits(), alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_file_goes_on_with_the_same_bits(pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, more = model_of(pattern, dtype=dtype), TEXT[:, :4]
    options: dict[str, Any] = {"sampling": Sampling(1.0)}
    never_saved, saved = Session(model), Session(model)
    torch.manual_seed(5)
    for session in (never_saved, saved):
        session.read(TEXT, segment=10)
        written(session, 5)
    saved.save(tmp_path / "state.bin")
    loaded = Session.load(tmp_path / "state.bin", model)
    same_bits(saved, loaded)
    texts = []
    for session in (never_saved, saved, loaded):
        generator = torch.Generator().manual_seed(9)
        first = written(session, 4, generator=generator, **options)
        session.read(more)
        texts.append(first + written(session, 4, generator=generator, **options))
    assert texts[0] == texts[1] == texts[2]
    same_bits(never_saved, loaded)
    same_bits(saved, loaded)
    assert ModelState.load(tmp_path / "state.bin").tokens_seen.tolist() == [28]


def test_what_was_drawn_is_what_is_gone_on_from() -> None:
    """Stopped anywhere, whether by its end, by a stop token or by the caller."""
    model = model_of(PATTERNS["full"])
    whole = Session(model)
    whole.read(TEXT)
    tokens = written(whole, 9)
    parts = Session(model)
    parts.read(TEXT)
    pieces = written(parts, 2)
    for token in parts.write(99):
        pieces.append(int(token))
        if len(pieces) == 5:
            break
    pieces += written(parts, 99, stop_token=tokens[6])
    assert pieces == tokens[: len(pieces)]
    assert pieces[-1] == tokens[6]
    assert written(parts, 0) == []
    with torch.no_grad():
        text = torch.cat((TEXT, torch.tensor([pieces])), 1)
        torch.testing.assert_close(parts.logits(), model(text)[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_session_may_be_looked_at_and_read_while_it_writes(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "RESERVED_COLUMNS", 3)
    model = model_of(pattern)
    session, text, drawn_at = _read(model), TEXT[0].tolist(), []
    for turn, token in enumerate(session.write(20)):
        drawn_at.append(len(text))
        text.append(int(token))
        if turn % 3 == 0:
            session.save(tmp_path / "state.bin")
        if turn % 4 == 1:
            session.read(TEXT[:, :2])
            text += TEXT[0, :2].tolist()
        if turn % 5 == 2:
            session.logits()
    assert len(drawn_at) == 20
    with torch.no_grad():
        logits = model(torch.tensor([text]))[0]
    torch.testing.assert_close(session.logits()[0], logits[-1], rtol=0, atol=1e-10)
    assert all(text[place] == int(logits[place - 1].argmax()) for place in drawn_at)


def test_writing_holds_on_to_no_graph_and_leaves_the_mode() -> None:
    model = model_of(PATTERNS["window"]).train()
    session = Session(model)
    session.read(TEXT)
    for _ in session.write(2):
        assert torch.is_grad_enabled()
    assert model.training
    assert not session.logits().requires_grad


def test_one_context_is_gone_on_from_many_times() -> None:
    model = model_of(PATTERNS["full"])
    one = Session(model)
    one.read(TEXT)
    many = one.repeated(3)
    questions = torch.tensor([[1, 2], [3, 4], [5, 6]])
    many.read(questions)
    assert written(one, 3) == written(one.repeated(1), 0) + written(_read(model), 3)
    with torch.no_grad():
        for row, question in enumerate(questions):
            alone = model(torch.cat((TEXT, question[None]), 1))[:, -1]
            torch.testing.assert_close(many.logits()[row : row + 1], alone, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="a session of one sequence can be repeated, this one has 3"):
        many.repeated(2)


def _read(model: Any) -> Session:
    session = Session(model)
    session.read(TEXT)
    return session


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, file = model_of(PATTERNS["window"]), tmp_path / "state.bin"
    _read(model).save(file)
    with pytest.raises(ValueError, match=r"state.bin belongs to a model of another configuration: fingerprint \w{16}"):
        Session.load(file, model_of(PATTERNS["full"]))
    with pytest.raises(ValueError, match="with other weights"):
        Session.load(file, model_of(PATTERNS["window"], seed=1))
    with pytest.raises(ValueError, match="with other weights"):
        Session.load(file, model_of(PATTERNS["window"]).float())
    with torch.no_grad():
        model.blocks[1].mixer.out_proj.weight += 1e-9  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="with other weights"):
        Session.load(file, model)
    model.new_state(1).save(tmp_path / "bare.bin")
    with pytest.raises(ValueError, match="bare.bin holds no text state"):
        Session.load(tmp_path / "bare.bin", model)


def test_the_fingerprint_sees_the_ends_of_a_large_parameter() -> None:
    numbers = torch.zeros((1 << 25) + 4, dtype=torch.uint8)
    model: Any = SimpleNamespace(state_dict=lambda: {"w": numbers, "empty": torch.zeros(0), "one": torch.zeros(())})
    prints = [weights_fingerprint(model)]
    for place in (0, -1):
        numbers[place] = 1
        prints.append(weights_fingerprint(model))
    assert len(set(prints)) == 3


def test_no_damage_is_loaded(tmp_path: Path) -> None:
    """Any byte turned, any cut, any bytes more: refused by name, never loaded, never another exception."""
    model, file, bad = model_of(PATTERNS["full"], dtype=torch.float32), tmp_path / "state.bin", tmp_path / "bad.bin"
    _read(model).save(file)
    whole, rng = file.read_bytes(), random.Random(0)
    for turn in range(200):
        damaged = bytearray(whole)
        if turn % 4:
            damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        elif turn % 8:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged += bytes(rng.randrange(1, 100))
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="bad.bin"):
            Session.load(bad, model)
    same_bits(Session.load(file, model), _read(model))


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = model_of(PATTERNS["window"]), tmp_path / "state.bin"
    session = _read(model)
    session.save(file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    written(session, 3)
    with pytest.raises(OSError, match="No space left"):
        session.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.bin"]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    session = Session(model_of(PATTERNS["memories"]))
    for do in (lambda: written(session, 1), lambda: session.save(tmp_path / "a"), session.logits):
        with pytest.raises(ValueError, match="nothing has been read yet"):
            do()
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with at least one prompt of one token"):
        session.read(TEXT[:, :0])
    with pytest.raises(ValueError, match=r"tokens must be in \[0, vocab_size = 11\), got 11"):
        session.read(torch.tensor([[1, 2, 3, 11]]), segment=2)
    assert session.state.tokens_seen.tolist() == [0]
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        session.read(TEXT, segment=0)
    with pytest.raises(ValueError, match="got a row without any"):
        session.read(TEXT, padding_mask=torch.zeros(1, 23, dtype=torch.bool))
    with pytest.raises(ValueError, match="state is of 1 sequences, this call has 2"):
        session.read(TEXT.expand(2, -1))
    assert session.is_new
