"""Explainers: one file per family; `adapters.get("transformer_attribution", start_layer=0)`."""

from adapters.base import Explainer
from explainer_bench import Registry

registry: Registry[Explainer] = Registry("explainer", Explainer, __name__)
get = registry.get


def quick(spec: str) -> Explainer:
    """Build an explainer with its `quick` parameters, unless `spec` states some: for checks that ignore quality."""
    explainer = get(spec)
    stated = explainer.spec != explainer.name
    return explainer if stated or not explainer.quick else get(f"{spec}[{explainer.quick}]")


__all__ = ["Explainer", "get", "quick", "registry"]
