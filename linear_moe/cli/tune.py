"""`linear-moe tune`"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from linear_moe.cli.console import make_console, make_progress
from linear_moe.cli.errors import INTERRUPTED, tell
from linear_moe.forms import Recurrence
from linear_moe.kernels import launch_findings
from linear_moe.rules.registry import get_rule, rule_names
from linear_moe.rules.scan import LARGEST_KERNEL_DIM, TRITON_INSTALLED, implementations

if TYPE_CHECKING:
    from linear_moe.tuning import Outcome

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
USUAL_DIMS = "64,128,256"
WIDTH = 2048
"""Of all heads together, unless their number is given."""
MOST_HEADS = 16


def tune(
    rule: Annotated[
        list[str] | None, typer.Option(help="Whose kernels; may be given several times.  [default: every rule's]")
    ] = None,
    head_dim: Annotated[
        str | None, typer.Option(help="K and V, as 64,128 or, where they differ, 128x64.  [default: 128]")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of q, k and v: {', '.join(DTYPES)}.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Of the pass that is timed, in sequences of up to 4096.")] = 32768,
    heads: Annotated[
        int | None, typer.Option(help="Of the same.  [default: as many as 2048 channels hold, at most 16]")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Every rule at the head dims {USUAL_DIMS}.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Remove all stored findings, and do nothing else.")] = False,
    show: Annotated[bool, typer.Option("--show", help="List the stored findings, and do nothing else.")] = False,
) -> None:
    """Search for launch parameters of the kernels that are faster on this GPU, and store them in the user's cache.

    Each candidate must give right numbers, and take 3% less time than what the package ships. Kernels take what was found from
    the next process on; LINEAR_MOE_LAUNCH_TABLES=off makes them ignore it. Ctrl-C keeps what was found so far.

    Example: linear-moe tune --rule gated_deltanet --head-dim 128,256
    """
    console = make_console()
    if show or reset:
        if show and reset:
            raise ValueError("--show and --reset can't be given together")
        _show(console) if show else _reset(console)
        return
    if every:
        for name, given in (("--rule", rule), ("--head-dim", head_dim)):
            if given is not None:
                raise ValueError(f"{name} can't be given with --all, which is every rule at {USUAL_DIMS}")
        head_dim = USUAL_DIMS
    forms = _forms(rule)
    dims = _dims(head_dim or "128")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("tokens", tokens), ("heads", heads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not torch.cuda.is_available() or not TRITON_INSTALLED:
        raise ValueError(
            "tune needs a GPU that torch can use, and triton; on a CPU kernels are interpreted, not launched"
        )
    if not launch_findings.enabled():
        tell(f"{launch_findings.SWITCH}=off: what is found is stored, but not used", kind="note")
    _tune(console, forms, dims, DTYPES[dtype], tokens, heads)


def _tune(
    console: Console, forms: list[Recurrence], dims: list[tuple[int, int]], dtype: torch.dtype, tokens: int,
    heads: int | None,
) -> None:  # fmt: skip
    # What imports triton is imported where there is one.
    from linear_moe import tuning
    from linear_moe.tuning.timing import time_in_turns
    from linear_moe.tuning.works import works_of

    device = torch.device("cuda", torch.cuda.current_device())
    machine = launch_findings.machine_of(device)
    works = (
        work
        for form in forms
        for K, V in dims
        for work in works_of(form, K, V, dtype, device, tokens=tokens, heads=heads or _heads(max(K, V)))
    )
    outcomes: list[tuning.Outcome] = []
    problem: str | None = None
    interrupted = False
    with make_progress() as progress:
        bar = progress.add_task("")

        def watch(entry: tuning.Entry, done: int) -> None:
            progress.update(bar, description=str(entry), total=len(entry.candidates), completed=done)

        try:
            for outcome in tuning.tune(works, machine, lambda passes: time_in_turns(passes, device), watch):
                outcomes.append(outcome)
        except KeyboardInterrupt:
            interrupted = True
        except tuning.BrokenDeviceError as error:
            problem = str(error)
        except torch.OutOfMemoryError:
            problem = "the GPU's memory holds no such pass: give fewer --tokens, or fewer --heads"
    print_outcomes(console, outcomes)
    found = any(outcome.found is not None for outcome in outcomes)
    console.print(
        f"findings: {launch_findings.path_of(machine)}" if found else "nothing was faster",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if problem is not None:
        tell(problem)
        raise typer.Exit(1)
    if interrupted:
        tell("interrupted; what was found so far is kept", kind="note")
        raise typer.Exit(INTERRUPTED)


def print_outcomes(console: Console, outcomes: Iterable[Outcome]) -> None:
    """The table of what was tried."""
    table = _table("launch parameters", *_TIMES, "dropped")
    for outcome in outcomes:
        frozen = outcome.entry.frozen._asdict()
        found = {} if outcome.found is None else outcome.found._asdict()
        table.add_row(
            str(outcome.entry),
            _in_words(frozen),
            _in_words({name: value for name, value in found.items() if value != frozen[name]}) or "-",
            _milliseconds(outcome.ms_before),
            _milliseconds(outcome.ms_after),
            f"{len(outcome.dropped)} of {len(outcome.entry.candidates)}",
        )
    console.print(table)


def _heads(width: int) -> int:
    return max(min(WIDTH // width, MOST_HEADS), 1)


def _forms(names: list[str] | None) -> list[Recurrence]:
    """The forms of the rules, each once.

    Raises:
        ValueError: if a named rule is unknown or has no kernels.
    """
    forms: dict[Recurrence, None] = {}
    for name in names or rule_names():
        form = get_rule(name).form
        if form is not None and "triton" in implementations(form):
            forms[form] = None
        elif names:
            raise ValueError(f"rule {name!r} has no kernels to tune: it runs as {', '.join(implementations(form))}")
    return list(forms)


def _dims(text: str) -> list[tuple[int, int]]:
    """K and V of `64,128x64`.

    Raises:
        ValueError: if that is not what it says.
    """
    wanted: dict[tuple[int, int], None] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("x")
        sizes = [int(x) if x.isdecimal() else 0 for x in (key, value or key)]
        if not all(16 <= size <= LARGEST_KERNEL_DIM for size in sizes):
            raise ValueError(
                f"head-dim must be sizes of 16 to {LARGEST_KERNEL_DIM}, as 64,128 or 128x64 (K x V), got {text!r}"
            )
        wanted[sizes[0], sizes[1]] = None
    return list(wanted)


def _show(console: Console) -> None:
    files = launch_findings.stored_files()
    for path in files:
        try:
            machine, findings = launch_findings.read_file(path)
        except (ValueError, OSError) as error:
            tell(f"not used: {error}", kind="note")
            continue
        table = _table(
            f"{machine.gpu}, sm{machine.capability[0]}{machine.capability[1]}, triton {machine.triton}",
            *_TIMES,
            "measured at",
        )
        for finding in findings:
            table.add_row(
                " ".join((finding.table, *map(str, finding.arguments))),
                _in_words(finding.frozen),
                _in_words(finding.found),
                _milliseconds(finding.ms_before),
                _milliseconds(finding.ms_after),
                f"{finding.tokens} tokens, {finding.heads} heads",
            )
        console.print(table)
        console.print(str(path), markup=False, soft_wrap=True)
    if not files:
        console.print(f"no findings in {launch_findings.folder()}", markup=False, soft_wrap=True)


def _reset(console: Console) -> None:
    files = launch_findings.stored_files()
    for path in files:
        path.unlink(missing_ok=True)
        console.print(f"removed {path}", markup=False, soft_wrap=True)
    if not files:
        console.print(f"no findings in {launch_findings.folder()}", markup=False, soft_wrap=True)


_TIMES = ("ms before", "ms after")


def _table(title: str, *last: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "frozen", "found", *last):
        table.add_column(column, overflow="fold")
    return table


def _in_words(parameters: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
