"""Reading text: the split, and what is refused."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest

from linear_moe.data.text import (
    TextCorpus,
    byte_counts,
    decode_tokens,
    document_tokens,
    read_text,
    standard_library_text,
)


def _folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_file_is_split_at_its_tail_where_a_character_begins(tmp_path: Path) -> None:
    text = "é" * 500
    corpus = read_text(_folder(tmp_path, {"a.odd": text.encode()}) / "a.odd", held_out=0.101)
    assert len(corpus.train) == len(corpus.held_out) == 1
    assert (corpus.train[0] + corpus.held_out[0]).decode() == text
    assert len(corpus.held_out[0].decode()) == 51


def test_a_folder_is_split_by_the_names_of_its_documents(tmp_path: Path) -> None:
    files = {f"part{i % 3}/{i}.txt": f"document {i}".encode() for i in range(60)}
    first = read_text(_folder(tmp_path, files), held_out=0.3)
    assert sorted(first.train + first.held_out) == sorted(files.values())
    assert 5 < len(first.held_out) < 40
    again = read_text(_folder(tmp_path, {"more.md": b"one more"}), held_out=0.3)
    assert set(first.train) <= set(again.train)
    assert set(first.held_out) <= set(again.held_out)


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_both_sides_of_a_split_have_a_document(tmp_path: Path, held_out: float) -> None:
    corpus = read_text(_folder(tmp_path, {"a.txt": b"a", "b.txt": b"b"}), held_out=held_out)
    assert len(corpus.train) == len(corpus.held_out) == 1


def test_hidden_empty_and_unmatched_files_are_passed_over(tmp_path: Path) -> None:
    files = {".hidden.txt": b"1", ".git/a.txt": b"2", "__pycache__/a.txt": b"3", "x.bin": b"\xff", "empty.txt": b""}
    corpus = read_text(_folder(tmp_path, files | {"a.txt": b"seen", "b.py": b"seen too"}))
    assert sorted(corpus.train + corpus.held_out) == [b"seen", b"seen too"]
    only = read_text(tmp_path, patterns=["*.py"])
    assert only.train[0] + only.held_out[0] == b"seen too"


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    _folder(tmp_path, {"empty": b"", "bad.txt": b"fine\xff", "bin/a.bin": b"1", "hollow/a.txt": b"", "one": b"x"})
    with pytest.raises(ValueError, match="empty' is empty"):
        read_text(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"bad\.txt' is no valid UTF-8 text: byte 0xff at offset 4"):
        read_text(tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="offset 4"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="missing' is neither a file nor a folder"):
        read_text(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no file named like text"):
        read_text(tmp_path / "bin")
    with pytest.raises(ValueError, match="has only empty files named like text"):
        read_text(tmp_path / "hollow")
    with pytest.raises(ValueError, match="too small to hold part of it out: 1 bytes"):
        read_text(tmp_path / "one")
    with pytest.raises(ValueError, match=r"held_out must be between 0 and 1, got 1\.5"):
        read_text(tmp_path, held_out=1.5)


def test_the_standard_library_is_found_and_its_tests_are_left_out() -> None:
    corpus = standard_library_text()
    assert corpus.num_train_bytes > 2_000_000
    assert 0.005 < corpus.num_held_out_bytes / corpus.num_train_bytes < 0.2
    assert corpus == standard_library_text()
    assert 4 < corpus.unigram_bits_per_byte() < 6


def test_a_machine_without_sources_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(ValueError, match="no Python sources of the standard library"):
        standard_library_text()


def test_tokens_are_bytes_after_a_document_start() -> None:
    assert document_tokens("é".encode()).tolist() == [256, 0xC3, 0xA9]
    assert decode_tokens([256, 0xC3, 0xA9, 0xC3]) == "é\ufffd"
    assert byte_counts([b"aba", b"", b"b"])[97:99].tolist() == [2, 2]


def test_the_unigram_cost_is_the_entropy_where_the_splits_agree() -> None:
    corpus = TextCorpus("x", (b"ab" * 1_000_000,), (b"ba",))
    assert math.isclose(corpus.unigram_bits_per_byte(), 1.0, abs_tol=1e-3)
