"""Training recipes: one file each; `bench.training.train("digits", out)`."""

from bench.recipes.base import Arrays, Recipe
from explainer_bench import Registry

registry: Registry[Recipe] = Registry("recipe", Recipe, __name__)
get = registry.get

__all__ = ["Arrays", "Recipe", "get", "registry"]
