"""Packages that only some users need: found, or asked for by the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of one of the optional extras is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which the package's `extra` brings.

    Raises:
        MissingExtraError: naming the pip command, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{package} is needed for this and is not installed: pip install 'linear-moe[{extra}]'", name=package
        ) from error
