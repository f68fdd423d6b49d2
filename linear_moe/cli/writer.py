"""Text from a model to the terminal, as it is written; and a conversation in turns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from linear_moe.cli.console import make_progress
from linear_moe.cli.errors import tell
from linear_moe.cli.written import Written
from linear_moe.data.text import printable
from linear_moe.data.vocabulary import Vocabulary
from linear_moe.models.model import LanguageModel
from linear_moe.models.sampling import Sampling
from linear_moe.models.session import SEGMENT, Session

COMMANDS = """\
/save FILE  write the state to a file, which --load-state goes on from
/load FILE  go on from such a file
/reset      forget everything
/state      how much has been read, and how large the state is
/help       this
/quit       the end (also the end of the input)
Anything else is read, with a line end after it, and gone on from; an empty line lets the model go on. A line that begins
with / itself is written with two."""


class Writer:
    """One text of a model: what reads and writes it, and how.

    Args:
        model: in evaluation mode.
        vocabulary: of its tokens.
        max_new_tokens: of each writing.
        sampling: how tokens are drawn.
        seed: of the draws.
        stop: texts that end a writing.
        load_state: a file of a session to go on from.
        capture: whether steps are CUDA graphs; on a GPU unless given.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        stop: Sequence[str] = (),
        load_state: Path | None = None,
        capture: bool | None = None,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.stop = stop
        self.capture = capture
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        # A stop text that can't be is no news for after a long context.
        self.new_text()
        self.session = Session(model, capture=capture)
        if load_state is not None:
            self.load(load_state)

    def new_text(self) -> Written:
        """For the tokens of one text."""
        return Written(self.vocabulary, self.stop)

    def load(self, path: Path) -> None:
        """Go on from a file.

        Raises:
            ValueError: if it holds no state of one text of this model.
        """
        session = Session.load(path, self.model, capture=self.capture)
        if session.batch_size != 1:
            raise ValueError(f"{path} holds the states of {session.batch_size} texts; here one is gone on from")
        self.session = session

    def reset(self) -> None:
        """Forget everything."""
        self.session = Session(self.model, capture=self.capture)

    def read_file(self, path: Path) -> None:
        """Read a file's text.

        Raises:
            ValueError: if it is empty, or does not fit the vocabulary.
        """
        tokens = self.vocabulary.read(path)
        if not tokens:
            raise ValueError(f"the file {str(path)!r} is empty")
        self.read(tokens)

    def read_text(self, text: str, *, shown: bool = False) -> None:
        """Read a text, and print it if it is to be shown; nothing where an empty one goes on from another."""
        tokens = self.vocabulary.encode(text)
        if not tokens and not self.vocabulary.start and self.session.is_new:
            raise ValueError("this model reads token numbers and needs at least one, such as --prompt '1 33 2 34'")
        if tokens or self.session.is_new:
            self.read(tokens)
        if shown and tokens:
            _show(self.vocabulary.decode(tokens) + (self.vocabulary.separator if self.max_new_tokens else ""))

    def read(self, tokens: list[int]) -> None:
        """Read tokens; a new text begins with the vocabulary's own start."""
        start = list(self.vocabulary.start) if self.session.is_new else []
        row = torch.tensor([start + tokens], device=self.device)
        with make_progress() as bar:
            # A single pass is over at once, or says nothing on the way.
            task = bar.add_task("reading", total=row.shape[1], visible=row.shape[1] > SEGMENT)
            self.session.read(row, progress=lambda count: bar.advance(task, count))

    def write(self) -> None:
        """Write what comes next, to standard output, and end the line."""
        written = self.new_text()
        for drawn in self.session.write(
            self.max_new_tokens, self.sampling, generator=self.generator, stop_token=self.vocabulary.stop_token
        ):
            _show(written.push(int(drawn[0])))
            if written.stopped:
                break
        _show(written.finish() + "\n")


def converse(writer: Writer) -> None:
    """Turns of one text until the input ends: each line is read, and what follows is written."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        typer.echo("A line is read and gone on from; /help shows what else can be done.", err=True)
    while True:
        if is_terminal:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        line = line.removesuffix("\n")
        if line.startswith("/") and not line.startswith("//"):
            if line.strip() == "/quit":
                return
            try:
                _obey(writer, *line[1:].split(maxsplit=1))
            except (ValueError, OSError) as error:
                # A mistake in one turn does not end the conversation.
                tell(str(error))
            continue
        try:
            _turn(writer, line[1:] if line.startswith("//") else line)
        except ValueError as error:
            tell(str(error))


def _turn(writer: Writer, line: str) -> None:
    writer.read_text(line + writer.vocabulary.turn_end if line else "")
    writer.write()


def _obey(writer: Writer, name: str = "", argument: str = "") -> None:
    if name in ("save", "load") and not argument:
        raise ValueError(f"/{name} needs the name of a file")
    if name == "save":
        writer.session.save(Path(argument))
    elif name == "load":
        writer.load(Path(argument))
    elif name == "reset":
        writer.reset()
    elif name == "state":
        state = writer.session.state
        typer.echo(f"{int(state.tokens_seen[0]):,} tokens read; the state has {state.nbytes:,} bytes", err=True)
    elif name == "help":
        typer.echo(COMMANDS, err=True)
    else:
        raise ValueError(f"there is no command /{name}; /help shows what there is")


def _show(text: str) -> None:
    if text:
        typer.echo(printable(text), nl=False)
        sys.stdout.flush()
