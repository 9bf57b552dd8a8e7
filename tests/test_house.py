"""The house rules that no single room can hold: who may import whom, and what the checkout may contain."""

import ast
import configparser
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import explainer_bench

HOUSE = Path(explainer_bench.__file__).parent
ROOMS = ("adapters", "metrics", "leaderboards", "bench")
FORBIDDEN = {
    "explainer_bench": {*ROOMS},
    "adapters": {"metrics", "leaderboards", "bench"},
    "metrics": {"adapters", "leaderboards", "bench"},
    "leaderboards": {"adapters", "metrics", "bench", "torch", "torchvision", "timm", "quantus"},
    "bench": set(),
}
SOURCES = [HOUSE / "explainer_bench.py", *(f for room in ROOMS for f in sorted((HOUSE / room).rglob("*.py")))]
LARGEST = 4 * 2**20
TEXT = {
    "",
    ".cff",
    ".cfg",
    ".css",
    ".csv",
    ".ini",
    ".j2",
    ".js",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
}
TEXT |= {".yml", ".html"}
OF_A_MACHINE = re.compile(r"(?<![\w./$}])/(?:home|root|Users|work|mnt|scratch)/\w")


def relative(path):
    return str(path.relative_to(HOUSE))


def package_of(path):
    """Dotted name of the package that a file's relative imports start from."""
    return list(path.relative_to(HOUSE).parts[:-1])


def imported(source, package) -> Iterator[str]:
    """Yield the absolute dotted name of every import in `source`, lazy, relative and by function ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = [*parents, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(source, package, room):
    return sorted({name for name in imported(source, package) if name.split(".")[0] in FORBIDDEN[room]})


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_one_way(path):
    room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
    assert violations(path.read_text(), package_of(path), room) == []


@pytest.mark.parametrize(
    ("room", "source", "name"),
    [
        ("adapters", "import metrics", "metrics"),
        ("adapters", "import numpy, bench.datasets as d", "bench.datasets"),
        ("metrics", "def score():\n    from adapters.base import predict", "adapters.base.predict"),
        ("metrics", "if TYPE_CHECKING:\n    from adapters import vit", "adapters.vit"),
        ("leaderboards", "try:\n    import torch.nn\nexcept ImportError:\n    pass", "torch.nn"),
        ("leaderboards", "from quantus import Sparseness", "quantus.Sparseness"),
        ("leaderboards", "import importlib\nimportlib.import_module('bench.store')", "bench.store"),
        ("metrics", "__import__('leaderboards')", "leaderboards"),
        ("explainer_bench", "from bench import api", "bench.api"),
    ],
)
def test_the_import_rule_catches(room, source, name):
    assert violations(source, [room], room) == [name]


def test_the_import_rule_knows_relative_imports():
    assert violations("from ..bench import store", ["adapters", "deep"], "adapters") == []
    assert violations("from .. import metrics", ["adapters"], "adapters") == ["metrics"]
    assert list(imported("from .base import Explainer", ["adapters"])) == ["adapters.base.Explainer"]


def test_the_import_rule_leaves_its_own_room_and_the_root_alone():
    source = "import explainer_bench\nfrom adapters import base\nimport metrics_of_others"
    assert violations(source, ["adapters"], "adapters") == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size], ids=relative)
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def version_in(name, pattern):
    found = re.search(pattern, (HOUSE / name).read_text(), re.MULTILINE)
    return found and found[1]


def test_one_version_everywhere():
    assert yaml.safe_load((HOUSE / "CITATION.cff").read_text())["version"] == explainer_bench.__version__
    assert version_in("CHANGELOG.md", r"^## \[(\d.*?)\]") == explainer_bench.__version__
    setup = configparser.ConfigParser()
    setup.read(HOUSE / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: explainer_bench.__version__"


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := HOUSE / name).is_file()]


def test_no_file_is_large():
    assert [relative(path) for path in tracked() if path.stat().st_size > LARGEST] == []


def machine_paths(text):
    return [line for line in text.splitlines() if OF_A_MACHINE.search(line)]


def test_no_file_names_a_path_of_one_machine():
    texts = {path: path.read_text() for path in tracked() if path.suffix in TEXT and path.name != Path(__file__).name}
    assert {relative(path): lines for path, text in texts.items() if (lines := machine_paths(text))} == {}


@pytest.mark.parametrize("text", ["root = '/home/ann/busi'", "cd /work/elsewhere", "see (/Users/bob/x)"])
def test_machine_paths_are_recognised(text):
    assert machine_paths(text)


@pytest.mark.parametrize("text", ["https://example.org/home/ann", "../shared/work/x", "frame/work/a", "home and work"])
def test_other_paths_are_left_alone(text):
    assert not machine_paths(text)


def test_every_data_file_is_shipped():
    setup = configparser.ConfigParser()
    setup.read(HOUSE / "setup.cfg")
    shipped = {
        file
        for room, globs in setup["options.package_data"].items()
        for pattern in globs.split(",")
        for file in (HOUSE / room).glob(pattern.strip())
    }
    in_rooms = {path for path in tracked() if path.relative_to(HOUSE).parts[0] in ROOMS and path.suffix != ".py"}
    assert sorted(map(relative, in_rooms - shipped)) == []
