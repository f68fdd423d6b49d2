"""Reading YAML: strict about what YAML forgives, with the line of each key."""

from __future__ import annotations

import pytest

from linear_moe.models.errors import ConfigError
from linear_moe.models.yaml_reader import read_yaml


def test_data_and_lines() -> None:
    data, lines = read_yaml("a: 1\nb:\n  c: {d: 1e-5, e: 2.5E+3}\n  f: [g]\n", "here")
    assert data == {"a": 1, "b": {"c": {"d": 1e-5, "e": 2500.0}, "f": ["g"]}}
    assert lines == {(): 1, ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", "d"): 3, ("b", "c", "e"): 3, ("b", "f"): 4}


def test_anchors_and_merges() -> None:
    data, lines = read_yaml("base: &base {x: 1, y: 2}\nother: {<<: *base, y: 3}\nsame: *base\n", "here")
    assert data["other"] == {"x": 1, "y": 3}
    assert data["same"] == {"x": 1, "y": 2}
    assert lines["base", "x"] == 1


def test_nested_aliases_do_not_explode() -> None:
    levels = "\n".join(f"l{i}: &l{i} {{{', '.join(f'k{j}: *l{i - 1}' for j in range(9))}}}" for i in range(1, 12))
    _, lines = read_yaml("l0: &l0 {x: 1}\n" + levels, "here")
    assert len(lines) < 200


def test_empty() -> None:
    assert read_yaml("# nothing\n", "here") == (None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "duplicate key 'c' in line 2, first given in line 2"),
        ("a: 1\n\na: 2\n", "duplicate key 'a' in line 3, first given in line 1"),
        ("a: 1\nb: [1, 2\nc: 3\n", "not valid YAML in line 3, column 2"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("a: *nowhere\n", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("[1, 2]: 3\n", "unhashable key"),
        ("a: \x07", "special characters are not allowed"),
        ("a: " + "[" * 1200, "nested too deeply"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "here.yaml")
    assert str(caught.value).startswith("here.yaml: not valid YAML")
    assert message in str(caught.value)
