"""Which memory each byte went to, drawn."""

from __future__ import annotations

from pathlib import Path

from small_models import small_model

from linear_moe.training.demo.memory_picture import LayerPicks, coloured, lines_of, picks_of, plain, plot_picks, shown

TEXT = b"def f(x):\n    return '$\xc3\xa9'\n" + b"y" * 100


def test_picks_are_those_of_the_router() -> None:
    model = small_model(vocab_size=257)
    (picks,) = picks_of(model, TEXT)
    routing = model.memory_layers()[0][1].routing
    assert routing is not None
    assert picks.first == routing.indices[1:, 0].tolist()
    assert len(picks.first) == len(TEXT)
    assert abs(sum(picks.load) - 1) < 1e-6
    assert model.training


def test_every_byte_is_shown_once_with_its_memory() -> None:
    lines = list(lines_of(TEXT))
    assert [start for start, _ in lines] == [0, *(end for _, end in lines[:-1])]
    assert lines[-1][1] == len(TEXT)
    assert max(end - start for start, end in lines) == 80
    picks = LayerPicks(0, 3, [i % 3 for i in range(len(TEXT))], [0.5, 0.25, 0.25])
    shown_lines = plain(TEXT, picks).splitlines()
    assert shown_lines[0] == "layer 0: memory 0: 50%  memory 1: 25%  memory 2: 25%"
    assert shown_lines[1:3] == ["def f(x):⏎", "0120120120"]
    assert "".join(shown_lines[1::2]) == "".join(map(shown, TEXT))
    text = coloured(TEXT, picks)
    assert "".join(map(shown, TEXT)) in text.plain.replace("\n", "")
    assert len(text.spans) == 3 + len(TEXT)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    layers = [LayerPicks(i, 3, [0] * len(TEXT), [1.0, 0.0, 0.0]) for i in range(2)]
    plot_picks(TEXT, layers, tmp_path / "memories.png")
    assert (tmp_path / "memories.png").read_bytes().startswith(b"\x89PNG")
