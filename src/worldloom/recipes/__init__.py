"""Recipes: functions that return a complete configuration."""

import worldloom.recipes.experts
import worldloom.recipes.physics  # noqa: F401
from worldloom.recipes.library import RECIPES, load_recipe
from worldloom.recipes.recipe import CollectionConfig, LabelledProbe, Recipe

__all__ = [
    "RECIPES",
    "CollectionConfig",
    "LabelledProbe",
    "Recipe",
    "load_recipe",
]
