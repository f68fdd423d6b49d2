"""The documents that models of text are evaluated on."""

from __future__ import annotations

from pathlib import Path

from linear_moe.data.text import read_text, standard_library_text


def evaluation_documents(data: Path | None) -> list[bytes]:
    """All of a file or folder; or what training holds out of the standard library's sources.

    Raises:
        ValueError: as `read_text`.
    """
    if data is None:
        return list(standard_library_text().held_out)
    corpus = read_text(data)
    parts = [*corpus.train, *corpus.held_out]
    # A single file is cut in two for training.
    return [b"".join(parts)] if data.is_file() else parts
