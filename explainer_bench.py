"""What every room stands on: named components, their registry, and the error that a user can mend.

`adapters`, `metrics` and `leaderboards` never import each other; what they share is here, and it knows none of them.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import linecache
import pkgutil
import re
import sys
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar, dataclass_transform

import pydantic
import yaml

__version__ = "0.1.0"

_SPEC = re.compile(r"(?P<name>[^\[\]]+?)(?:\[(?P<params>.*)\]|\((?P<in_parentheses>.*)\))?")
_PIECES = re.compile(r"""(?<==)\s*"(?:[^"\\]|\\.)*"|.""", re.DOTALL)  # a quoted value, or any character
_CONFIG = pydantic.ConfigDict(arbitrary_types_allowed=True)


class RequestError(ValueError):
    """The request was wrong: one line that says what is wrong, where, and how to mend it."""


class RequestWarning(UserWarning):
    """The request can be served, but is probably not what was meant: one line that says why."""


def did_you_mean(word: str, known: list[str]) -> str:
    """Return " Did you mean ...?" for a near miss, else the list of what is known.

    Parameters
    ----------
    word : str
        What was asked for.
    known : list of str
        What there is.
    """
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(sorted(known))}."


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file in one step: whoever looks finds the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def out_of_memory(error: Exception) -> bool:
    """Tell whether `error` is PyTorch's way to say that the accelerator or the host ran out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


@dataclass_transform(kw_only_default=True)
class Component:
    """A named, versioned part with keyword parameters.

    A subclass states constants as plain class attributes and parameters as annotated ones with a default;
    they become validated keyword arguments:

    >>> class Rollout(Component):
    ...     name = "rollout"
    ...     start_layer: int = 0
    >>> Rollout(start_layer=1).spec
    'rollout[start_layer=1]'
    """

    name: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    reference: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pydantic.dataclasses.dataclass(kw_only=True, eq=False, repr=False, config=_CONFIG)(cls)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter with its value."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]

    @property
    def spec(self) -> str:
        """``name[param=value,...]``, with the parameters that differ from their defaults."""
        default = {f.name: f.default for f in fields(self) if f.default is not MISSING}  # type: ignore[arg-type]
        changed = [f"{k}={written(v)}" for k, v in self.params.items() if k not in default or v != default[k]]
        return f"{self.name}[{','.join(changed)}]" if changed else self.name

    def __repr__(self) -> str:
        return self.spec

    @classmethod
    @cache
    def source_hash(cls) -> str:
        """SHA-256 of the sources of the class and its bases and of all of their rooms that they import."""
        modules = [base.__module__ for base in cls.__mro__ if base not in (object, Component)]
        sources: dict[str, str] = {}
        for module in modules:
            _collect_sources(module, {name.partition(".")[0] for name in modules}, sources)
        return hashlib.sha256("".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:16]


def _collect_sources(name: str, roots: set[str], sources: dict[str, str]) -> None:
    """Add the source of a module and, in turn, of what it imports from the packages `roots` or its own folder."""
    sources[name] = inspect.getsource(sys.modules[name])
    folder = Path(inspect.getfile(sys.modules[name])).parent
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for other in imported:
            module = sys.modules.get(other)
            if module is None or other in sources or not getattr(module, "__file__", None):
                continue
            if other.partition(".")[0] in roots or Path(inspect.getfile(module)).parent == folder:
                _collect_sources(other, roots, sources)


T = TypeVar("T", bound=Component)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``name[param=value,...]`` into the name and its parameters; values are YAML scalars or lists.

    Round brackets do as well. A value with commas or brackets stands in quotes, see `written`.

    Raises
    ------
    RequestError
        Where the brackets or a ``param=value`` are malformed.
    """
    match = _SPEC.fullmatch(spec.strip())
    if not match:
        raise RequestError(f"cannot read {spec!r}: write it as name[param=value,param=value].")
    params = {}
    for pair in split_specs(match["params"] or match["in_parentheses"] or ""):
        key, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"cannot read {pair!r} in {spec!r}: write it as param=value.")
        try:
            params[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RequestError(f"cannot read the value of {pair!r} in {spec!r}.") from error
    return match["name"].strip(), params


def split_specs(text: str) -> list[str]:
    """Split a comma-separated list of specs, keeping the commas inside brackets, nested ones included, and quotes."""
    parts, depth = [""], 0
    for piece in _PIECES.findall(text):
        depth += (piece in "[({") - (piece in "])}")
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts if part.strip()]


