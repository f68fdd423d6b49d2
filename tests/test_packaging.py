"""What a user installs: the wheel's contents, its imports, and its dependencies."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import linear_moe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "linear_moe"

# Absent for a user of the layers alone, or slow to import: nothing that `import linear_moe` may pull in.
OPTIONAL = ["triton", "typer", "rich", "matplotlib", "safetensors", "transformers", "hypothesis", "fla"]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("linear-moe") == linear_moe.__version__


def test_the_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="linear-moe")
    assert callable(command.load())


def test_a_wheel_is_whole(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Installed from its wheel, away from the tree, the package has every file of its own and builds a shipped model."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True, timeout=120)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("linear_moe/")}
        archive.extractall(tmp_path / "site")
    kept = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT).as_posix() for path in kept}
    assert {"linear_moe/py.typed", "linear_moe/configs/schema.json"} <= packed
    assert any(re.fullmatch(r"linear_moe/configs/.*\.yaml", name) for name in packed)
    code = (
        "import linear_moe; from linear_moe.models import build_model, load_config, shipped_configs;"
        "build_model(load_config(shipped_configs()[0]), device='meta'); print(linear_moe.__file__)"
    )
    assert Path(run_python(code, tmp_path / "site").strip()).is_relative_to(tmp_path / "site")


def test_the_import_is_light(run_python: Callable[..., str]) -> None:
    """The layers cost the import of torch and little else."""
    code = f"import sys, torch; had = set(sys.modules); import linear_moe; print(set({OPTIONAL}) & (set(sys.modules) - had))"
    assert run_python(code).strip() == "set()"


def test_layers_and_models_work_without_the_optional_packages(run_python: Callable[..., str]) -> None:
    """As on Windows and macOS, where there is no triton, and without the extras: a step of training, and a model."""
    output = run_python(f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # a None here makes the import fail
import torch, linear_moe
from linear_moe.models import ModelConfig, build_model
for rule in linear_moe.rule_names():
    layer = linear_moe.MoMLayer(16, rule, num_heads=2, head_dim=8)
    layer(torch.randn(2, 20, 16)).sum().backward()
config = ModelConfig.from_yaml('''
hidden_size: 16
vocab_size: 20
blocks: {{memory: {{mixer: {{type: mom, rule: {{type: gla}}, num_heads: 2, head_dim: 8}}, ffn: {{type: swiglu, width: 16}}}}}}
layers: memory
''')
print(tuple(build_model(config)(torch.randint(20, (2, 7))).shape))
""")
    assert output.strip() == "(2, 7, 20)"


def test_what_is_imported_is_declared() -> None:
    """Each third-party module that the package imports, at the top of a file or inside a function, is asked for."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    third_party = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"linear_moe"}
    providers = importlib.metadata.packages_distributions()
    # pydantic_core is pydantic's other half, and pinned by it.
    needed = {providers[module][0].lower() for module in third_party - {"pydantic_core"}}
    declared = importlib.metadata.requires("linear-moe") or []
    declared = [requirement for requirement in declared if "extra == 'dev'" not in requirement.replace('"', "'")]
    assert needed <= {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in declared}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="some constraints bind from Python 3.11 on")
def test_the_constraints_are_what_is_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    written = dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line)
    # torch's builds differ in what follows the plus sign: the CUDA version, or cpu.
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in written}
    assert found == written
