"""Packages that only training or plotting needs. They are looked for as those of models are."""

from __future__ import annotations

from linear_moe.models.extras import MissingExtraError, require

__all__ = ["MissingExtraError", "require"]
