"""A forward and backward pass of a form's scan, and a forward pass alone, to tune its kernels at."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.kernels import (
    delta_forward,
    delta_walks,
    gated_deltanet,
    gla,
    gla_walks,
    library,
    parallel_scan,
    piece_gradients,
    piece_reads,
    scalar_scan,
    scalar_walks,
    turned_scan,
    wide_scan,
)
from linear_moe.kernels.blocks import DECAY_KINDS
from linear_moe.rules.base import Tokens
from linear_moe.rules.scan import scan
from linear_moe.tuning.search import Entry

SEQUENCE = 4096
"""Tokens of a sequence of the timed scan."""
CHECKED = (2048, 0, 500, 70, 1)
"""Lengths of the segments that results are checked on: long ones that are split, none, and less than a chunk; then 5 tokens in
none."""

FULL = (256, 256)
"""Lengths that are whole chunks and stored pieces, whose kernels have no masks, and long enough for all of them: checked too
where those are timed."""

DELTA_GRADIENTS = {"writes": piece_gradients.delta_writes_kernel, "reads": piece_gradients.delta_reads_kernel}


class ScanWork:
    """A forward and a backward pass over whole sequences, and where another kernel makes it a forward pass without gradients;
    checked on ragged segments, with initial and final states.
    """

    def __init__(
        self, form: Recurrence, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, tokens: int,
        heads: int, checked: tuple[int, ...] = CHECKED,
    ) -> None:  # fmt: skip
        self.form, self.key_dim, self.value_dim, self.dtype, self.device = form, key_dim, value_dim, dtype, device
        self.tokens, self.heads, self.checked = tokens, heads, checked

    def entries(self) -> list[Entry]:
        """Of the kernels that scan this form."""
        K, V = self.key_dim, self.value_dim
        decay, wide = self.form.decay.value, piece_reads.takes(K, V, self.dtype)
        sizes = {"K": K, "V": V}
        if self.form.erase is Erase.DELTA:
            values = "values in full" if self._in_full else "values"
            walks: dict[str, Any] = {values: delta_walks.values_kernel}
            if not wide:
                walks["gradients"] = delta_walks.gradients_kernel
            # Of wide heads a walk of the other kernel leaves what a backward pass needs, and reads.
            together = self._delta_takes(keep=True)
            if not together:
                walks["forward"] = delta_walks.forward_kernel
            plain, weighted = ({"K": K, "WEIGHTED": folded} for folded in (False, True))
            alone = [
                Entry(delta_forward.SOLVE_TABLE, (decay, K, self.dtype), delta_walks.solve_kernel, weighted),
                Entry(delta_forward.TABLE, (decay, K, V, self.dtype), delta_forward.delta_forward_kernel, sizes),
            ]
            return [
                Entry(gated_deltanet.SOLVE_TABLE, (decay, K, self.dtype), delta_walks.solve_kernel, plain),
                *(
                    Entry(gated_deltanet.TABLE, (name, decay, K, V, self.dtype), kernel, sizes)
                    for name, kernel in walks.items()
                ),
                *(self._reads("weighted", DELTA_GRADIENTS, in_the_walk=together) if wide else ()),
                *(alone if self._delta_takes(keep=False) else ()),
            ]
        if self.form.decay is Decay.VECTOR:
            kernels = {
                "prepare": (gla_walks.prepare_kernel, {"K": K}),
                "walk": (gla_walks.walk_kernel, {**sizes, "STORES": False}),
                "states": (gla_walks.walk_kernel, {**sizes, "STORES": True}),
                "gradients": (gla_walks.gradients_kernel, sizes),
            }
            return [Entry(gla.TABLE, (name, K, V, self.dtype), *launched) for name, launched in kernels.items()]
        if wide:
            states = Entry(parallel_scan.TABLE, (decay, K, V, self.dtype), parallel_scan.states_kernel, sizes)
            whole = Entry(wide_scan.TABLE, (decay, K, V, self.dtype), turned_scan.turned_scan_kernel, sizes)
            return [states, *self._reads("plain", {"scan": piece_gradients.scan_gradients_kernel}), whole]
        together = scalar_scan.writes_together(K, V, self.dtype)
        with_decay = self.form.decay is Decay.SCALAR
        # Whether an overlap is made, whether back in time, and what is walked as keys and values: of o, of dq, and of dk and dv
        # where no other kernel makes them.
        ways = [(False, False, K, V), (with_decay, False, V, K)]
        if not together:
            ways += [(False, True, V, K), (with_decay, True, K, V)]
        turned = scalar_scan.turns(DECAY_KINDS[self.form.decay], K, V, self.dtype)
        scans = []
        for overlap, reverse, keys, columns in dict.fromkeys(ways):
            name = scalar_scan.walk_name(overlap=overlap, reverse=reverse, turned=turned)
            walked: dict[str, Any] = {"K": keys, "V": columns, "REVERSE": reverse}
            if turned and not overlap:
                kernel: Any = turned_scan.turned_scan_kernel
            else:
                kernel = scalar_walks.scan_kernel
                walked["OTHER_HEADS"] = self.heads if overlap else 0
            scans.append(Entry(scalar_scan.TABLE, (name, decay, keys, columns, self.dtype), kernel, walked))
        if not together:
            return scans
        # Which are launched is seen when pieces are cut: long ones or short. The timed decays are mild: beside a launch for
        # them the other's programs end where they begin.
        kind = DECAY_KINDS[self.form.decay]
        there = {mild for piece in (math.inf, 0) for mild in scalar_scan.writes_ways(kind, self.dtype, piece)}
        kinds = {"mild": {"MILD": True}, "any": {"MILD": False, "ALONE": True}}
        writes = [
            Entry(
                scalar_scan.WRITES_TABLE, (name, decay, K, V, self.dtype), scalar_walks.writes_kernel, {**sizes, **only}
            )
            for name, only in kinds.items()
            if only["MILD"] in there
        ]
        return [*scans, *writes]

    def _reads(self, weighted: str, gradients: dict[str, Any], *, in_the_walk: bool = False) -> list[Entry]:
        """Of what reads from stored states: the output, unless the walk reads it, and the gradients."""
        decay, K, V = self.form.decay.value, self.key_dim, self.value_dim
        sizes = {"K": K, "V": V}
        output = Entry(piece_reads.TABLE, (decay, weighted, K, V, self.dtype), piece_reads.reads_kernel, sizes)
        return [
            *(() if in_the_walk else (output,)),
            *(
                Entry(piece_gradients.TABLE, (name, decay, K, V, self.dtype), kernel, sizes)
                for name, kernel in gradients.items()
            ),
        ]

    def run(self) -> None:
        """Forward and backward, without states."""
        dense = self.tokens % self._length == 0
        for learns in self._passes:
            self._kernels(self._timed, self._length, states=False, dense=dense, learns=learns)

    def check(self) -> dict[str, Tensor]:
        """The output, the final state, and the gradient of every input."""
        made: dict[str, Tensor] = {}
        for learns in self._passes:
            each = self._kernels(self._ragged, max(self.checked), states=True, dense=False, learns=learns)
            if self._in_full:
                full = self._kernels(self._full, max(FULL), states=True, dense=True, learns=learns)
                each |= {f"{name}, in full": x for name, x in full.items()}
            made |= each if learns else {f"{name}, alone": x for name, x in each.items()}
        return made

    def exact(self) -> dict[str, Tensor]:
        """The chunked form's."""
        return self._exact

    @property
    def _passes(self) -> tuple[bool, ...]:
        """Whether gradients are wanted, of the passes that kernels of their own make."""
        scans = self.form.erase is Erase.NONE and self.form.decay is not Decay.VECTOR
        wide = scans and piece_reads.takes(self.key_dim, self.value_dim, self.dtype)
        return (True, False) if wide or self._delta_takes(keep=False) else (True,)

    def _delta_takes(self, *, keep: bool) -> bool:
        """Whether it is the delta rule, and has a forward walk of its own where gradients are wanted (`keep`), or none are."""
        k, v = (
            torch.empty(1, 1, width, dtype=self.dtype, device=self.device) for width in (self.key_dim, self.value_dim)
        )
        return self.form.erase is Erase.DELTA and delta_forward.takes(k, k, v, keep)

    @property
    def _length(self) -> int:
        return min(SEQUENCE, self.tokens)

    @property
    def _in_full(self) -> bool:
        """Whether the timed sequences are whole chunks and stored pieces."""
        return self.tokens % self._length == 0 and self._length % FULL[0] == 0

    @functools.cached_property
    def _timed(self) -> dict[str, Tensor]:
        return self._draw([self._length] * (self.tokens // self._length), spare=self.tokens % self._length)

    @functools.cached_property
    def _full(self) -> dict[str, Tensor]:
        return self._draw(list(FULL), spare=0)

    @functools.cached_property
    def _ragged(self) -> dict[str, Tensor]:
        return self._draw(list(self.checked), spare=5)

    def _draw(self, lengths: list[int], spare: int) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        make: dict[str, Any] = {"generator": generator, "device": self.device}
        S, H, decay = sum(lengths) + spare, self.heads, self.form.decay
        inputs = {
            name: torch.randn(S, H, width, **make)
            for name, width in (("q", self.key_dim), ("k", self.key_dim), ("v", self.value_dim))
        }
        if decay is Decay.HEAD:
            inputs["log_decay"] = -0.1 * torch.rand(H, **make)
        elif decay is not Decay.NONE:
            # Every other segment fades within a few tokens: kernels may take another way there.
            rates = torch.full((S,), 0.02)
            for begin, end in list(itertools.pairwise([0, *itertools.accumulate(lengths)]))[2::2]:
                rates[begin:end] = 4.0
            channels = (self.key_dim,) if decay is Decay.VECTOR else ()
            drawn = torch.rand(S, H, *channels, **make)
            inputs["log_decay"] = -drawn * rates.to(self.device).view(S, *[1] * (drawn.dim() - 1))
        if self.form.erase is Erase.DELTA:
            inputs["k"] = F.normalize(inputs["k"], dim=-1)
            inputs["beta"] = torch.rand(S, H, **make)
        inputs = {name: x.to(self.dtype) if name in "qkv" else x for name, x in inputs.items()}
        inputs["initial_state"] = torch.randn(len(lengths), H, self.key_dim, self.value_dim, **make)
        inputs["d_output"] = torch.randn(inputs["v"].shape, **make).to(self.dtype)
        inputs["d_final_state"] = torch.randn(inputs["initial_state"].shape, **make)
        inputs["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], device=self.device)
        return inputs

    def _kernels(
        self, inputs: dict[str, Tensor], max_length: int, *, states: bool, dense: bool, learns: bool
    ) -> dict[str, Tensor]:
        given: dict[str, Any] = {
            name: inputs.get(name) if states or name != "initial_state" else None
            for name in ("q", "k", "v", "log_decay", "beta", "initial_state")
        }
        learned = {
            name: x.detach().requires_grad_()
            for name, x in given.items()
            if learns and x is not None and (name != "log_decay" or x.dim() > 1)
        }
        output, final_state = library.scan(
            **given | learned, decay=self.form.decay, scale=self.key_dim**-0.5, cu_seqlens=inputs["cu_seqlens"],
            max_length=max_length, dense=dense, return_final_state=states,
        )  # fmt: skip
        return _with_gradients(output, final_state, learned, inputs)

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        exact = self._chunked(self._ragged, max(self.checked))
        if self._in_full:
            exact |= {f"{name}, in full": x for name, x in self._chunked(self._full, max(FULL)).items()}
        if False in self._passes:
            exact |= {f"{name}, alone": x for name, x in exact.items() if not name.startswith("d_")}
        return exact

    def _chunked(self, inputs: dict[str, Tensor], max_length: int) -> dict[str, Tensor]:
        """In float64."""
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        learned: dict[str, Any] = {
            name: inputs[name].requires_grad_(name != "log_decay" or inputs[name].dim() > 1)
            for name in ("q", "k", "v", "log_decay", "beta", "initial_state")
            if name in inputs
        }
        tokens = Tokens(
            **{name: x if x.dim() == 1 else x[None] for name, x in learned.items() if name != "initial_state"}
        )
        result = scan(
            tokens, form=self.form, step=no_step, scale=self.key_dim**-0.5, initial_state=learned["initial_state"],
            cu_seqlens=inputs["cu_seqlens"], max_length=max_length, return_final_state=True, impl="chunked",
        )  # fmt: skip
        learned = {name: x for name, x in learned.items() if x.requires_grad}
        return _with_gradients(result.output[0], result.final_state, learned, inputs)


def _with_gradients(
    output: Tensor, final_state: Tensor | None, learned: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    made = {"output": output} | ({} if final_state is None else {"final_state": final_state})
    if not learned:
        return made
    seeds = [inputs[f"d_{name}"].to(x.dtype) for name, x in made.items()]
    gradients = torch.autograd.grad(list(made.values()), list(learned.values()), seeds)
    named = {f"d_{name}": x for name, x in zip(learned, gradients, strict=True)}
    return {name: x.detach() for name, x in made.items()} | named


def no_step(state: Tensor, token: Any) -> tuple[Tensor, Tensor]:
    """Of a form that is computed by chunks."""
    raise AssertionError("the chunked form takes no steps")
