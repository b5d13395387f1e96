"""Names of things with options, and their options from text: ``specattn:p=0.9:sink=8``.

A family, such as the selection methods, is a table from names to classes that are imported when they are asked for.
Other packages add to it through an entry point.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

from specattn.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """What a registry holds: a frozen dataclass with a name, whose fields are its options."""

    name: ClassVar[str]
    wrapped_defaults: ClassVar[Mapping[str, object]] = {}
    """For a member that wraps another: options that the other is given where its text leaves them out."""

    def options(self) -> dict[str, object]:
        """The options with their values, for reports; a wrapped member as its text."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {
            name: value.spec(self.wrapped_defaults) if isinstance(value, Member) else value
            for name, value in values.items()
        }

    def spec(self, always: Collection[str] = ()) -> str:
        """The text that makes it again: its name, and the options that differ from their defaults.

        Args:
            always: options that are written even if they do not differ.
        """
        defaults = type(self)().options()
        changed = {
            name: value for name, value in self.options().items() if name in always or value != defaults[name]
        }
        return ":".join([self.name, *(f"{name}={_quoted(value)}" for name, value in changed.items())])


@dataclass(frozen=True)
class Registry(Generic[T]):
    """A family of frozen dataclasses with names.

    Attributes:
        kind: what a member is called in messages.
        base: the class that all members extend.
        table: where each member lives, as ``package.module:Class``.
        aliases: further names.
        group: the entry point group in which other packages name their members.
    """

    kind: str
    base: type[T]
    table: Mapping[str, str]
    group: str
    aliases: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def known(self) -> dict[str, str]:
        """The table with the members of other installed packages; ours keep their names."""
        found = {point.name: point.value for point in entry_points(group=self.group)}
        return {**found, **self.table}

    def find(self, name: str) -> type[T]:
        """The class behind a name.

        Raises:
            UsageError: for an unknown name, or one that another package gives to something else.
        """
        name = self.aliases.get(name, name)
        if name not in self.known:
            raise UsageError(
                f"unknown {self.kind} {name!r}{_closest(name, self.known)}; known: {', '.join(self.known)}"
            )
        place = self.known[name]
        module, _, attribute = place.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"{self.kind} {name!r} is {place}, which cannot be imported: {error}; "
                "install or remove the package that names it"
            ) from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise UsageError(
                f"{self.kind} {name!r} is {place}, which does not extend {self.base.__name__}; "
                "install or remove the package that names it"
            )
        return found

    def get(self, name: str, **options: Any) -> T:
        """Build a member from its name and options; text values are converted to the option's type.

        Raises:
            UsageError: for an unknown name or option, or a value that the option cannot take.
        """
        cls = self.find(name)
        hints = get_type_hints(cls)
        fields = {entry.name: hints[entry.name] for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
        wrapped = getattr(cls, "wrapped_defaults", {})
        values = {}
        for option, value in options.items():
            if option not in fields:
                raise UsageError(
                    f"{name} has no option {option!r}{_closest(option, fields)}; its options: {', '.join(fields)}"
                    + self._elsewhere(option)
                )
            values[option] = self._convert(name, option, value, fields[option], wrapped)
        return cls(**values)

    def parse(self, text: str, **defaults: Any) -> T:
        """Build a member from ``name:option=value:option=value``.

        A value that holds a separator stands in parentheses: ``twilight:base=(quest:budget=0.25):p=0.95``.

        Raises:
            UsageError: if the text is malformed, and as :meth:`get` does.
        """
        name, *parts = split(text, ":")
        return self.get(name, **{**defaults, **parse_options(parts)})

    def _convert(self, name: str, option: str, value: Any, kind: Any, wrapped: Mapping[str, Any]) -> Any:
        if not isinstance(value, str):
            return value
        if isinstance(kind, type) and issubclass(kind, self.base):
            return self._parse_wrapped(value, wrapped)
        try:
            return _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UsageError(f"{name}: {option}={value!r} is not of type {kind.__name__}") from None

    def _elsewhere(self, option: str) -> str:
        """Which members of the table have an option that another one lacks."""
        having = [
            name
            for name in self.table
            if option in {entry.name for entry in dataclasses.fields(self.find(name))}  # type: ignore[arg-type]
        ]
        return f"; {option} is an option of {', '.join(having)}" if having else ""

    def _parse_wrapped(self, text: str, defaults: Mapping[str, Any]) -> T:
        """A member that another one wraps; ``defaults`` hold where it has such an option and its text is silent."""
        cls = self.find(split(text, ":")[0])
        if not getattr(cls, "selects", True):
            return self.parse(text)  # as it is: what is wrong with it is that it cannot be wrapped
        options = {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return self.parse(text, **{name: value for name, value in defaults.items() if name in options})


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_options(parts: Iterable[str]) -> dict[str, str]:
    """``["p=0.9", "sink=8"]`` as a dictionary.

    Raises:
        UsageError: if a part is not of this form.
    """
    options = {}
    for part in parts:
        option, separator, value = part.partition("=")
        if not separator or not option or not value:
            raise UsageError(f"{part!r} is not of the form option=value")
        options[option] = value[1:-1] if value.startswith("(") and value.endswith(")") else value
    return options


def split(text: str, separator: str) -> list[str]:
    """``text`` cut at ``separator``, but not inside parentheses.

    Raises:
        UsageError: if the parentheses do not match.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UsageError(f"the parentheses in {text!r} do not match")
    return parts


def _quoted(value: object) -> str:
    """An option's value as it stands in a member's text: in parentheses where it holds a separator."""
    text = str(value)
    return f"({text})" if set(text) & set(":,=") else text


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
