"""How a function of tensors becomes a torch library operator, and what its arguments are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.compile_ahead import compile_ahead

_LIBRARY = torch.library.Library("linear_moe", "FRAGMENT")
_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What each operator runs on a CPU and on a GPU."""
_PLAIN = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
"""Of a call for which nothing but such a function is left to run."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels take."""


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of annotated arguments the operator `linear_moe::name`, on CPUs (where kernels are interpreted) and GPUs.

    Straight to the dispatcher: the checks that `torch.library.custom_op` wraps around a call took 0.75 ms of each on an H100's
    host with torch 2.11, which is as long as the kernels of a step.

    Args:
        name: of the operator.
        mutates: the arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        made = getattr(torch.ops.linear_moe, name).default
        _FUNCTIONS[made] = function
        return made

    return register


def differentiable(
    operator: Any,
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Any, ...]],
    *,
    ahead: bool = True,
) -> None:
    """Give an operator its gradients, as `torch.library.register_autograd` does, in less of the host's time.

    Of operators whose arguments have no defaults, and where tensors come in lists only as results. Where nothing but autograd
    waits for a call (no trace, no transformation), the operator's function is called straight from here.

    Args:
        operator: what `operator` made.
        keep: takes a context, the arguments and the result, and keeps in the context what the gradients need.
        gradients: takes the context and the results' gradients (of results in a list, a list), and returns one, or None, of
            each argument.
        ahead: whether the kernels of both passes are compiled side by side before the first call that wants gradients. Not
            where the operator's function does that itself.
    """
    function = _FUNCTIONS[operator]
    listed = any(str(result.type) == "List[Tensor]" for result in operator._schema.returns)

    def run(keys: Any, arguments: Sequence[Any], *, learns: bool) -> Any:
        below = keys & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if below.highestPriorityTypeId() in _PLAIN:
                if learns and ahead:
                    device = next(x.device for x in arguments if isinstance(x, Tensor))
                    compile_ahead(device, operator, lambda: both(tuple(arguments)))
                return function(*arguments)
            return operator.redispatch(below, *arguments)

    def both(arguments: tuple[Any, ...]) -> None:
        """Both passes, for what they compile."""
        kept, result = _Kept(arguments), function(*arguments)
        keep(kept, arguments, result)
        made = (result,) if isinstance(result, Tensor) else result
        d_results = [torch.empty_like(x) if x.is_floating_point() else None for x in made]
        gradients(kept, d_results) if listed else gradients(kept, *d_results)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *arguments, keys = given
            result = run(keys, arguments, learns=True)
            keep(ctx, tuple(arguments), result)
            return tuple(result) if listed else result

        @staticmethod
        def backward(ctx: Any, *d_results: Any) -> tuple[Any, ...]:
            return (*(gradients(ctx, list(d_results)) if listed else gradients(ctx, *d_results)), None)

    def call(keys: Any, *arguments: Any) -> Any:
        if not wants_gradients(arguments):
            return run(keys, arguments, learns=False)
        result = Differentiable.apply(*arguments, keys)
        return list(result) if listed else result

    _LIBRARY.impl(operator._schema.name.partition("::")[2], call, "Autograd", with_keyset=True)


def wants_gradients(arguments: Iterable[Any]) -> bool:
    """Whether a backward pass may come of a call."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


class _Kept:
    """Of autograd's context, what is asked of it in passes that only compile."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in arguments)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """All gradients are there."""


def side_by_side(x: Tensor) -> Tensor:
    """With the numbers of a row side by side, as kernels load them; rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None,
    meaning: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless an operator's argument has the `shape`, if one is given, a dtype of `dtypes`, and the device."""
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device {device}, got {tensor.device}")
