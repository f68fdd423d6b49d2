"""Which memory each token of a text went to: coloured on a terminal, as plain text, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.text import Text

from linear_moe.data.text import DOCUMENT_START
from linear_moe.models.extras import require
from linear_moe.models.model import LanguageModel
from linear_moe.training.demo.recall_report import COLOURS, new_figure

LINE_LENGTH = 80
STYLES = tuple(
    f"black on {colour}"
    for colour in (
        "bright_blue",
        "bright_yellow",
        "bright_green",
        "bright_red",
        "bright_magenta",
        "bright_cyan",
        "white",
    )
)


class LayerPicks(NamedTuple):
    """What one mixture did with a text."""

    layer: int
    num_memories: int
    first: list[int]
    """The best memory of each byte."""
    load: list[float]
    """Share of all picks, of every memory."""


@torch.no_grad()
def picks_of(model: LanguageModel, text: bytes) -> list[LayerPicks]:
    """Run the model over a document that starts with `text`, and read what its routers picked."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    model(torch.tensor([[DOCUMENT_START, *text]], device=device))
    model.train(was_training)
    layers = []
    for index, layer in model.memory_layers():
        assert layer.routing is not None
        # The document start is no byte of the text.
        first = layer.routing.indices[1:, 0].tolist()
        layers.append(LayerPicks(index, layer.num_memories, first, layer.routing.load.tolist()))
    return layers


def lines_of(text: bytes) -> Iterator[tuple[int, int]]:
    """Ranges of bytes that are shown in one line."""
    start = 0
    while start < len(text):
        newline = text.find(b"\n", start, start + LINE_LENGTH)
        end = newline + 1 if newline >= 0 else min(start + LINE_LENGTH, len(text))
        yield start, end
        start = end


def shown(byte: int) -> str:
    """A byte as one character."""
    if byte == 0x0A:
        return "⏎"
    return chr(byte) if 0x20 <= byte < 0x7F else "·"


def coloured(text: bytes, picks: LayerPicks) -> Text:
    """The text with each byte on its memory's colour, and a legend."""
    result = Text(f"layer {picks.layer}: ")
    for memory, share in enumerate(picks.load):
        result.append(f" {memory} ", STYLES[memory % len(STYLES)]).append(f" {share:.0%}  ")
    for start, end in lines_of(text):
        result.append("\n")
        for byte, memory in zip(text[start:end], picks.first[start:end], strict=True):
            result.append(shown(byte), STYLES[memory % len(STYLES)])
    return result


def plain(text: bytes, picks: LayerPicks) -> str:
    """The same without colours: under each line of text the numbers of its memories."""
    lines = [f"layer {picks.layer}: " + "  ".join(f"memory {m}: {share:.0%}" for m, share in enumerate(picks.load))]
    for start, end in lines_of(text):
        lines.append("".join(map(shown, text[start:end])))
        lines.append("".join(_digit(memory) for memory in picks.first[start:end]))
    return "\n".join(lines)


def plot_picks(text: bytes, layers: list[LayerPicks], path: Path) -> None:
    """The text once for each mixture, every character on its memory's colour.

    Raises:
        MissingExtraError: without matplotlib.
    """
    lines = list(lines_of(text))
    figure, axes = new_figure(len(layers), 1, width=11, height=len(layers) * (0.6 + 0.19 * len(lines)))
    for ax, picks in zip(axes.flat, layers, strict=True):
        for row, (start, end) in enumerate(lines):
            for column, place in enumerate(range(start, end)):
                colour = COLOURS[picks.first[place] % len(COLOURS)]
                ax.add_patch(_square(column, row, colour))
                ax.text(
                    column + 0.5,
                    row + 0.55,
                    _drawable(text[place]),
                    ha="center",
                    va="center",
                    size=7,
                    family="monospace",
                )
        ax.set(xlim=(0, LINE_LENGTH), ylim=(len(lines), 0))
        ax.set_axis_off()
        legend = "   ".join(f"memory {m}: {share:.0%}" for m, share in enumerate(picks.load))
        ax.set_title(
            f"layer {picks.layer}: each byte's first memory;  share of all picks   {legend}", size=8, loc="left"
        )
        for memory in range(picks.num_memories):
            ax.plot([], [], "s", color=COLOURS[memory % len(COLOURS)], label=str(memory))
        ax.legend(loc="upper right", ncols=picks.num_memories, fontsize=7, title="memory", title_fontsize=7)
    figure.savefig(path, dpi=130)


def _square(column: int, row: int, colour: str) -> object:
    return require("matplotlib.patches", extra="plot").Rectangle((column, row), 1, 1, color=colour, alpha=0.55, lw=0)


def _drawable(byte: int) -> str:
    # A dollar would begin a formula.
    character = shown(byte)
    return "\\$" if character == "$" else character


def _digit(memory: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyz"[memory % 36]
