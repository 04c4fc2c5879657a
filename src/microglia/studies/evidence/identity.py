"""Recipes of a queue, each resolved once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from microglia.lab.recipe import Recipe, method_config, resolve


@cache
def _resolved(source: str) -> Recipe:
    recipe = resolve(json.loads(source))
    method_config(recipe)
    return recipe


def recipe_of(source: Mapping[str, Any]) -> Recipe:
    """Returns the resolved recipe of a mapping; equal mappings are resolved once."""
    return _resolved(json.dumps(source, sort_keys=True))
