"""`linear-moe demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linear_moe.cli.console import make_console
from linear_moe.training.demo import run_demo


def demo(
    output: Annotated[Path, typer.Option(help="Where tables, plots and models go.")] = Path("demo-output"),
    size: Annotated[
        str, typer.Option(help="auto (gpu if there is one, else cpu), quick (a minute, proves nothing), cpu or gpu.")
    ] = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes of the study; one a core unless given.")] = None,
) -> None:
    """Compare one memory, a widened one and a mixture on recall; then train a small hybrid on real text.

    Takes some minutes. Prints a table, a sample and which memory each byte went to, and writes CSV, plots and a checkpoint.

    Example: linear-moe demo --output demo-output
    """
    run_demo(output, make_console(), size=size, workers=workers)
