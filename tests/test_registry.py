"""Names and options from text, wrapped members, and members that other packages bring."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from specattn.errors import UsageError
from specattn.registry import Registry, split
from specattn.selection.base import Method
from specattn.selection.registry import REGISTRY, get_method, parse_method
from specattn.selection.streaming import Streaming


@dataclass(frozen=True)
class Wrapping(Method):
    """Holds another method."""

    name: ClassVar[str] = "wrapping"

    base: Method = field(default_factory=Streaming)
    strict: bool = False
    p: float = 0.5


@pytest.fixture
def registry() -> Registry[Method]:
    table = {**REGISTRY.table, "wrapping": f"{__name__}:Wrapping"}
    return Registry("method", Method, table, group="specattn.methods", aliases={"all": "dense"})


def test_a_method_holds_another(registry):
    method = registry.parse("wrapping:base=streaming:p=0.25")
    assert method == Wrapping(base=Streaming(), p=0.25)
    nested = registry.parse("wrapping:base=(wrapping:base=(streaming:budget=8:sink=2):p=0.75):strict=yes")
    assert nested == Wrapping(base=Wrapping(base=Streaming(budget=8, sink=2), p=0.75), strict=True)


def test_a_methods_text_makes_it_again(registry):
    method = Wrapping(base=Wrapping(base=Streaming(budget=8, sink=2), p=0.75), strict=True)
    assert method.spec() == "wrapping:base=(wrapping:base=(streaming:budget=8:sink=2):p=0.75):strict=True"
    assert registry.parse(method.spec()) == method
    assert method.options()["base"] == "wrapping:base=(streaming:budget=8:sink=2):p=0.75"
    assert Streaming().spec() == "streaming"


def test_an_alias_is_another_name(registry):
    assert registry.find("all") is registry.find("dense") is type(get_method("full"))


@pytest.mark.parametrize(
    "text,message",
    [
        ("wrapping:base=quset", "unknown method 'quset'"),
        ("wrapping:base=(streaming:budget=0)", "budget=0.0"),
        ("wrapping:base=(streaming:sink=2", "parentheses .* do not match"),
        ("wrapping:base=streaming)", "parentheses .* do not match"),
        ("wrapping:strict=perhaps", "strict='perhaps' is not of type bool"),
    ],
)
def test_bad_text_is_refused(registry, text, message):
    with pytest.raises(UsageError, match=message):
        registry.parse(text)


def test_pieces_in_parentheses_stay_whole():
    assert split("a:b=(c:d=(e:f)):g", ":") == ["a", "b=(c:d=(e:f))", "g"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another package on the path, which names methods."""

    def install(**entries: str) -> None:
        info = tmp_path / "guest-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
        lines = [f"{name} = {place}" for name, place in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[specattn.methods]", *lines]))
        (tmp_path / "guest_methods.py").write_text(
            "from specattn.selection.streaming import Streaming\n"
            "class Guest(Streaming):\n    name = 'guest'\n"
            "number = 3\n"
        )
        monkeypatch.syspath_prepend(tmp_path)

    return install


def fresh() -> Registry[Method]:
    return Registry("method", Method, REGISTRY.table, group=REGISTRY.group)


def test_another_package_brings_a_method(installed):
    installed(guest="guest_methods:Guest", dense="guest_methods:Guest")
    registry = fresh()
    assert registry.parse("guest:budget=0.2").budget == 0.2
    assert registry.find("dense") is REGISTRY.find("dense"), "our names stay ours"


@pytest.mark.parametrize(
    "place,message",
    [
        ("guest_methods:Missing", "cannot be imported"),
        ("nowhere_at_all:Guest", "cannot be imported"),
        ("guest_methods:number", "does not extend Method"),
    ],
)
def test_a_guest_that_is_no_method_is_refused_by_name(installed, place, message):
    installed(guest=place)
    with pytest.raises(UsageError, match=message):
        fresh().find("guest")


def test_names_of_guests_are_suggested(installed):
    installed(guest="guest_methods:Guest")
    with pytest.raises(UsageError, match="did you mean 'guest'"):
        fresh().find("geust")
    assert parse_method("streaming") == Streaming()
