"""What the files of a checkpoint were when it was written: their lengths and checksums, and the list's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from linear_moe.whole_files import flush

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1
_BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file of `folder` in its manifest, and flush all of them and the folder to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _checksum(path)}
    (folder / MANIFEST_FILE).write_bytes(_encoded({"format": MANIFEST_FORMAT, "files": files}))
    flush(folder / MANIFEST_FILE)
    flush(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a folder by its manifest, naming the file; None if nothing is.

    Every byte counts, the manifest's own included.
    """
    content = _read(folder / MANIFEST_FILE)
    if isinstance(content, str):
        return content
    for name, wanted in content.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size:,} bytes in place of {wanted['bytes']:,}"
            if _checksum(path) != wanted["sha256"]:
                return f"{name} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


def _read(path: Path) -> dict[str, Any] | str:
    """The files that a manifest lists, or what is wrong with it."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} can't be read: {error.strerror}"
    try:
        content = json.loads(raw)
        files: dict[str, Any] = content["files"]
        # Written again from what was understood of it: a byte that meant nothing to the reader counts too.
        if content["format"] == MANIFEST_FORMAT and _encoded({"format": MANIFEST_FORMAT, "files": files}) == raw:
            return files
    except (ValueError, KeyError, TypeError):
        pass
    return f"{path.name} is not what was written (it does not match its own checksum)"


def _encoded(content: dict[str, Any]) -> bytes:
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
