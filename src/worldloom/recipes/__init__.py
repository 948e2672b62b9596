"""Recipes: complete configurations by name, and the work that they describe."""

import worldloom.recipes.physics  # noqa: F401 - registers its recipes
from worldloom.recipes.config import CollectionConfig, Recipe
from worldloom.recipes.library import RECIPES, load_recipe
from worldloom.recipes.memory import encode_picture, remember
from worldloom.recipes.methods import METHODS, MethodConfig
from worldloom.recipes.planning import plan_once
from worldloom.recipes.run import Run, find_runs
from worldloom.recipes.workflow import collect, evaluate, report_path, train

__all__ = [
    "METHODS",
    "RECIPES",
    "CollectionConfig",
    "MethodConfig",
    "Recipe",
    "Run",
    "collect",
    "encode_picture",
    "evaluate",
    "find_runs",
    "load_recipe",
    "plan_once",
    "remember",
    "report_path",
    "train",
]
