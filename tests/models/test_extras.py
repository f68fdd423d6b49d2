"""Optional packages."""

from __future__ import annotations

import sys

import pytest

from linear_moe.models.extras import MissingExtraError, require


def test_what_is_there_is_imported() -> None:
    assert require("json", extra="train") is sys.modules["json"]


def test_what_is_missing_is_named_with_its_command() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_package is needed .* pip install 'linear-moe\[plot\]'"):
        require("no_such_package.part", extra="plot")
