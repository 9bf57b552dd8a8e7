"""Lets tox environments share one directory: torch is installed once, not once per environment.

tox recreates a directory when the environment that asks for it has another name than the one that made it. The runner
below leaves the name out of that comparison; everything else that calls for a new environment (Python, dependencies)
still does.
"""

from typing import Any

from tox.plugin import impl
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class SharedInfo(Info):
    """What tox remembers of a directory, without the name of the environment that made it."""

    def compare(self, value: Any, section: str, sub_section: str | None = None) -> Any:
        """Compare as tox does, the name left out."""
        if section == "ToxEnv":
            value = {**value, "name": "shared"}
        return super().compare(value, section, sub_section)


class SharedRunner(VirtualEnvRunner):
    """A virtual environment that serves several tox environments."""

    @staticmethod
    def id() -> str:
        """Name of this runner in tox.ini."""
        return "shared"

    @property
    def cache(self) -> Info:
        """What tox remembers of the directory."""
        return SharedInfo(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Register the runner."""
    register.add_run_env(SharedRunner)
