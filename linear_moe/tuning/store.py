"""Outcomes become findings."""

from __future__ import annotations

from pathlib import Path

from linear_moe.kernels.launch_findings import Finding, Machine, read_findings, write_findings
from linear_moe.kernels.launch_tables import forget_findings, plain_arguments
from linear_moe.tuning.search import Outcome, Work


def store_outcome(machine: Machine, work: Work, outcome: Outcome) -> Path | None:
    """Put an outcome in the file of a machine's findings, in the place of an earlier one for the same entry.

    A frozen entry that remains the fastest takes an earlier finding away. A damaged file is replaced.

    Returns:
        The file, or None if nothing was to be changed.
    """
    try:
        stored = read_findings(machine)
    except ValueError:
        stored = []
    entry = outcome.entry
    key = (entry.table.name, plain_arguments(entry.arguments))
    kept = [finding for finding in stored if (finding.table, finding.arguments) != key]
    if outcome.found is not None:
        assert outcome.ms_before is not None and outcome.ms_after is not None
        frozen, found = entry.frozen._asdict(), outcome.found._asdict()
        kept.append(
            Finding(
                *key,
                frozen=frozen,
                found={name: value for name, value in found.items() if value != frozen[name]},
                ms_before=outcome.ms_before,
                ms_after=outcome.ms_after,
                tokens=work.tokens,
                heads=work.heads,
            )
        )
    if kept == stored:
        return None
    path = write_findings(machine, sorted(kept, key=lambda finding: (finding.table, [*map(str, finding.arguments)])))
    forget_findings()
    return path
