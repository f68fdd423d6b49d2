"""The families that are known, by the `model_type` of their configurations."""

from __future__ import annotations

from typing import Any

from linear_moe.models.convert.family import Family
from linear_moe.models.convert.gated_deltanet import GATED_DELTANET
from linear_moe.models.convert.gla import GLA
from linear_moe.models.convert.mamba2 import MAMBA2
from linear_moe.models.convert.mom import MOM, PAPERS_MOM
from linear_moe.models.convert.retnet import RETNET
from linear_moe.models.convert.transformer import TRANSFORMER
from linear_moe.models.errors import choices

FAMILIES = {family.model_type: family for family in (MOM, PAPERS_MOM, GATED_DELTANET, GLA, RETNET, MAMBA2, TRANSFORMER)}


def find_family(config: dict[str, Any], source: str) -> Family:
    """The family of a configuration.

    Raises:
        ValueError: if its `model_type` is missing or unknown, naming the nearest.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise ValueError(f"{source}: model_type is required; allowed: {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ValueError(f"{source}: unknown model_type {name!r}; {choices(name, FAMILIES)}")
    return FAMILIES[name]
