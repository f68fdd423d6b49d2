"""`linear-moe doctor`"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import torch
import typer
from rich.table import Table

from linear_moe.cli.console import make_console
from linear_moe.kernels import launch_findings
from linear_moe.layers.mom import MoMLayer
from linear_moe.rules.registry import get_rule, rule_names
from linear_moe.rules.scan import TRITON_INSTALLED, implementations

LARGEST_ERROR = 1e-9
"""Between two implementations in float64, relative to the largest number."""
LARGEST_GPU_ERROR = 1e-2
"""Of float32 on a GPU against float64: tensor cores may round products to 10 bits."""
PACKAGES = ("torch", "triton", "safetensors", "matplotlib", "hypothesis")


def doctor() -> None:
    """Look at the machine, and run every registered rule in a small mixture of memories, in each way it can be run.

    Example: linear-moe doctor
    """
    console = make_console()
    import linear_moe

    console.print(f"linear_moe {linear_moe.__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(", ".join(f"{name} {_version_of(name)}" for name in PACKAGES))
    console.print(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    console.print(f"GPU: {_describe_gpus()}", soft_wrap=True)
    console.print(f"launch parameters: {describe_launch_tables()}", markup=False, soft_wrap=True)

    table = Table(title="self-check of the rules (float64, forward and gradient)", title_justify="left")
    for column in ("rule", "checked", "largest error", "seconds", "verdict"):
        table.add_column(column)
    failures = 0
    for name in rule_names():
        start = time.perf_counter()
        try:
            what, error = check_rule(name)
            right, shown = error <= LARGEST_ERROR, f"{error:.1e}"
            if torch.cuda.is_available():
                on_gpu = check_rule_on_gpu(name)
                right, shown = right and on_gpu <= LARGEST_GPU_ERROR, f"{shown}, GPU {on_gpu:.1e}"
            verdict = "ok" if right else "WRONG"
        except Exception as problem:
            # A plugin's rule may fail in any way; the others are still to be checked.
            what, verdict, shown = f"{type(problem).__name__}: {problem}", "FAILED", "-"
        failures += verdict != "ok"
        table.add_row(name, what, shown, f"{time.perf_counter() - start:.2f}", verdict)
    console.print(table)
    if failures:
        console.print(f"{failures} of {len(rule_names())} rules failed")
        raise typer.Exit(1)
    console.print("all well")


def describe_launch_tables() -> str:
    """Whether kernels take what `linear-moe tune` found."""
    if not torch.cuda.is_available() or not TRITON_INSTALLED:
        return "the frozen tables' (findings are for GPUs)"
    if not launch_findings.enabled():
        return f"the frozen tables' ({launch_findings.SWITCH}=off)"
    machine = launch_findings.machine_of(torch.device("cuda", torch.cuda.current_device()))
    try:
        count = len(launch_findings.read_findings(machine))
    except (ValueError, OSError) as error:
        return f"the frozen tables' (findings are not used: {error})"
    if not count:
        return "the frozen tables' (no findings for this GPU: `linear-moe tune` searches)"
    return f"the frozen tables', but for {count} found on this GPU: {launch_findings.path_of(machine)}"


def check_rule(name: str) -> tuple[str, float]:
    """What was compared, and the largest relative error of outputs and input gradients.

    Each float64 implementation is held against the token loop; a rule that has only that, whole against in two parts with
    a carried state.
    """
    layer, x = _small_case(name)
    wanted = _outputs(layer, x)
    # Kernels have no float64; they are held to their own budget by the tests.
    others = [impl for impl in implementations(get_rule(name).form) if impl not in ("recurrent", "triton")]
    if not others:
        with torch.no_grad():
            state = layer.new_state(2)
            parts = torch.cat((layer(x[:, :20], state=state), layer(x[:, 20:], state=state)), 1)
        return "two parts = whole", _relative(parts, wanted[0])
    errors = []
    for impl in others:
        layer.impl = impl
        errors += [_relative(a, b) for a, b in zip(_outputs(layer, x), wanted, strict=True)]
    return f"{', '.join(others)} = recurrent", max(errors)


def check_rule_on_gpu(name: str) -> float:
    """The largest relative error of float32 on the first GPU, by whatever runs there, against float64 on the CPU."""
    layer, x = _small_case(name)
    wanted = _outputs(layer, x)
    layer = layer.float().cuda()
    layer.impl = "auto"
    came = _outputs(layer, x.float().cuda())
    return max(_relative(a.double().cpu(), b) for a, b in zip(came, wanted, strict=True))


def _small_case(name: str) -> tuple[MoMLayer, torch.Tensor]:
    """A float64 mixture that runs its rule token by token, and its input."""
    x = torch.randn(2, 37, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = MoMLayer(16, name, num_heads=2, head_dim=8, num_memories=3, top_k=2, impl="recurrent", dtype=torch.float64)
    return layer, x


def _outputs(layer: MoMLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


def _relative(came: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((came - wanted).abs().max() / wanted.abs().max())
    # NaN would pass any comparison.
    return error if error == error else float("inf")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use (everything runs on the CPU)"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in names)