def written(value: Any) -> str:
    """Write a parameter's value as `parse_spec` reads it: text that would not come back is quoted."""
    if value is None:
        return "null"
    text = str(value)
    if not isinstance(value, str | Path):
        return text
    return text if _is_plain(text) else json.dumps(text, ensure_ascii=False)


def _is_plain(text: str) -> bool:
    try:
        return split_specs(text) == [text] and not set(text) & set("[](){}") and bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False


def load_file(path: Path) -> ModuleType:
    """Import a Python file by path (a submission, or a component kept outside the package)."""
    if not path.is_file():
        raise RequestError(f"no such file: {path}.")
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_spec = importlib.util.spec_from_file_location(f"{path.stem}_{place}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    linecache.checkcache(str(path))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RequestError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    return module


class Registry(Generic[T]):
    """All components of one kind: a package's files, installed entry points, and any file by path.

    Parameters
    ----------
    kind : str
        The word for one of them in messages, such as "explainer".
    base : type
        The contract they fulfil.
    package : str
        The package whose modules are scanned; a new file there needs no registration.
    """

    def __init__(self, kind: str, base: type, package: str) -> None:
        self.kind, self.base, self.package = kind, base, package

    @cached_property
    def classes(self) -> Mapping[str, type[T]]:
        """Every component class by name, sorted."""
        path = importlib.import_module(self.package).__path__
        modules = [importlib.import_module(f"{self.package}.{m.name}") for m in pkgutil.iter_modules(path)]
        found = [cls for module in modules for cls in self._in_module(module)]
        for entry in importlib.metadata.entry_points(group=f"explainer_bench.{self.kind}"):
            try:
                found.append(entry.load())
            except Exception as error:  # another package's fault must not take every command down
                warnings.warn(f"{self.kind} {entry.value} cannot be loaded: {error}", stacklevel=2)
        by_name: dict[str, type[T]] = {}
        for cls in found:
            if by_name.setdefault(cls.name, cls) is not cls:
                raise RequestError(f"two {self.kind}s are named {cls.name!r}: {by_name[cls.name]} and {cls}.")
        return dict(sorted(by_name.items()))

    def _in_module(self, module: ModuleType) -> list[type[T]]:
        classes: list[Any] = [c for c in vars(module).values() if inspect.isclass(c)]
        return [c for c in classes if issubclass(c, self.base) and c.__module__ == module.__name__ and c.name]

    def names(self) -> list[str]:
        """Sorted names."""
        return list(self.classes)

    def find(self, name: str) -> type[T]:
        """Return the class called `name`, or the one in ``FILE.py`` or ``FILE.py:Class``."""
        file, _, class_name = name.partition(".py:") if ".py:" in name else (name, "", "")
        if class_name or name.endswith(".py"):
            return self._find_in_file(Path(file if file.endswith(".py") else file + ".py"), class_name)
        if name not in self.classes:
            raise RequestError(f"unknown {self.kind} {name!r}.{did_you_mean(name, self.names())}")
        return self.classes[name]

    def _find_in_file(self, path: Path, class_name: str) -> type[T]:
        module = load_file(path)
        found = self._in_module(module)
        if class_name:
            found = [cls for cls in found if cls.__name__ == class_name]
        if len(found) == 1:
            return found[0]
        classes: list[Any] = [
            c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
        ]
        nameless = [c.__name__ for c in classes if issubclass(c, self.base) and not c.name]
        if nameless and (class_name in nameless or not self._in_module(module)):
            raise RequestError(f"{path}: class {nameless[0]} states no `name`.")
        names = ", ".join(c.__name__ for c in self._in_module(module))
        if not names:
            base = f"{self.base.__module__}.{self.base.__name__}"
            raise RequestError(f"{path} holds no {self.kind}: inherit from {base}.")
        raise RequestError(f"{path} holds {names} of kind {self.kind}: name one as {path}:Class.")

    def get(self, spec: str, **params: Any) -> T:
        """Build a component from ``name``, ``name[param=value,...]`` or ``FILE.py:Class``.

        Raises
        ------
        RequestError
            For an unknown name or parameter (with the nearest known one), or a value of the wrong type.
        """
        name, written = parse_spec(spec)
        cls = self.find(name)
        known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
        for key in {**written, **params}:
            if key not in known:
                hint = did_you_mean(key, known) if known else " It takes no parameters."
                raise RequestError(f"{self.kind} {name!r} has no parameter {key!r}.{hint}")
        try:
            return cls(**{**written, **params})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = first["msg"].removeprefix("Value error, ").rstrip(".")
            raise RequestError(f"{self.kind} {name!r}, parameter {where!r}: {said}.") from error
