"""Recipes of a queue and their identity, by which finished results are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from microglia.lab.recipe import Recipe, as_dict, completed, method_config, resolve


@cache
def _resolved(source: str) -> Recipe:
    recipe = resolve(json.loads(source))
    method_config(recipe)
    return recipe


def recipe_of(source: Mapping[str, Any]) -> Recipe:
    """Returns the resolved recipe of a mapping; equal mappings are resolved once."""
    return _resolved(json.dumps(source, sort_keys=True))


def identity_of(recipe: Recipe) -> str:
    """Returns the identity of a recipe: equal for all recipes that end in the same bits and are measured equally."""
    return hashlib.sha256(json.dumps(completed(as_dict(recipe)), sort_keys=True).encode()).hexdigest()[:16]
