"""Kernels of one decoded token of each sequence, to tune them at: the state's update, and the projections before it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import decode, decode_projections
from linear_moe.rules.base import Tokens
from linear_moe.rules.scan import scan
from linear_moe.tuning.scan_work import no_step
from linear_moe.tuning.search import Entry

MEMORIES, PICKED = 5, 3
"""Of a layer whose decoded tokens are projected, the shared memory among them."""


class DecodeWork:
    """One token of each of some slots, every slot with a state of its own."""

    def __init__(
        self, form: Recurrence, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, slots: int,
        heads: int,
    ) -> None:  # fmt: skip
        self.form, self.key_dim, self.value_dim, self.dtype, self.device = form, key_dim, value_dim, dtype, device
        self.tokens, self.heads = slots, heads

    def entries(self) -> list[Entry]:
        """The one kernel's."""
        arguments = (self.form.decay.value, self.form.erase.value, self.key_dim, self.value_dim, self.dtype)
        return [Entry(decode.TABLE, arguments, decode.decode_kernel, {})]

    def run(self) -> None:
        """A token. The states stay as it leaves them."""
        self._step(self._inputs)

    def check(self) -> dict[str, Tensor]:
        """The output and the states."""
        inputs = self._inputs | {"state": self._first_state.clone()}
        return {"output": self._step(inputs), "state": inputs["state"]}

    def exact(self) -> dict[str, Tensor]:
        """The chunked form's, of segments of one token."""
        return self._exact

    @functools.cached_property
    def _inputs(self) -> dict[str, Tensor]:
        make: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        R, H, K, V = self.tokens, self.heads, self.key_dim, self.value_dim
        inputs = {
            "q": torch.randn(R, H, K, **make).to(self.dtype),
            "k": F.normalize(torch.randn(R, H, K, **make), dim=-1).to(self.dtype),
            "v": torch.randn(R, H, V, **make).to(self.dtype),
        }
        shapes = {Decay.HEAD: (H,), Decay.SCALAR: (R, H), Decay.VECTOR: (R, H, K)}
        if self.form.decay is not Decay.NONE:
            inputs["log_decay"] = -0.1 * torch.rand(shapes[self.form.decay], **make)
        if self.form.erase is Erase.DELTA:
            inputs["beta"] = torch.rand(R, H, **make)
        return inputs | {"state": torch.randn(R, H, K, V, **make), "index": torch.arange(R, device=self.device)}

    @functools.cached_property
    def _first_state(self) -> Tensor:
        return self._inputs["state"].clone()

    def _step(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            given: dict[str, Any] = {"log_decay": None, "beta": None, **inputs}
            return decode.decode_step(**given, form=self.form, scale=self.key_dim**-0.5)

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        inputs: dict[str, Any] = {
            name: x.double() for name, x in (self._inputs | {"state": self._first_state}).items() if name != "index"
        }
        state = inputs.pop("state")
        tokens = Tokens(**{name: x if x.dim() == 1 else x[None] for name, x in inputs.items()})
        borders = torch.arange(self.tokens + 1, device=self.device)
        with torch.no_grad():
            result = scan(
                tokens, form=self.form, step=no_step, scale=self.key_dim**-0.5, initial_state=state, cu_seqlens=borders,
                max_length=1, return_final_state=True, impl="chunked",
            )  # fmt: skip
        assert result.final_state is not None
        return {"output": result.output[0], "state": result.final_state}


class ProjectionWork:
    """The projections of decoded tokens in a mixture of memories whose width is that of its heads."""

    def __init__(
        self, most: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, heads: int
    ) -> None:
        self.most, self.dtype, self.device, self.heads = most, dtype, device, heads
        # The smallest entry is mostly for one sequence alone.
        self.tokens = 1 if most == min(decode_projections.LAUNCHES) else most
        self.width = heads * key_dim
        # Keys, values and two gates; queries; the output's gate.
        self.rows = (self.width + heads * (value_dim + 2), self.width, heads * value_dim)

    def entries(self) -> list[Entry]:
        """The one kernel's."""
        arguments = (self.most, self.width, self.dtype)
        return [Entry(decode_projections.TABLE, arguments, decode_projections.project_kernel, {"SIZE": self.width})]

    def run(self) -> None:
        """All projections of the tokens."""
        self.check()

    def check(self) -> dict[str, Tensor]:
        """The three results."""
        made = decode_projections.project_token(*self._inputs)
        return {name: x for name, x in made._asdict().items() if x is not None}

    def exact(self) -> dict[str, Tensor]:
        """By matrix products with every memory."""
        return self._exact

    @functools.cached_property
    def _inputs(self) -> tuple[Tensor, ...]:
        make: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        x = torch.randn(self.tokens, self.width, **make).to(self.dtype)
        shapes = ((MEMORIES, self.rows[0]), (self.rows[1],), (self.rows[2],))
        weights = [torch.randn(*shape, self.width, **make).mul_(self.width**-0.5).to(self.dtype) for shape in shapes]
        memory = torch.rand(self.tokens, MEMORIES, **make).argsort(1)[:, :PICKED].contiguous()
        return x, memory, *weights

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        x, memory, *weights = self._inputs
        of_memories, of_token, gate = (x.double() @ weight.double().mT for weight in weights)
        tokens = torch.arange(self.tokens, device=self.device)[:, None]
        return {"memory": of_memories[memory, tokens].flatten(0, 1), "token": of_token, "gate": gate}
