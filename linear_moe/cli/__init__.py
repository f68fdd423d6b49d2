"""The command `linear-moe`. Exit codes: 0 done, 1 a mistake that a message explains, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

from linear_moe.cli.app import app, main

__all__ = ["app", "main"]
