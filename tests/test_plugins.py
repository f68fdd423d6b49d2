"""Rules that other packages bring by the entry-point group `linear_moe.rules`: a real package, and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parent / "plugins" / "linear_moe_demo_plugin"
BUILT_IN = "{'deltanet', 'gated_deltanet', 'gla', 'linear_attention', 'mamba2', 'retnet'}"


def _install_by_hand(site: Path, *, entry_point: str, module: str, source: str) -> None:
    """What an installer leaves of a package of one module with one entry point."""
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[linear_moe.rules]\n{entry_point}\n")
    (site / f"{module}.py").write_text(source)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder that pip installed the demo plugin into."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps", "--no-build-isolation", "--target", site, PLUGIN]
    subprocess.run(install, check=True, timeout=120)
    return site


def test_an_installed_plugin_is_found_and_trains(run_python: Callable[..., str], installed: Path) -> None:
    """Its rule is a word in YAML; nobody imports it, and no file of linear_moe knows it."""
    output = run_python(
        """
import torch, torch.nn.functional as F
import linear_moe
from linear_moe.models import ModelConfig, build_model

rule = linear_moe.get_rule("demo_leaky_memory")
assert rule.__module__ == "linear_moe_demo_plugin", rule
assert "demo_leaky_memory" in linear_moe.rule_names()

torch.manual_seed(0)
model = build_model(ModelConfig.from_yaml('''
hidden_size: 16
vocab_size: 20
blocks:
  memory:
    mixer: {type: mom, rule: {type: demo_leaky_memory, leak: 0.25}, num_memories: 3, num_heads: 2, head_dim: 8}
    ffn: {type: swiglu, width: 32}
layers: memory
'''))
(_, layer), = model.memory_layers()
assert isinstance(layer, linear_moe.MoMLayer)
assert isinstance(layer.rule, rule)
assert layer.rule.leak == 0.25

tokens = torch.randint(20, (4, 33))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(2):
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    assert layer.memory_weight.grad.abs().sum() > 0
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
print("trained")
""",
        installed,
    )
    assert output.strip() == "trained"


def test_a_bad_option_of_a_plugin_is_told_by_its_own_words(run_python: Callable[..., str], installed: Path) -> None:
    output = run_python(
        """
from linear_moe import MoMLayer
try:
    MoMLayer(16, "demo_leaky_memory", num_heads=2, head_dim=8, rule_options={"leak": 1.5})
except ValueError as error:
    print(error)
""",
        installed,
    )
    assert "leak must be in [0, 1), got 1.5" in output


# Name of the entry point, what the module at its end holds, and what the warning must say of it.
BROKEN = [
    ("demo_import", "import a_package_that_is_not_there", "ModuleNotFoundError"),
    ("demo_attribute", "", "AttributeError"),
    ("demo_number", "Rule = 3", "ValueError"),
    ("demo_class", "class Rule: pass", "ValueError"),
    ("gla", "from linear_moe.rules import RetNet\nclass Rule(RetNet): pass", "is taken by linear_moe.rules.gla.GLA"),
]


def test_a_broken_plugin_is_named_and_passed_over(run_python: Callable[..., str], tmp_path: Path) -> None:
    """One warning each, that names the plugin and what is wrong; the built-in rules stay what they are."""
    for name, source, _ in BROKEN:
        module = f"broken_{name}"
        _install_by_hand(tmp_path / "site", entry_point=f"{name} = {module}:Rule", module=module, source=source)
    output = run_python(
        f"""
import json, warnings
import linear_moe
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert set(linear_moe.rule_names()) == {BUILT_IN}, linear_moe.rule_names()
    linear_moe.rule_names()
assert linear_moe.get_rule("gla") is linear_moe.rules.GLA
assert all(warning.category is RuntimeWarning for warning in caught)
print(json.dumps([str(warning.message) for warning in caught]))
""",
        tmp_path / "site",
    )
    messages = json.loads(output)
    assert len(messages) == len(BROKEN), messages
    for name, _, reason in BROKEN:
        (message,) = (message for message in messages if repr(name) in message.partition("(")[0])
        assert f"broken_{name}:Rule" in message
        assert reason in message


def test_two_plugins_of_one_name_are_told_apart(run_python: Callable[..., str], tmp_path: Path) -> None:
    """The first one found stands, and the warning names the other."""
    source = "from linear_moe.rules import RetNet\nclass Rule(RetNet): pass"
    for module in ("demo_first_plugin", "demo_second_plugin"):
        _install_by_hand(tmp_path / "site", entry_point=f"demo_twin = {module}:Rule", module=module, source=source)
    output = run_python(
        """
import warnings
import linear_moe
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    stands = linear_moe.get_rule("demo_twin")
warning, = caught
print(stands.__module__, "|", warning.message)
""",
        tmp_path / "site",
    )
    stands, _, message = output.partition(" | ")
    assert {"demo_first_plugin", "demo_second_plugin"} == {stands, *message.split("(")[1].split(":")[:1]}
    assert stands in message
