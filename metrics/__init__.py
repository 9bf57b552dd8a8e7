"""Metrics: one file per property scored; `metrics.get("srg", imputer="mean")`, `metrics.get("quantus:Infidelity")`."""

from explainer_bench import Registry
from metrics.base import Metric, Samples, Scores


class _Metrics(Registry[Metric]):
    """The metrics of this room, and by ``quantus:Name`` all of Quantus's."""

    def find(self, name: str) -> type[Metric]:
        """Return the class called `name`, or the one in ``FILE.py`` or ``FILE.py:Class``."""
        from metrics.quantus_bridge import named

        return named(name.removeprefix("quantus:")) if name.startswith("quantus:") else super().find(name)


registry = _Metrics("metric", Metric, __name__)
get = registry.get

__all__ = ["Metric", "Samples", "Scores", "get", "registry"]
