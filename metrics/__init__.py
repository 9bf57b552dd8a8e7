"""Metrics: one file per property scored; `metrics.get("srg", imputer="mean")`."""

from explainer_bench import Registry
from metrics.base import Metric, Samples, Scores

registry: Registry[Metric] = Registry("metric", Metric, __name__)
get = registry.get

__all__ = ["Metric", "Samples", "Scores", "get", "registry"]
