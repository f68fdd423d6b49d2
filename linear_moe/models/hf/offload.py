"""Weights that are kept in host memory or on disk and brought to their device for the layer that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from linear_moe.layers.recurrent_mixer import RecurrentMixer


def bring_mixers_whole(model: nn.Module) -> None:
    """Let the hook of each offloaded mixer bring the weights below it, too.

    accelerate brings a module's own weights when that module is called. A mixer uses the numbers of some parts (its gates'
    parameters, second stages) without calling them.
    """
    for mixer in model.modules():
        hook = _offloading_hook(mixer)
        if isinstance(mixer, RecurrentMixer) and hook is not None:
            from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

            remove_hook_from_submodules(mixer)
            whole = AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=True,
                io_same_device=hook.io_same_device,
                weights_map=hook.weights_map,
                offload_buffers=hook.offload_buffers,
                place_submodules=True,
                skip_keys=hook.skip_keys,
                tied_params_map=hook.tied_params_map,
            )
            add_hook_to_module(mixer, whole)


@contextmanager
def weights_in_place(mixer: nn.Module) -> Iterator[torch.device | None]:
    """The device that `mixer` runs on, its own weights being there for as long; None if nothing of it is offloaded."""
    hook = _offloading_hook(mixer)
    if hook is None:
        below = (_offloading_hook(part) for part in mixer.modules())
        yield next((torch.device(one.execution_device) for one in below if one is not None), None)
        return
    hook.pre_forward(mixer)
    try:
        yield torch.device(hook.execution_device)
    finally:
        hook.post_forward(mixer, None)


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((one for one in hooks if getattr(one, "offload", False)), None)
