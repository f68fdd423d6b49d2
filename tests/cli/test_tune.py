"""`linear-moe tune` as a user types it, on a machine without a GPU, and with one that is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe import tuning
from linear_moe.cli import app, doctor
from linear_moe.kernels import launch_findings, scalar_scan
from linear_moe.kernels.launch_findings import Finding, Machine

MACHINE = Machine("Some GPU", (9, 0), "3.6.0")
FINDING = Finding("scalar_scan", ("head", 64, 64, "bfloat16"), {"chunk": 64}, {"num_warps": 8}, 1.5, 0.25, 32768, 16)


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_findings.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch_findings, "machine_of", lambda device: MACHINE)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "tune needs a GPU that torch can use"),
        (["--rule", "nothing"], "nothing"),
        (["--head-dim", "64,x"], "head-dim must be sizes of 16 to 256, as 64,128 or 128x64 (K x V), got '64,x'"),
        (["--head-dim", "512"], "head-dim must be sizes of 16 to 256"),
        (["--dtype", "float64"], "dtype must be one of bfloat16, float16, float32, got 'float64'"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--all", "--rule", "gla"], "--rule can't be given with --all"),
        (["--show", "--reset"], "--show and --reset can't be given together"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert says in re.sub(r"\s+", " ", result.stderr)


def test_show_and_reset(tmp_path: Path) -> None:
    assert "no findings in" in run("--show").stdout
    path = launch_findings.write_findings(MACHINE, [FINDING])
    (path.parent / "damaged.json").write_text("{")
    shown = run("--show")
    assert shown.exit_code == 0
    assert "damaged.json is damaged" in shown.stderr
    for words in ("Some GPU, sm90, triton 3.6.0", "num_warps 8", "1.5000", "0.2500", str(path)):
        assert words in shown.stdout
    removed = run("--reset")
    assert removed.exit_code == 0
    assert str(path) in removed.stdout
    assert not [*path.parent.iterdir()]
    assert "no findings in" in run("--reset").stdout


@pytest.mark.usefixtures("_gpu")
def test_an_interrupted_search_shows_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []

    def interrupted(works: Any, machine: Machine, timer: Any, watch: Any) -> Iterator[tuning.Outcome]:
        for work in works:
            wanted.append((type(work).__name__, work.tokens, work.heads))
            if len(wanted) == 6:
                raise KeyboardInterrupt
            for entry in work.entries():
                watch(entry, 0)
                found = entry.candidates[0] if entry.table is scalar_scan.TABLE else None
                yield tuning.Outcome(entry, found, 2.0, 1.25 if found else None, {1: "wrong"}, 3)

    monkeypatch.setattr(tuning, "tune", interrupted)
    result = run("--rule", "retnet", "--head-dim", "64,128", "--tokens", "4096")
    assert result.exit_code == 130, result.output
    assert "interrupted; what was found so far is kept" in result.stderr
    for words in ("scalar_scan output head 64 64", "1.2500", "1 of", str(launch_findings.path_of(MACHINE))):
        assert words in result.stdout
    projected = [("ProjectionWork", tokens, 16) for tokens in (1, 32, 64)]
    assert wanted == [("ScanWork", 4096, 16), ("DecodeWork", 192, 16), *projected, ("ScanWork", 4096, 16)]

    def broken(*arguments: Any) -> Iterator[tuning.Outcome]:
        raise tuning.BrokenDeviceError("scalar_scan left the GPU unusable")
        yield

    monkeypatch.setattr(tuning, "tune", broken)
    monkeypatch.setenv(launch_findings.SWITCH, "off")
    result = run("--rule", "retnet")
    assert result.exit_code == 1
    assert "error: scalar_scan left the GPU unusable" in result.stderr
    assert "is stored, but not used" in result.stderr
    assert "nothing was faster" in result.stdout


def test_doctor_says_what_kernels_launch_by() -> None:
    assert "findings are for GPUs" in doctor.describe_launch_tables()


@pytest.mark.usefixtures("_gpu")
def test_doctor_says_whether_findings_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no findings for this GPU" in doctor.describe_launch_tables()
    path = launch_findings.write_findings(MACHINE, [FINDING])
    assert doctor.describe_launch_tables() == f"the frozen tables', but for 1 found on this GPU: {path}"
    monkeypatch.setenv(launch_findings.SWITCH, "off")
    assert "LINEAR_MOE_LAUNCH_TABLES=off" in doctor.describe_launch_tables()
    monkeypatch.delenv(launch_findings.SWITCH)
    path.write_text("{")
    assert f"{path} is damaged" in doctor.describe_launch_tables()
