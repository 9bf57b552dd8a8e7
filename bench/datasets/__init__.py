"""Data sets: one file each; `bench.datasets.get("busi", root=...)`."""

from bench.datasets.base import Dataset, Item, Sample
from explainer_bench import Registry

registry: Registry[Dataset] = Registry("dataset", Dataset, __name__)
get = registry.get

__all__ = ["Dataset", "Item", "Sample", "get", "registry"]
