"""Source studies: one file each; `bench.reproduction.reproduce("chung2024", out, ...)`."""

from bench.studies.base import Part, Section, Study, Weights
from explainer_bench import Registry

registry: Registry[Study] = Registry("study", Study, __name__)
get = registry.get

__all__ = ["Part", "Section", "Study", "Weights", "get", "registry"]
