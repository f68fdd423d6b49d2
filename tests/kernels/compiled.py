"""Compile the scans' kernels for a GPU that need not be there, with the Triton that is installed.

    python tests/kernels/compiled.py --head-dims 64 128 256

What the interpreter can't show: that bfloat16 compiles, and fits the shared memory of an H100. Prints a line for each kernel
and set of constants, and needs TRITON_INTERPRET to be unset. Nothing is launched: what kernels would make is anything, so
segments are such that sizes alone say where pieces lie.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from linear_moe import kernels
from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import library, scalar_scan
from linear_moe.kernels.launch import FUSION
from linear_moe.rules.registry import get_rule, rule_names

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on an H100."""
DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
SHAPES = {"whole": (2, 512), "cut": (1, 3000)}
"""Sequences and their tokens: of whole chunks; and with states, so long that it is cut, with a chunk that is not whole."""


class Compiler:
    """In place of `launch_kernel`: compiles what it is given, once, in threads."""

    def __init__(self, threads: int, kernels: list[str] | None = None) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.kernels = kernels
        self.passed_over: set[str] = set()
        self.made: dict[tuple[object, ...], Future[Any]] = {}

    def __call__(self, kernel: Any, grid: int, *arguments: Tensor | int | float | None, **options: Any) -> None:
        if kernel.__name__ in self.passed_over or (self.kernels is not None and kernel.__name__ not in self.kernels):
            return
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, arguments, strict=False)) | options
        constants = {
            name: given[name]
            for name, parameter in zip(names, kernel.params, strict=True)
            # Triton makes constants of null pointers and of ones.
            if parameter.is_constexpr or given[name] is None or (type(given[name]) is int and given[name] == 1)
        }
        signature = {name: "constexpr" if name in constants else self.type_of(given[name]) for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name not in constants and (isinstance(given[name], Tensor) or given[name] % 16 == 0)
        }
        launch = {name: value for name, value in options.items() if name not in names and value is not None} | FUSION
        key = (kernel, *(tuple(x.items()) for x in (signature, places, launch)), tuple(aligned))
        if key not in self.made:
            source = ASTSource(kernel, signature, places, aligned)
            self.made[key] = self.pool.submit(compile, source, target=HOPPER, options=launch)

    @staticmethod
    def type_of(value: Tensor | int | float) -> str:
        if isinstance(value, Tensor):
            return "*" + DTYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def scan(form: Recurrence, batch: int, length: int, dim: int, *, states: bool) -> None:
    """Forward and backward as a layer in bfloat16 does it, and with states forward alone."""
    tokens, heads = batch * length, 2

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    inputs: dict[str, Any] = {name: zeros(tokens, heads, dim, dtype=torch.bfloat16) for name in ("q", "k", "v")}
    decays = {Decay.HEAD: (heads,), Decay.SCALAR: (tokens, heads), Decay.VECTOR: (tokens, heads, dim)}
    inputs["log_decay"] = zeros(*decays[form.decay]) if form.decay in decays else None
    inputs["beta"] = zeros(tokens, heads) if form.erase is Erase.DELTA else None
    inputs["initial_state"] = zeros(batch, heads, dim, dim) if states else None

    def forward() -> tuple[Tensor, Tensor | None]:
        return library.scan(
            **inputs, decay=form.decay, scale=dim**-0.5, cu_seqlens=length * torch.arange(batch + 1), max_length=length,
            dense=True, return_final_state=states,
        )  # fmt: skip

    if states:
        # Without them it leaves parts out.
        with torch.no_grad():
            forward()
    output, final_state = forward()
    loss = output.float().sum() + (0.0 if final_state is None else final_state.sum())
    learned = [x for n, x in inputs.items() if x is not None and not (n == "log_decay" and form.decay is Decay.HEAD)]
    torch.autograd.grad(loss, learned)


def compile_all(
    rules: list[str],
    dims: list[int],
    shapes: list[str],
    threads: int,
    only: list[str] | None = None,
    *,
    once: bool = False,
) -> dict[tuple[object, ...], Future[Any]]:
    """What the scans of these rules would launch, of all kernels or of some.

    `once`: of each kernel for the first rule and width alone that have it.
    """
    # Pieces of these sequences are short for a launch for mild decays.
    scalar_scan.MILD_CHUNKS = 0
    compiler = Compiler(threads, only)
    for module in pkgutil.iter_modules(kernels.__path__):
        imported = importlib.import_module(f"{kernels.__name__}.{module.name}")
        if module.name != "launch" and hasattr(imported, "launch_kernel"):
            imported.launch_kernel = compiler  # type: ignore[attr-defined]
    for form in [get_rule(rule).form for rule in rules]:
        assert form is not None, rules
        for dim in dims:
            for shape in shapes:
                scan(form, *SHAPES[shape], dim, states=shape == "cut")
            if once:
                compiler.passed_over = {kernel.__name__ for kernel, *_ in compiler.made}  # type: ignore[attr-defined]
    compiler.pool.shutdown()
    return compiler.made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="*", default=rule_names(), choices=rule_names())
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--kernels", nargs="*", help="all, if not given")
    parser.add_argument(
        "--once", action="store_true", help="each kernel of the first rule and width alone that have it"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    made = compile_all(
        options.rules, options.head_dims, options.shapes, options.threads, options.kernels, once=options.once
    )
    for (kernel, *_), future in made.items():
        shared = future.result().metadata.shared
        assert shared <= SHARED_MEMORY, f"{kernel.__name__} takes {shared} bytes of shared memory"  # type: ignore[attr-defined]
        print(f"{kernel.__name__}: {shared} bytes of shared memory")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
