"""Model families, by `config.model_type`: every module here lists its own in FAMILIES.

A family is added by one module and its tiny model in tests/fakes/families.py; tests/models/test_families.py then says
whether it works.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from verl.models.families.base import Family

FAMILIES: dict[str, Family] = {}
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    FAMILIES |= getattr(importlib.import_module(_module.name), "FAMILIES", {})


def family_of(config: Any) -> Family:
    """The family of a model's config. Raises ValueError for a model type without tested support: another one may work,
    and may as well train on wrong positions."""
    if config.model_type not in FAMILIES:
        supported = ", ".join(f"{model_type} ({family.name})" for model_type, family in FAMILIES.items())
        raise ValueError(f"worker.actor.model.model_path holds a '{config.model_type}' model; supported: {supported}")
    return FAMILIES[config.model_type]
