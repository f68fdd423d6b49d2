"""Every snippet of the README and the docs runs as it stands: Python in one namespace a page, commands in one folder a page."""

from __future__ import annotations

import multiprocessing
import re
import shlex
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linear_moe.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=lambda page: page.name)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def _with(language: str) -> list[Path]:
    return [page for page in PAGES if _blocks(page, language)]


_RUN = """
import os, runpy, torch, warnings
os.chdir({folder!r})
torch.set_num_threads(1)
warnings.simplefilter("error")
# A module, so that dataclasses and pickles in a snippet find where they live.
runpy.run_path("snippets.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def imported() -> BaseContext:
    """Processes that have imported torch, which takes longer than most snippets run, and nothing of the library: what a
    snippet needs of it, and what that warns of, is the snippet's own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


@pytest.mark.parametrize("page", _with("python"), ids=lambda page: page.name)
def test_python_snippets_run(page: Path, tmp_path: Path, imported: BaseContext) -> None:
    (tmp_path / "snippets.py").write_text("\n\n".join(_blocks(page, "python")), encoding="utf-8")
    with ProcessPoolExecutor(1, imported) as process:
        process.submit(exec, _RUN.format(folder=str(tmp_path))).result(timeout=300)


@pytest.mark.parametrize("page", _with("console"), ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: half of a short command's time is the import of torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for block in _blocks(page, "console"):
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "linear-moe", f"a console block holds commands of linear-moe only, got {line!r}"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output[-6000:]}"


@pytest.mark.parametrize("page", _with("yaml"), ids=lambda page: page.name)
def test_yaml_snippets_are_models(page: Path) -> None:
    from linear_moe.models import ModelConfig

    for block in _blocks(page, "yaml"):
        assert ModelConfig.from_yaml(block).layer_names()


@pytest.mark.parametrize("page", _with("sh"), ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in _blocks(page, "sh"):
        for line in block.splitlines():
            program, target = shlex.split(line, comments=True)[:2]
            assert program == "make", f"a sh block holds make targets only, got {line!r}"
            assert target in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_custom_rule_is_short() -> None:
    rule = next(block for block in _blocks(ROOT / "docs" / "custom_rules.md", "python") if "@register_rule" in block)
    assert len(rule.strip().splitlines()) < 40
