"""Each evaluation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linear_moe.evaluation.result import Result
from linear_moe.training.demo.recall_report import COLOURS, new_figure


def plot_result(result: Result, path: Path) -> None:
    """Draw a result into a PNG file.

    Raises:
        MissingExtraError: without matplotlib.
    """
    draw = {"perplexity": _perplexity, "mqar": _recall, "needle": _needle, "decode-speed": _decode_speed}[result.name]
    draw(result).savefig(path, dpi=130)


def _perplexity(result: Result) -> Any:
    rows = result.rows
    figure, axes = new_figure(1, 1, width=7, height=4)
    (ax,) = axes.flat
    ends, titles = [row["end"] for row in rows], {column.key: column.title for column in result.columns}
    ax.plot(ends, [row["bits_per_token"] for row in rows], "o-", color=COLOURS[0])
    beyond = [row["begin"] for row in rows if row["trained"] == "beyond"]
    if beyond:
        ax.axvspan(min(beyond), ends[-1], color=COLOURS[1], alpha=0.12, label="longer than trained on")
        ax.legend()
    _doubling(ax, ends)
    ax.set(xlabel="position in the text, up to", ylabel=titles["bits_per_token"], title="perplexity by position")
    return figure


def _recall(result: Result) -> Any:
    rows = result.rows
    figure, axes = new_figure(1, 1, width=7, height=4)
    (ax,) = axes.flat
    places = range(len(rows))
    ax.bar(places, [row["accuracy"] for row in rows], color=COLOURS[0])
    ax.plot(places, [row["chance"] for row in rows], "_", markersize=24, color=COLOURS[3], label="a guess")
    ax.set_xticks(places, [f"{row['num_pairs']} pairs\nin {row['length']}" for row in rows])
    ax.set(ylim=(0, 1.02), ylabel="accuracy", title="recall by the size of the problem")
    ax.legend()
    return figure


def _needle(result: Result) -> Any:
    rows = result.rows
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, axes = new_figure(1, 2, width=4 + 1.2 * len(lengths), height=1.6 + 0.6 * len(depths))
    for ax, key, title in zip(axes.flat, ("exact", "first"), ("written exactly", "ranked first"), strict=True):
        values = {(row["depth"], row["length"]): row[key] for row in rows}
        grid = [[values[depth, length] for length in lengths] for depth in depths]
        ax.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", size=8)
        ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        ax.set(xlabel="length", ylabel="depth of the needle", title=title)
    return figure


def _decode_speed(result: Result) -> Any:
    rows = result.rows
    figure, axes = new_figure(1, 2, width=11, height=4)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for name, colour in zip(names, COLOURS, strict=False):
        mine = [row for row in rows if row["model"] == name]
        contexts = [row["context"] for row in mine]
        for ax, key, unit in zip(axes.flat, ("ms_per_token", "state_bytes"), (1, 2**20), strict=True):
            ax.plot(contexts, [row[key] / unit for row in mine], "o-", color=colour, label=name)
    for ax, label in zip(axes.flat, ("ms a token", "MiB of state"), strict=True):
        _doubling(ax, sorted({row["context"] for row in rows}))
        ax.set(xlabel="tokens of context", ylabel=label)
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.suptitle("decoding after a context")
    return figure


def _doubling(ax: Any, ticks: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    ax.minorticks_off()
