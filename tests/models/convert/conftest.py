"""The peer's models, flash-linear-attention's own classes, run on a CPU by Triton's interpreter.

Three things of the peer are replaced, and nothing else:

- the search for the fastest launch, which needs a GPU: the first of its candidates is taken;
- the attention kernel, which is another package's and needs a GPU: torch's own softmax attention;
- `argsort` sorts stably: the peer's MoM sorts tokens by memory and relies on their order inside one, which torch's default
  does not keep.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VOCAB = 23
SMALL: dict[str, dict[str, Any]] = {
    "mom": {"num_heads": 2, "head_dim": 8, "num_memories": 3, "intermediate_size": 48},
    "gated_deltanet": {"num_heads": 2, "head_dim": 8, "expand_v": 1.0, "intermediate_size": 48},
    "gla": {"num_heads": 2, "intermediate_size": 48},
    "retnet": {"num_heads": 2, "expand_v": 1.0, "intermediate_size": 48},
    "mamba2": {"head_dim": 16, "state_size": 8},
    "transformer": {"num_heads": 2, "intermediate_size": 48},
}
CLASSES = {
    "mom": "Mom",
    "gated_deltanet": "GatedDeltaNet",
    "gla": "GLA",
    "retnet": "RetNet",
    "mamba2": "Mamba2",
    "transformer": "Transformer",
}


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What the peer asks of flash-attention: `[B, T, H, K]` queries, the last of the `[B, L, H_kv, K]` keys."""
    assert causal
    copies = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    age = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    mask = (age >= 0) if window_size[0] < 0 else (age >= 0) & (age <= window_size[0])
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


class Peer:
    """Makes and runs the peer's models."""

    def __init__(self) -> None:
        # Imports and constructors of the peer warn of what is not installed and of what is not recommended.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fla.layers.attn
            import fla.models
            from triton.runtime.autotuner import Autotuner
        self._models, self._attention, self._autotuner = fla.models, fla.layers.attn, Autotuner

    @contextlib.contextmanager
    def on_cpu(self) -> Iterator[None]:
        """The replacements above."""

        def first(tuner: Any, *arguments: Any, **keywords: Any) -> Any:
            return tuner.fn.run(*arguments, **keywords, **tuner.configs[0].all_kwargs())

        argsort = Tensor.argsort

        def stable(tensor: Tensor) -> Tensor:
            return argsort(tensor, stable=True)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            patch.setattr(self._autotuner, "run", first)
            patch.setattr(self._attention, "flash_attn_func", _attend)
            patch.setattr(Tensor, "argsort", stable)
            yield

    def config(self, family: str, **options: Any) -> Any:
        """The peer's configuration; without options, as its class makes it."""
        with self.on_cpu():
            return getattr(self._models, f"{CLASSES[family]}Config")(**options)

    def model(self, family: str, **options: Any) -> nn.Module:
        """A small model in which no parameter has a telling start: no ones, no zeros, and gates that open and close."""
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB} | SMALL[family]
        config = self.config(family, **sizes | options)
        with self.on_cpu():
            model: nn.Module = getattr(self._models, f"{CLASSES[family]}ForCausalLM")(config)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model.eval()

    def logits(self, model: Any, tokens: Tensor, prefill: int) -> Tensor:
        """Of the first `prefill` tokens at once, then of one token after another from the peer's cache."""
        with self.on_cpu():
            came = model(tokens[:, :prefill], use_cache=True)
            logits = [came.logits]
            for at in range(prefill, tokens.shape[1]):
                came = model(tokens[:, at : at + 1], use_cache=True, past_key_values=came.past_key_values)
                logits.append(came.logits)
        return torch.cat(logits, 1)

    def mamba2_decoded(self, model: Any, tokens: Tensor) -> Tensor:
        """Every token by the decoding step, from an empty cache.

        Without a GPU the peer's prefill gives head h the group h mod G; its decoding, its kernels and the paper give it
        the group h G / H.
        """
        from fla.models.utils import Cache

        cache = Cache()
        for index, layer in enumerate(model.backbone.layers):
            mixer, rows = layer.mixer, tokens.shape[0]
            state = torch.zeros(rows, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
            conv = torch.zeros(rows, mixer.conv_dim, mixer.conv_kernel_size)
            cache.update(recurrent_state=state, conv_state=conv, layer_idx=index, offset=0)
        logits = []
        with self.on_cpu():
            for token in tokens.split(1, 1):
                came = model(token, use_cache=True, past_key_values=cache)
                cache = came.past_key_values
                logits.append(came.logits)
        return torch.cat(logits, 1)

    def save(self, model: Any, folder: Path, **options: Any) -> Path:
        """A checkpoint of it, as the peer writes one."""
        with self.on_cpu():
            model.save_pretrained(folder, **options)
        return folder


@pytest.fixture(scope="session")
def peer() -> Peer:
    if sys.platform != "linux":
        pytest.skip("flash-linear-attention is installed on Linux only")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the peer's models are run by Triton's interpreter: TRITON_INTERPRET=1")
    return Peer()


@pytest.fixture(scope="session")
def saved(peer: Peer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, for tests of what is done with the files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    return {family: peer.save(peer.model(family), folder / family) for family in SMALL}


@pytest.fixture
def altered() -> Callable[..., Path]:
    """Copies a checkpoint with other options and changed tensors."""
    return _altered


def _altered(
    source: Path,
    target: Path,
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Path:
    """A copy of a checkpoint with other options, ... for removed ones, and changed tensors."""
    shutil.copytree(source, target)
    options = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in options.items() if v is not ...}))
    if change is not None:
        save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors")
    return target
