"""An inspection as one HTML page that needs nothing else: no script, no network.

Every token carries a class for each mixture, `l<layer>a<memory>` for its first memory and `l<layer>b<memory>` for its second.
The page's radio buttons choose which layer's classes have a colour: what is chosen is CSS's `:checked`.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from linear_moe.data.token_names import LINE_END
from linear_moe.data.vocabulary import Vocabulary
from linear_moe.evaluation.inspection import Inspection, LayerPicks

MOST_FREQUENT = 24
"""Tokens that are listed of a memory."""

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em; color: #111;
  background: #fff; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin: 1.6em 0 .4em; }
body > input { position: absolute; opacity: 0; }
body > label { display: inline-block; border: 1px solid #999; border-radius: 4px; padding: .1em .6em; margin: 0 .2em .3em 0;
  cursor: pointer; }
body > input:checked + label { background: #111; color: #fff; }
body > input:focus-visible + label { outline: 3px solid #48f; }
.text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc;
  padding: .8em; }
.text b { font-weight: normal; border-bottom: 3px solid transparent; }
.text b:hover { outline: 2px solid #111; }
table { border-collapse: collapse; } th, td { padding: .15em .7em; text-align: right; }
th { font-weight: normal; color: #444; } td { color: #000; }
.layer { display: none; } .memory { margin: .4em 0; }
.chip { display: inline-block; min-width: 9em; padding: 0 .5em; border-radius: 4px; }
.held { display: inline; margin: 0; padding: 0; } .held li { display: inline-block; margin: 0 .25em; padding: 0 .3em;
  border: 1px solid #ccc; border-radius: 4px; } .held small { color: #555; }
"""


def page_of(inspection: Inspection, vocabulary: Vocabulary, *, remark: str = "") -> str:
    """The page.

    Args:
        inspection: what is shown.
        vocabulary: of its tokens.
        remark: a sentence more about the text.
    """
    layers = inspection.layers
    title = f"Memories of {inspection.model}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        # Nothing is fetched and nothing is run, whatever the text holds.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}{''.join(_rules(layers))}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_summary(inspection))} {escape(remark)}</p>",
        *_selector(layers),
        "<main>",
    ]
    if layers:
        parts += ["<h2>Loads: the share of a layer's picks that each memory got</h2>", *_heatmap(layers)]
    parts += ["<h2>The text</h2>", *_text(inspection, vocabulary)]
    for layer in layers:
        parts += _memories(layer, inspection.tokens, vocabulary)
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _summary(inspection: Inspection) -> str:
    count = f"{len(inspection.tokens):,} tokens."
    if not inspection.layers:
        return (
            f"{count} This model has no mixture of memories in any of its {inspection.num_layers} layers: no token chose "
            "among memories, and the text stays without colours."
        )
    return (
        f"{count} {len(inspection.layers)} of {inspection.num_layers} layers are mixtures of memories. A token's colour is its "
        "first memory, the line under it its second; the weights are shown when the pointer rests on it."
    )


def _colour(memory: int) -> str:
    """Hues a golden angle apart: near numbers are far in colour, however many there are."""
    return f"hsl({memory * 137.508 % 360:.0f} 75% 78%)"


def _rules(layers: list[LayerPicks]) -> Iterator[str]:
    memories = max((layer.num_memories for layer in layers), default=0)
    for memory in range(memories):
        yield f".m{memory} {{ background: {_colour(memory)}; }}\n"
    for layer in layers:
        chosen = f"#layer{layer.layer}:checked ~ main"
        yield f"{chosen} #of{layer.layer} {{ display: block; }}\n"
        for memory in range(layer.num_memories):
            yield f"{chosen} .l{layer.layer}a{memory} {{ background: {_colour(memory)}; }}\n"
            yield f"{chosen} .l{layer.layer}b{memory} {{ border-color: {_colour(memory)}; }}\n"


def _selector(layers: list[LayerPicks]) -> Iterator[str]:
    for place, layer in enumerate(layers):
        checked = " checked" if place == 0 else ""
        yield (
            f'<input type="radio" name="layer" id="layer{layer.layer}"{checked}>'
            f'<label for="layer{layer.layer}">layer {layer.layer}</label>'
        )


def _heatmap(layers: list[LayerPicks]) -> Iterator[str]:
    memories = max(layer.num_memories for layer in layers)
    head = "".join(f'<th scope="col">memory {memory}</th>' for memory in range(memories))
    yield f'<table class="loads">\n<tr><th></th>{head}</tr>'
    for layer in layers:
        cells = "".join(
            f'<td style="background: rgba(220, 90, 30, {load:.3f})">{load:.1%}</td>' for load in layer.loads()
        )
        yield f'<tr><th scope="row">layer {layer.layer}</th>{cells}</tr>'
    yield "</table>"


def _text(inspection: Inspection, vocabulary: Vocabulary) -> Iterator[str]:
    tokens, labels = [], vocabulary.labels(inspection.tokens)
    for place, (token, label) in enumerate(zip(inspection.tokens, labels, strict=True)):
        classes = " ".join(_classes(inspection.layers, place))
        hover = "\n".join((f"token {place}: {token}", *_weights(inspection.layers, place)))
        end = "<br>" if label.endswith(LINE_END) else vocabulary.separator
        tokens.append(f'<b class="{classes}" title="{escape(hover)}">{escape(label)}</b>{end}')
    # In one line: a line end of the page would be one of the text.
    yield f'<div class="text">{"".join(tokens)}</div>'


def _classes(layers: list[LayerPicks], place: int) -> Iterator[str]:
    for layer in layers:
        for letter, memory in zip("ab", layer.picks[place], strict=False):
            yield f"l{layer.layer}{letter}{memory}"


def _weights(layers: list[LayerPicks], place: int) -> Iterator[str]:
    for layer in layers:
        used = zip(layer.picks[place], layer.weights[place], strict=True)
        yield f"layer {layer.layer}: " + ", ".join(f"memory {memory} {weight:.2f}" for memory, weight in used)


def _memories(layer: LayerPicks, tokens: list[int], vocabulary: Vocabulary) -> Iterator[str]:
    yield f'<section class="layer" id="of{layer.layer}">'
    yield f"<h2>What the memories of layer {layer.layer} hold: their most frequent tokens</h2>"
    for memory, load in enumerate(layer.loads()):
        held = "".join(
            f"<li>{escape(vocabulary.name(token))} <small>{times:,} times, {share:.0%} of all</small></li>"
            for token, times, share in layer.held(tokens, memory, MOST_FREQUENT)
        )
        chip = f'<span class="chip m{memory}">memory {memory}: {load:.1%}</span>'
        yield f'<div class="memory">{chip} <ul class="held">{held or "<li>nothing</li>"}</ul></div>'
    yield "</section>"
