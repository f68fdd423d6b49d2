"""A text that is read and written in turns: sequences, their carried state, and what comes next."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linear_moe.layers.state_file import read_state_file, write_state_file
from linear_moe.models.decoding import DecodeStep, grows
from linear_moe.models.sampling import Sampling
from linear_moe.models.state import ModelState
from linear_moe.rules.validate import check_padding_mask

if TYPE_CHECKING:
    from linear_moe.models.model import LanguageModel

SEGMENT = 4096
"""Tokens that are read in one pass: what a pass takes beside the state does not grow with the text."""
_SAMPLED = 256
"""Numbers of each parameter that its fingerprint looks at."""


class Session:
    """B sequences of one model, read and written in turns.

    What has been read is in the state alone: a long text is read once, and can be gone on from in memory or, by `save` and
    `load`, from a file, with the same bits.

    Args:
        model: what reads and writes. It is in evaluation mode while it does.
        batch_size: B.
        capture: whether steps are captured as CUDA graphs; on a GPU unless given.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 1, *, capture: bool | None = None) -> None:
        self.model = model
        self.state = model.new_state(batch_size)
        self.capture = capture
        self._logits: Tensor | None = None
        self._unread: Tensor | None = None
        self._step: DecodeStep | None = None

    @property
    def batch_size(self) -> int:
        """B"""
        return self.state.batch_size

    @property
    def is_new(self) -> bool:
        """Whether nothing has been read yet."""
        return self._logits is None

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`[B, vocab]` of the next token of each sequence.

        Raises:
            ValueError: if nothing has been read yet.
        """
        if self._unread is not None:
            self._stand_still()
            # Not by the captured step: whether a text is saved here or written on must not change a bit.
            with evaluating(self.model):
                hidden = self.model.hidden(self._unread[:, None], state=self.state)
                self._logits, self._unread = self.model.logits(hidden[:, 0]), None
        if self._logits is None:
            raise ValueError("nothing has been read yet: there is nothing to go on from")
        return self._logits

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        segment: int = SEGMENT,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read further tokens.

        Args:
            tokens: `[B, T]` int64, at least one real token of each sequence.
            padding_mask: `[B, T]` bool, true on real tokens, for texts of several lengths. Pads may stand anywhere.
            segment: tokens that are read in one pass.
            progress: called after each pass with the number of tokens that it read.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        self._check(tokens, padding_mask, segment)
        # All of it before any is read: a text that is refused must not have moved the state.
        self.model._check_tokens(tokens, padding_mask)
        if not self.is_new:
            self.logits()
        self._stand_still()
        last: Tensor | None = None
        with evaluating(self.model):
            for start in range(0, tokens.shape[1], segment):
                part = tokens[:, start : start + segment]
                mask = None if padding_mask is None else padding_mask[:, start : start + segment]
                last = _last(self.model.hidden(part, padding_mask=mask, state=self.state), mask, last)
                if progress is not None:
                    progress(part.shape[1])
            assert last is not None
            self._logits = self.model.logits(last)

    @torch.no_grad()
    def write(
        self,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
    ) -> Iterator[Tensor]:
        """Draw the tokens that come next, one of each sequence at a time.

        Args:
            max_new_tokens: at most so many.
            sampling: how; the likeliest unless given.
            generator: of the draws, on the model's device; torch's own unless given.
            stop_token: a sequence that has drawn it is filled up with it; when all have, writing ends.

        Yields:
            `[B]` int64. The caller may stop at any time: what was drawn is what the session goes on from.

        Raises:
            ValueError: if nothing has been read yet.
        """
        sampling = sampling or Sampling()
        stopped = torch.zeros(self.batch_size, dtype=torch.bool, device=self.logits().device)
        try:
            with evaluating(self.model):
                for _ in range(max_new_tokens):
                    drawn = sampling.draw(self._step_logits(), generator)
                    if stop_token is not None:
                        drawn = torch.where(stopped, stop_token, drawn)
                        stopped = stopped | (drawn == stop_token)
                    self._unread = drawn
                    yield drawn
                    if stop_token is not None and bool(stopped.all()):
                        break
        finally:
            self._stand_still()

    def _step_logits(self) -> Tensor:
        """`logits`, by the captured step."""
        if self._unread is None:
            return self.logits()
        if self._step is None:
            self._step = DecodeStep(self.model, self.state, capture=self.capture)
        self._logits, self._unread = self._step(self._unread), None
        return self._logits

    def _stand_still(self) -> None:
        """Give back the columns that a step had reserved; whoever goes on writing makes new ones."""
        if self._step is not None and grows(self.model):
            self.state, self._step = self._step.release(), None

    def repeated(self, count: int) -> Session:
        """`count` sequences that all go on from where this one is; this one stays as it is.

        Raises:
            ValueError: if this is not one sequence.
        """
        if self.batch_size != 1:
            raise ValueError(f"a session of one sequence can be repeated, this one has {self.batch_size}")
        logits = None if self.is_new else self.logits()
        copy = Session(self.model, count, capture=self.capture)
        copy.state = self.state.select(torch.zeros(count, dtype=torch.int64))
        copy._logits = None if logits is None else logits.expand(count, -1)
        return copy

    def save(self, path: str | Path) -> None:
        """Write what the sequences are gone on from to a file, whole or not at all. `ModelState.load` reads it too.

        Raises:
            ValueError: if nothing has been read yet.
        """
        content = {"logits": self.logits(), "weights": weights_fingerprint(self.model)}
        write_state_file(path, {**content, **self.state.content()})

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, *, capture: bool | None = None) -> Session:
        """Go on from what `save` wrote, on the model's device.

        Raises:
            ValueError: if the file holds no such state, is damaged, or belongs to another model.
        """
        content = read_state_file(path, "text", "logits", next(model.parameters()).device)
        state = ModelState.of_content(content, str(path))
        session = cls(model, state.batch_size, capture=capture)
        if state.fingerprint != session.state.fingerprint:
            raise ValueError(
                f"{path} belongs to a model of another configuration: fingerprint {state.fingerprint}, "
                f"this model's is {session.state.fingerprint}"
            )
        weights = weights_fingerprint(model)
        if content.get("weights") != weights:
            raise ValueError(
                f"{path} belongs to a model of this configuration with other weights (or another dtype): fingerprint "
                f"{content.get('weights')}, this model's is {weights}"
            )
        session.state, session._logits = state, content["logits"]
        return session

    def _check(self, tokens: Tensor, padding_mask: Tensor | None, segment: int) -> None:
        if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens must be [B, T] with at least one prompt of one token, got shape {list(tokens.shape)}"
            )
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if padding_mask is not None:
            check_padding_mask(padding_mask, tokens.shape[0], tokens.shape[1])
            if not bool(padding_mask.any(1).all()):
                raise ValueError("padding_mask must leave every prompt at least one real token, got a row without any")


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode, then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def weights_fingerprint(model: LanguageModel) -> str:
    """A short hash of names, shapes, dtypes and some numbers of every parameter: cheap, and another one after any training.

    Two models with equal fingerprints may still differ in numbers that are not looked at.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        # float64: float32 does not have every place of a large parameter.
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), _SAMPLED), dtype=torch.float64).long()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]


def _last(hidden: Tensor, padding_mask: Tensor | None, before: Tensor | None) -> Tensor:
    """`[B, D]` of each row's last real token: of `hidden` `[B, T, D]`, or `before` where it has none."""
    if padding_mask is None:
        return hidden[:, -1]
    columns = torch.arange(padding_mask.shape[1], device=hidden.device)
    last = torch.where(padding_mask.to(hidden.device), columns, -1).amax(1)
    found = hidden[torch.arange(last.shape[0], device=hidden.device), last.clamp_min(0)]
    return found if before is None else torch.where((last >= 0)[:, None], found, before)
