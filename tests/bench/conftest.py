"""The command line in process, as in the acceptance tests."""

from tests.acceptance.conftest import command

__all__ = ["command"]
