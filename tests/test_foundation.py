"""Components, their registry, and writing files whole."""

from pathlib import Path
from typing import Any

import pytest

from explainer_bench import Component, Registry, RequestError, parse_spec, split_specs, write_atomically


class Method(Component):
    """A contract."""


class Rollout(Method):
    """A component with parameters."""

    name = "rollout"
    start_layer: int = 0
    fusion: str = "mean"


class Loose(Method):
    """A component that takes anything."""

    name = "loose"
    value: Any = 1


def test_parameters_are_validated_and_named_in_the_spec() -> None:
    assert Rollout().spec == "rollout"
    assert Rollout(start_layer=2).spec == "rollout[start_layer=2]"
    assert Loose(value=None).spec == "loose[value=null]"
    assert parse_spec(Loose(value=[1, "a", {"b": 2}]).spec) == ("loose", {"value": [1, "a", {"b": 2}]})
    assert Rollout(fusion="max", start_layer=2).params == {"start_layer": 2, "fusion": "max"}
    with pytest.raises(ValueError, match="valid integer"):
        Rollout(start_layer="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a", ("a", {})),
        (" a[b=1, c=mean,d=true] ", ("a", {"b": 1, "c": "mean", "d": True})),
        ("dir/mine.py:Mine[x=0.5]", ("dir/mine.py:Mine", {"x": 0.5})),
        ("a[b=[1, 2],c={d: [e, f], g: 1},h=]", ("a", {"b": [1, 2], "c": {"d": ["e", "f"], "g": 1}, "h": None})),
        ("a(b=[1,2],c=null)", ("a", {"b": [1, 2], "c": None})),
        ("dir (1)/mine.py:Mine", ("dir (1)/mine.py:Mine", {})),
        ('a[b="x, y[1",c=it\'s,d= "q\\"]"]', ("a", {"b": "x, y[1", "c": "it's", "d": 'q"]'})),
    ],
)
def test_specs_are_read(spec: str, expected: tuple) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    "text",
    ["/a,b/c[1]/(d", 'say "x"', "it's", "'", '"', "5", "true", "", " x ", "a: b", "a #b", "*", "\\", "é", "null"],
)
def test_any_text_comes_back_from_a_spec(text: str) -> None:
    spec = Loose(value=text).spec
    assert parse_spec(spec) == ("loose", {"value": text})
    assert split_specs(f"{spec},b") == [spec, "b"]
    assert parse_spec(Loose(value=Path(text) / "x").spec)[1] == {"value": str(Path(text) / "x")}


@pytest.mark.parametrize("text", ["mean", "/data/some folder/masks", "m1=2", "x.y", "it's"])
def test_plain_text_is_not_quoted(text: str) -> None:
    assert Loose(value=text).spec == f"loose[value={text}]"


@pytest.mark.parametrize("spec", ["", "a[", "a[b]", "a]b", "[x=1]", "a[b={]"])
def test_malformed_specs_are_refused(spec: str) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        parse_spec(spec)


def test_lists_of_specs_keep_the_commas_in_brackets() -> None:
    assert split_specs("a[b=1,c=2],d, e ,") == ["a[b=1,c=2]", "d", "e"]
    assert split_specs("a[b=[1,2],c=3],d(e=[[1],[2]],f={g: 1, h: 2}),i") == [
        "a[b=[1,2],c=3]",
        "d(e=[[1],[2]],f={g: 1, h: 2})",
        "i",
    ]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A package whose only module holds one component."""
    folder = tmp_path / f"package_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text(
        f"from {__name__} import Method\nclass A(Method):\n    name = 'first'\n    x: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return Registry("method", Method, folder.name)


def test_a_new_file_needs_no_registration(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / registry.package / "second.py").write_text(
        f"from {__name__} import Method\nclass B(Method):\n    name = 'b'\n"
    )
    assert registry.names() == ["b", "first"]
    assert registry.get("first[x=3]").params == {"x": 3}
    assert registry.get("first", x=4).params == {"x": 4}


def test_near_misses_are_named(registry: Registry) -> None:
    with pytest.raises(RequestError, match=r"unknown method 'frist'.*Did you mean first"):
        registry.get("frist")
    with pytest.raises(RequestError, match="no parameter 'y'"):
        registry.get("first[y=3]")
    with pytest.raises(RequestError, match="parameter 'x'"):
        registry.get("first[x=many]")


def test_files_by_path(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = f"from {__name__} import Method\nclass One(Method):\n    name = 'one'\n"
    file.write_text(text)
    assert registry.get(str(file)).spec == "one"
    before = registry.get(str(file)).source_hash()
    file.write_text(text + "class Two(Method):\n    name = 'two'\n")
    with pytest.raises(RequestError, match="One, Two"):
        registry.get(str(file))
    two = registry.get(f"{file}:Two")
    assert two.spec == "two"
    assert two.source_hash() != before


def test_the_source_hash_follows_what_the_room_provides(tmp_path: Path) -> None:
    import adapters
    from explainer_bench import _collect_sources

    sources: dict[str, str] = {}
    _collect_sources(adapters.registry.find("cdam").__module__, {"adapters"}, sources)
    assert set(sources) == {
        "adapters.cdam",
        "adapters.vit",
        "adapters.recording",
        "adapters.base",
        "adapters.state",
        "adapters",
    }
    file = tmp_path / "mine.py"
    file.write_text("from adapters import vit\nclass Mine(vit.ViTExplainer):\n    name = 'mine'\n")
    mine = adapters.registry.find(str(file))
    sources = {}
    _collect_sources(mine.__module__, {mine.__module__, "adapters"}, sources)
    assert {"adapters.vit", "adapters.base"} < set(sources)


def test_two_files_of_one_name_are_two_modules(registry: Registry, tmp_path: Path) -> None:
    hashes = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(f"from {__name__} import Method\nclass M(Method):\n    name = 'm'  # {folder}\n")
        hashes.append(registry.find(str(file)))
    assert hashes[0].source_hash() != hashes[1].source_hash()


def test_two_of_one_name_are_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / registry.package / "copy.py").write_text(
        f"from {__name__} import Method\nclass A(Method):\n    name = 'first'\n"
    )
    with pytest.raises(RequestError, match="two methods are named 'first'"):
        registry.names()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder/file"
    assert write_atomically(path, b"old").read_bytes() == b"old"

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
