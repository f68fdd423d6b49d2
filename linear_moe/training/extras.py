"""Optional packages, under the name that training knows them by."""

from linear_moe.data.extras import MissingExtraError, require

__all__ = ["MissingExtraError", "require"]
