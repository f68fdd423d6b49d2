"""The loss of a run on text, step by step, beside what is known without reading: the entropy of its bytes.

    linear-moe train text-hybrid --task text --precision bfloat16 --steps 300 --evaluate-every 50 --log-every 1 \\
        --output runs/curve
    python benchmarks/text_curve.py runs/curve --output benchmarks/results/text_curve.csv --plot docs/text_curve.png

Of a model of bytes: the figures are bits a byte.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

from linear_moe.training.demo.recall_report import COLOURS, new_figure


def read(run: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The steps' losses and the held-out scores, in bits."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [{"step": line["step"], "bits": line["loss"] / math.log(2)} for line in lines if "loss" in line]
    scores = [{"step": line["step"], **line["held_out"]} for line in lines if line.get("held_out")]
    return steps, scores


def draw(steps: list[dict[str, float]], scores: list[dict[str, float]], title: str) -> Any:
    """The picture."""
    figure, axes = new_figure(1, 1, width=7, height=4)
    (ax,) = axes.flat
    ax.plot([row["step"] for row in steps], [row["bits"] for row in steps], color=COLOURS[0], label="training")
    ax.plot(
        [row["step"] for row in scores],
        [row["bits_per_byte"] for row in scores],
        "o",
        color=COLOURS[1],
        label="held out",
    )
    unigram = scores[-1]["unigram_bits_per_byte"]
    ax.axhline(unigram, color=COLOURS[3], linestyle="--", label=f"knowing only how often each byte is: {unigram:.2f}")
    ax.set(xlabel="step", ylabel="bits a byte", ylim=(0, None), title=title)
    ax.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="CSV of the curve")
    parser.add_argument("--plot", type=Path, required=True)
    parser.add_argument("--title", default="training on real text")
    parser.add_argument("--about", default="", help="what it ran on, kept in the CSV")
    options = parser.parse_args()
    steps, scores = read(options.run)
    held_out = {row["step"]: row for row in scores}
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "bits_per_byte", "held_out_bits_per_byte", "unigram_bits_per_byte", "about"))
        for row in steps:
            score = held_out.get(row["step"], {})
            values = (score.get("bits_per_byte", ""), score.get("unigram_bits_per_byte", ""))
            writer.writerow((row["step"], f"{row['bits']:.4f}", *values, options.about))
    draw(steps, scores, options.title).savefig(options.plot, dpi=130)
    first, last = steps[0]["bits"], scores[-1]
    print(
        f"{first:.2f} bits a byte at step {steps[0]['step']}; held out {last['bits_per_byte']:.3f} at step {last['step']}, "
        f"where the bytes' entropy is {last['unigram_bits_per_byte']:.3f}"
    )


if __name__ == "__main__":
    main()
