"""What `linear-moe tune` found on this machine's GPU: a file in the user's cache, read once a process.

A finding holds for one GPU's name and capability, one triton, and one version of the package's launch tables: all four are in
the file, the first three in its name too. This module knows files; which findings are taken is `launch_tables`' business.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linear_moe.whole_files import replace_text

FORMAT = 1
TABLE_VERSION = 1
"""Raised when a kernel changes so that what was measured before says nothing of it."""
SWITCH = "LINEAR_MOE_LAUNCH_TABLES"

Argument = str | int
"""Of a table, as a file has it: a dtype is its name."""


class LaunchFindingsWarning(UserWarning):
    """Findings in the user's cache that are not used."""


class Machine(NamedTuple):
    """For what a finding holds."""

    gpu: str
    capability: tuple[int, int]
    triton: str

    @property
    def file_name(self) -> str:
        """Of its findings."""
        parts = (self.gpu, "sm{}{}".format(*self.capability), f"triton-{self.triton}")
        return "-".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-") for part in parts) + ".json"


class Finding(NamedTuple):
    """Launch parameters that were faster than the frozen ones, and how that was measured."""

    table: str
    arguments: tuple[Argument, ...]
    frozen: dict[str, int]
    """The whole frozen entry that it was measured against."""
    found: dict[str, int]
    """The parameters that differ from it."""
    ms_before: float
    """Of the kernel's launches in one pass, with the frozen entry."""
    ms_after: float
    """The same with what was found."""
    tokens: int
    """Of the pass."""
    heads: int
    """Of the pass."""


def enabled() -> bool:
    """Whether the user wants findings to be used.

    Raises:
        ValueError: if LINEAR_MOE_LAUNCH_TABLES is neither on nor off.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{SWITCH} must be on or off, got {value!r}")
    return value == "on"


def folder() -> Path:
    """Where findings are kept: `$XDG_CACHE_HOME/linear_moe/launch`, under ~/.cache unless that is set."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "linear_moe" / "launch"


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """Of a GPU."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.name, (properties.major, properties.minor), triton.__version__)


def path_of(machine: Machine) -> Path:
    """The file of a machine's findings."""
    return folder() / machine.file_name


def read_findings(machine: Machine) -> list[Finding]:
    """The findings of a machine; none without a file.

    Raises:
        ValueError: naming the file, if it is damaged, or holds findings for something else.
        OSError: if there is a file that can't be read.
    """
    path = path_of(machine)
    try:
        stored, findings = read_file(path)
    except FileNotFoundError:
        return []
    if stored != machine:
        raise ValueError(f"{path} is of another machine: {stored}")
    return findings


def read_file(path: Path) -> tuple[Machine, list[Finding]]:
    """The machine and the findings of a file.

    Raises:
        ValueError: naming the file, if it is damaged, or of another version of the launch tables.
        OSError: if it can't be read.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        version = (content["format"], content["table_version"])
        machine = Machine(str(content["gpu"]), _pair(content["capability"]), str(content["triton"]))
        findings = [_finding(each) for each in content["findings"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    if version != (FORMAT, TABLE_VERSION):
        raise ValueError(f"{path} is of another version of the launch tables, {version[1]}, not {TABLE_VERSION}")
    return machine, findings


def write_findings(machine: Machine, findings: Iterable[Finding]) -> Path:
    """Replace what is stored for a machine; the file is always whole. Returns its path."""
    path = path_of(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "table_version": TABLE_VERSION,
        "gpu": machine.gpu,
        "capability": list(machine.capability),
        "triton": machine.triton,
        "findings": [finding._asdict() for finding in findings],
    }
    replace_text(path, json.dumps(content, indent=1) + "\n")
    return path


def stored_files() -> list[Path]:
    """The files of all machines."""
    return sorted(folder().glob("*.json"))


def _pair(value: Any) -> tuple[int, int]:
    major, minor = value
    return int(major), int(minor)


def _finding(value: Mapping[str, Any]) -> Finding:
    fields = dict(value)
    fields["arguments"] = tuple(fields["arguments"])
    for name in ("frozen", "found"):
        if not all(type(number) is int for number in fields[name].values()):
            raise ValueError(name)
    for name in ("ms_before", "ms_after"):
        fields[name] = float(fields[name])
    return Finding(**fields)
