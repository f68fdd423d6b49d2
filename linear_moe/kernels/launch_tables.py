"""Launch parameters of a kernel: those that `linear-moe tune` found to be faster on this GPU, or the frozen table's.

A kernel module declares a table: its frozen choice, and which parameters may vary, among which values. All others are the
frozen table's, always: whatever decides the sizes of tensors that are kept for a backward pass, what an operator's fake says of
them, and where segments are cut, asks the frozen choice, and a finding has no word in it. So a finding never comes between a
forward pass and its backward pass, or an operator and its fake, not even where one of them ran in another process.

What a program sums, and in which order, may change with a finding, and with it the last bits: within one process a table says
the same thing from its first use on. On a CPU, in the interpreter, findings are never used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from linear_moe.kernels.launch_findings import (
    Argument,
    Finding,
    LaunchFindingsWarning,
    enabled,
    machine_of,
    path_of,
    read_findings,
)

MOST_CANDIDATES = 12
Launch = TypeVar("Launch", bound=NamedTuple)
Choices = Mapping[str, tuple[int, ...]]

_chosen: dict[tuple[object, torch.device, tuple[Any, ...]], Any] = {}
_tried: dict[tuple[str, tuple[Argument, ...]], Any] = {}
_frozen_only = False


class LaunchTable(Generic[Launch]):
    """The launch parameters of one kernel, by the arguments of its frozen table."""

    def __init__(self, name: str, frozen: Callable[..., Launch], choices: Callable[..., Choices]) -> None:
        """Declare a table.

        Args:
            name: of the kernel, in files and on the screen.
            frozen: the entry of some arguments: strings, integers and dtypes.
            choices: of the same arguments, the values that a parameter may take, by its name. Only parameters that change no
                size of anything that outlives a pass.
        """
        self.name, self.frozen, self.choices = name, frozen, choices

    def pick(self, device: torch.device, *arguments: Any) -> Launch:
        """The launch parameters on a device. One look into a dictionary, but for the first time."""
        key = (self, device, arguments)
        launch = _chosen.get(key)
        if launch is None:
            launch = _chosen[key] = self._choose(device, arguments)
        return launch

    def candidates(self, *arguments: Any) -> list[Launch]:
        """What else may be launched, nearest to the frozen entry first: at most `MOST_CANDIDATES`, always the same."""
        frozen = self.frozen(*arguments)
        choices = self.choices(*arguments)
        grid = [
            frozen._replace(**dict(zip(choices, values, strict=True)))
            for values in itertools.product(*choices.values())
        ]
        away = sorted((sum(a != b for a, b in zip(launch, frozen, strict=True)), launch) for launch in grid)
        return [launch for changes, launch in away if changes][:MOST_CANDIDATES]

    def _choose(self, device: torch.device, arguments: tuple[Any, ...]) -> Launch:
        frozen, plain = self.frozen(*arguments), plain_arguments(arguments)
        if (self.name, plain) in _tried:
            return _tried[self.name, plain]
        if _frozen_only or device.type != "cuda":
            return frozen
        finding = _findings_on(device).get((self.name, plain))
        if finding is None:
            return frozen
        choices = self.choices(*arguments)
        if finding.frozen != frozen._asdict() or any(
            value not in choices.get(name, ()) for name, value in finding.found.items()
        ):
            warnings.warn(
                f"{path_of(machine_of(device))}: the finding for {self.name} {plain} is of other launch tables, and not used; "
                "`linear-moe tune` makes a new one",
                LaunchFindingsWarning,
                stacklevel=2,
            )
            return frozen
        return frozen._replace(**finding.found)


def plain_arguments(arguments: tuple[Any, ...]) -> tuple[Argument, ...]:
    """As a file has them."""
    return tuple(str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for x in arguments)


@contextlib.contextmanager
def trying(table: LaunchTable[Any], arguments: tuple[Any, ...], launch: Any) -> Iterator[None]:
    """Inside, in all threads and on every device, a CPU too, `table` says `launch` of these arguments."""
    key = (table.name, plain_arguments(arguments))
    before = dict(_tried)
    _tried[key] = launch
    _chosen.clear()
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
        _chosen.clear()


@contextlib.contextmanager
def frozen_tables() -> Iterator[None]:
    """Inside, in all threads, findings are not used."""
    global _frozen_only
    before, _frozen_only = _frozen_only, True
    _chosen.clear()
    try:
        yield
    finally:
        _frozen_only = before
        _chosen.clear()


def forget_findings() -> None:
    """Read findings anew when they are next asked for."""
    _chosen.clear()
    _findings_on.cache_clear()


def findings_in_use(device: torch.device) -> list[Finding]:
    """What kernels on this device may take: none on a CPU, nor if there are none, they are damaged or switched off."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return []
    return list(_findings_on(device).values())


def describe_tables(device: torch.device) -> str:
    """What the last bits of a run depend on: "frozen", or a fingerprint of the findings in use."""
    findings = sorted(repr((each.table, each.arguments, each.found)) for each in findings_in_use(device))
    if not findings:
        return "frozen"
    digest = hashlib.sha256("".join(findings).encode()).hexdigest()
    return f"{len(findings)} findings ({digest[:8]})"


@functools.cache
def _findings_on(device: torch.device) -> dict[tuple[str, tuple[Argument, ...]], Finding]:
    if not enabled():
        return {}
    try:
        findings = read_findings(machine_of(device))
    except (ValueError, OSError) as error:
        warnings.warn(
            f"launch findings are not used: {error}; `linear-moe tune` writes new ones, `linear-moe tune --reset` removes them",
            LaunchFindingsWarning,
            stacklevel=2,
        )
        return {}
    return {(finding.table, finding.arguments): finding for finding in findings}
