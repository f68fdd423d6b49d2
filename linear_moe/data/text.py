"""Text as bytes: reading it, and splitting it into documents to learn from and documents held out."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linear_moe.data.rows import ROW_PATTERNS, TEXT_KEY, has_rows, read_rows

DOCUMENT_START = 256
"""The token before a document's first byte."""
VOCAB_SIZE = 257
"""Bytes 0 to 255 and the document start."""

_PROSE = ("txt", "text", "md", "rst", "tex", "org", "html", "csv", "json", "yaml", "yml", "toml")
_CODE = ("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "rs", "go", "java", "js", "ts", "sh")
TEXT_PATTERNS = (*(f"*.{ending}" for ending in _PROSE + _CODE), *ROW_PATTERNS)
"""Names of the files of a folder that are read unless patterns are given."""

_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
# Tests of the standard library hold files that are broken on purpose; installed packages are not the standard library.
_SKIPPED_IN_STDLIB = _SKIPPED_FOLDERS | {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip"}


@dataclass(frozen=True)
class TextCorpus:
    """Documents to learn from and documents held out, as bytes.

    A document's place in the split depends on its name alone, so that adding a file moves no other one across. A single
    file is split in two: its tail is held out.
    """

    source: str
    """What the user named."""
    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]

    @property
    def num_train_bytes(self) -> int:
        """Bytes to learn from."""
        return sum(map(len, self.train))

    @property
    def num_held_out_bytes(self) -> int:
        """Bytes held out."""
        return sum(map(len, self.held_out))

    def unigram_bits_per_byte(self) -> float:
        """What the held-out bytes cost under the byte frequencies of the training split (one added to each count)."""
        counts = byte_counts(self.train).double() + 1
        held_out = byte_counts(self.held_out).double()
        nats = -(held_out * (counts / counts.sum()).log()).sum() / held_out.sum()
        return float(nats) / math.log(2)


def read_text(
    path: str | Path,
    *,
    patterns: Sequence[str] = TEXT_PATTERNS,
    held_out: float = 0.05,
    text_key: str | None = None,
) -> TextCorpus:
    """Read a file, or every file of a folder whose name matches one of `patterns`.

    A file is a document; of JSON lines (`*.jsonl`) and Parquet (`*.parquet`) every row is.

    Args:
        path: a text file of any name, or a folder, searched with its subfolders. Hidden files and empty files of a folder
            are passed over.
        patterns: shell patterns of file names, for a folder.
        held_out: fraction of the documents (of a single document: of its bytes) that is not learned from.
        text_key: under which a row has its text; "text" unless given.

    Raises:
        ValueError: if nothing is there, a file is empty or no valid UTF-8, a row has no text, or a folder has none.
        MissingExtraError: if Parquet is to be read and `pyarrow` is not installed.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    root = Path(path)
    if root.is_file():
        if has_rows(root):
            documents = _documents_of(root, root.name, text_key)
            if not documents:
                raise ValueError(f"the file {str(path)!r} has no row with text")
            return _split_documents(str(path), documents, held_out)
        _refuse_text_key(text_key, str(path))
        return _split_file(str(path), _read_utf8(root), held_out)
    if not root.is_dir():
        raise ValueError(f"text path {str(path)!r} is neither a file nor a folder")
    names = [n for n in _files_below(root, _SKIPPED_FOLDERS) if any(fnmatch.fnmatch(Path(n).name, p) for p in patterns)]
    if not any(map(has_rows, names)):
        _refuse_text_key(text_key, str(path))
    documents = {}
    for name in names:
        documents.update(_documents_of(root / name, name, text_key))
    if not documents:
        which = "only empty files" if names else "no file"
        raise ValueError(f"the folder {str(path)!r} has {which} named like text ({', '.join(patterns)})")
    return _split_documents(str(path), documents, held_out)


def standard_library_text(*, held_out: float = 0.05) -> TextCorpus:
    """The Python sources of the running interpreter's standard library, without its tests.

    Raises:
        ValueError: if they are not installed as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name in _files_below(root, _SKIPPED_IN_STDLIB) if name.endswith(".py")] if root.is_dir() else []
    documents = {}
    for name in names:
        content = (root / name).read_bytes()
        # A few sources declare another encoding; nobody asked for these files, so they are left out, not refused.
        if content and _first_undecodable(content) is None:
            documents[name] = content
    if not documents:
        raise ValueError(f"no Python sources of the standard library in {str(root)!r}; name a text file or folder")
    return _split_documents("the Python standard library", documents, held_out)


