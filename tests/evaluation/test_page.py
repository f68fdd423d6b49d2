"""The page of an inspection: whole, by itself, and of the text that it shows, whatever that holds."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ATTENTION, MIXTURE, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.token_names import byte_labels
from linear_moe.data.vocabulary import ByteVocabulary
from linear_moe.evaluation import Inspection, inspect_text, page_of
from linear_moe.evaluation.inspection import LayerPicks

NASTY = b"a </script><script>alert(1)</script> & \"'<b onclick=x>\n\t</div></style>&lt;\xff\xfe\xc3\xa9 -->\x00"
VOID = {"meta", "input", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """What a browser would see: elements that are balanced, and the text of the tokens."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tokens: list[tuple[str, dict[str, str]]] = []
        self.words = self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.elements.append((tag, found))
        if tag == "b":
            self.tokens.append(("", found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            label, attributes = self.tokens[-1]
            self.tokens[-1] = (label + data, attributes)
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def shown(text: bytes, *mixers: dict[str, Any]) -> tuple[str, Inspection]:
    tokens = [DOCUMENT_START, *text]
    found = inspect_text(small_model(257, *mixers), tokens)
    return page_of(found, ByteVocabulary()), found


def by_itself(text: str) -> None:
    """No script, nothing that is fetched, no attribute that runs or leads away."""
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "input", "label", "main", "table", "tr"),
        *("th", "td", "div", "b", "br", "section", "span", "ul", "li", "small"),
    }
    names = {name for _, attributes in page.elements for name in attributes}
    assert names <= {
        *(
            "lang",
            "charset",
            "http-equiv",
            "content",
            "name",
            "type",
            "id",
            "checked",
            "for",
            "class",
            "title",
            "style",
        ),
        "scope",
    }
    assert "url(" not in page.style and "@import" not in page.style and "<" not in page.style
    (policy,) = (meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_text_is_there_whatever_it_holds() -> None:
    text, found = shown(NASTY, MIXTURE, ATTENTION, {**MIXTURE, "num_memories": 5})
    by_itself(text)
    page = Page(text)
    assert [label for label, _ in page.tokens] == byte_labels(found.tokens)
    assert len(page.of("br")) == NASTY.count(b"\n")
    for place, (_, attributes) in enumerate(page.tokens):
        classes = [f"l{x.layer}{c}{m}" for x in found.layers for c, m in zip("ab", x.picks[place], strict=True)]
        assert attributes["class"].split() == classes
        lines = attributes["title"].split("\n")
        assert lines[0] == f"token {place}: {found.tokens[place]}"
        for line, layer in zip(lines[1:], found.layers, strict=True):
            used = zip(layer.picks[place], layer.weights[place], strict=True)
            assert line == f"layer {layer.layer}: " + ", ".join(f"memory {m} {w:.2f}" for m, w in used)


@settings(max_examples=25)
@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_make_a_page(text: bytes) -> None:
    tokens = [DOCUMENT_START, *text]
    picks = LayerPicks(3, 4, [[t % 4, (t + 1) % 4] for t in tokens], [[0.75, 0.25]] * len(tokens))
    page = page_of(Inspection("<m&>", 7, tokens, [picks]), ByteVocabulary())
    by_itself(page)
    assert [label for label, _ in Page(page).tokens] == byte_labels(tokens)
    assert "Memories of <m&>" in Page(page).words


def test_each_layer_has_its_choice_its_loads_and_its_colours() -> None:
    text, found = shown(b"some text that is long enough to go everywhere", MIXTURE, {**MIXTURE, "num_memories": 5})
    page = Page(text)
    buttons = page.of("input")
    assert [button["id"] for button in buttons] == ["layer0", "layer1"]
    assert {button["name"] for button in buttons} == {"layer"}
    assert ["checked" in button for button in buttons] == [True, False]
    assert [label["for"] for label in page.of("label")] == ["layer0", "layer1"]
    rules = dict(re.findall(r"^(#layer\d+:checked ~ main \S+) \{ (.*?) \}$", page.style, re.MULTILINE))
    for layer in found.layers:
        fills, lines = (
            [rules[f"#layer{layer.layer}:checked ~ main .l{layer.layer}{c}{m}"] for m in range(layer.num_memories)]
            for c in "ab"
        )
        assert len(set(fills)) == layer.num_memories
        assert [f.removeprefix("background: ") for f in fills] == [x.removeprefix("border-color: ") for x in lines]
        assert rules[f"#layer{layer.layer}:checked ~ main #of{layer.layer}"] == "display: block;"
        for load in layer.loads():
            assert f"{load:.1%}" in page.words
    cells = [float(re.findall(r"([\d.]+)\)$", cell["style"])[0]) for cell in page.of("td")]
    assert cells == pytest.approx([load for layer in found.layers for load in layer.loads()], abs=1e-3)
    assert "memory 4" in page.words


def test_what_a_memory_holds_is_listed() -> None:
    tokens = [*b"aab<"]
    layer = LayerPicks(0, 3, [[0], [1], [0], [0]], [[1.0]] * 4)
    page = Page(page_of(Inspection("m", 1, tokens, [layer]), ByteVocabulary()))
    words = re.sub(r"\s+", " ", page.words)
    assert "memory 0: 75.0% < 1 times, 100% of alla 1 times, 50% of allb 1 times, 100% of all" in words
    assert "memory 1: 25.0% a 1 times, 50% of all" in words
    assert "memory 2: 0.0% nothing" in words


def test_a_model_without_mixtures_says_so() -> None:
    text, found = shown(NASTY, ATTENTION)
    by_itself(text)
    page = Page(text)
    assert "no mixture of memories in any of its 1 layers" in page.words
    assert page.of("input") == page.of("table") == []
    assert [label for label, _ in page.tokens] == byte_labels(found.tokens)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
def test_a_browser_shows_the_colours_of_the_chosen_layer(tmp_path: Path) -> None:
    """The page in a frame of another that chooses each layer and asks what is drawn."""
    assert BROWSER is not None
    text, found = shown(NASTY, MIXTURE, {**MIXTURE, "num_memories": 5})
    probe = f"""<!DOCTYPE html>
<iframe id=f width=900 height=700 srcdoc="{html.escape(text)}"></iframe><pre id=out></pre><script>
onload = () => {{
  const d = document.getElementById("f").contentDocument, get = d.defaultView.getComputedStyle, found = [];
  for (const button of d.querySelectorAll("input")) {{
    d.querySelector(`label[for=${{button.id}}]`).click();
    const tokens = [...d.querySelectorAll(".text b")];
    found.push({{
      id: button.id,
      fill: tokens.map(t => get(t).backgroundColor), line: tokens.map(t => get(t).borderBottomColor),
      chips: [...d.querySelectorAll(`#of${{button.id.slice(5)}} .chip`)].map(c => get(c).backgroundColor),
      sections: [...d.querySelectorAll(".layer")].map(s => get(s).display),
      labels: tokens.map(t => t.textContent), scripts: d.scripts.length,
    }});
  }}
  document.getElementById("out").textContent = JSON.stringify(found);
}};
</script>"""
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probe.html").as_uri()], capture_output=True, timeout=60, check=True
    ).stdout.decode("utf-8")
    (out,) = re.findall(r'<pre id="out">(.*?)</pre>', dump, re.DOTALL)
    states = json.loads(html.unescape(out))
    assert [state["id"] for state in states] == ["layer0", "layer1"]
    for place, (state, layer) in enumerate(zip(states, found.layers, strict=True)):
        assert len(set(state["chips"])) == layer.num_memories
        assert state["fill"] == [state["chips"][picks[0]] for picks in layer.picks]
        assert state["line"] == [state["chips"][picks[1]] for picks in layer.picks]
        assert state["sections"] == ["block" if i == place else "none" for i in range(2)]
        assert state["labels"] == byte_labels(found.tokens)
        assert state["scripts"] == 0
