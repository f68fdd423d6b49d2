"""The documents that models of text are evaluated on."""

from __future__ import annotations

from pathlib import Path

from linear_moe.data.text import read_text, standard_library_text


def evaluation_documents(data: Path | None) -> tuple[str, list[bytes]]:
    """A name and the documents: all of a file or folder; or what training holds out of the standard library's sources.

    Raises:
        ValueError: as `read_text`.
    """
    if data is None:
        corpus = standard_library_text()
        return f"held out of {corpus.source}", list(corpus.held_out)
    corpus = read_text(data)
    if data.is_file():
        return corpus.source, [b"".join((*corpus.train, *corpus.held_out))]
    return corpus.source, [*corpus.train, *corpus.held_out]