def byte_counts(documents: Iterable[bytes]) -> Tensor:
    """`[256]` int64: how often each byte occurs."""
    counts = torch.zeros(256, dtype=torch.int64)
    for document in filter(None, documents):
        counts += torch.frombuffer(bytearray(document), dtype=torch.uint8).bincount(minlength=256)
    return counts


def document_tokens(document: bytes) -> Tensor:
    """`[bytes + 1]` int16: the document start, then the bytes."""
    tokens = torch.empty(len(document) + 1, dtype=torch.int16)
    tokens[0] = DOCUMENT_START
    if document:
        tokens[1:] = torch.frombuffer(bytearray(document), dtype=torch.uint8)
    return tokens


def decode_tokens(tokens: Iterable[int]) -> str:
    """Bytes as text; what is no valid UTF-8 becomes the replacement character, document starts nothing."""
    return bytes(token for token in tokens if 0 <= token < DOCUMENT_START).decode("utf-8", errors="replace")


def printable(text: str) -> str:
    """`text` with control characters replaced: what an untrained model writes may otherwise drive the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def _documents_of(path: Path, name: str, text_key: str | None) -> dict[str, bytes]:
    """The documents of a file of a folder, by names that say where they stand; none if it is empty."""
    if has_rows(path):
        return {f"{name}:{number}": text for number, text in read_rows(path, text_key or TEXT_KEY)}
    content = _read_utf8(path, may_be_empty=True)
    return {name: content} if content else {}


def _refuse_text_key(text_key: str | None, path: str) -> None:
    if text_key is not None:
        raise ValueError(f"text_key would be ignored: {path!r} has no rows (of *.jsonl or *.parquet)")


def _split_documents(source: str, documents: dict[str, bytes], held_out: float) -> TextCorpus:
    if len(documents) == 1:
        return _split_file(source, next(iter(documents.values())), held_out)
    places = {name: _place(name) for name in documents}
    kept = {name for name, place in places.items() if place >= held_out}
    # Few documents may all fall on one side.
    if len(kept) == len(documents):
        kept.remove(min(places, key=places.__getitem__))
    if not kept:
        kept.add(max(places, key=places.__getitem__))
    return TextCorpus(
        source,
        train=tuple(content for name, content in documents.items() if name in kept),
        held_out=tuple(content for name, content in documents.items() if name not in kept),
    )


def _split_file(source: str, content: bytes, held_out: float) -> TextCorpus:
    """The tail of a single document is held out, cut where a character begins."""
    border = len(content) - max(round(len(content) * held_out), 1)
    while 0 < border < len(content) and content[border] & 0xC0 == 0x80:
        border -= 1
    if not border:
        raise ValueError(f"{source!r} is too small to hold part of it out: {len(content)} bytes")
    return TextCorpus(source, (content[:border],), (content[border:],))


def _place(name: str) -> float:
    """A number in [0, 1) that depends on a document's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _files_below(root: Path, skipped: frozenset[str] | set[str]) -> list[str]:
    """Relative names of the regular, visible files, with forward slashes, sorted: the same on every machine."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def _read_utf8(path: Path, may_be_empty: bool = False) -> bytes:
    content = path.read_bytes()
    if not content and not may_be_empty:
        raise ValueError(f"the text file {str(path)!r} is empty")
    offset = _first_undecodable(content)
    if offset is not None:
        raise ValueError(
            f"{str(path)!r} is no valid UTF-8 text: byte {content[offset]:#04x} at offset {offset}. Convert it, or leave it out"
        )
    return content


def _first_undecodable(content: bytes) -> int | None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None
