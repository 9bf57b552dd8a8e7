"""The runner: data sets, models, training, suites, and the command line."""

from typing import Any


def run(*args: Any, **kwargs: Any) -> Any:
    """Compute a suite; see `bench.api.run`."""
    from bench import api

    return api.run(*args, **kwargs)
