"""Explainers: one file per family; `adapters.get("transformer_attribution", start_layer=0)`."""

from adapters.base import Explainer
from explainer_bench import Registry

registry: Registry[Explainer] = Registry("explainer", Explainer, __name__)
get = registry.get

__all__ = ["Explainer", "get", "registry"]
