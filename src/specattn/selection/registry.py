"""Names of methods, and their options from text: ``specattn:p=0.9:sink=8``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_type_hints

from specattn.errors import UsageError
from specattn.selection.base import Method

METHODS: dict[str, str] = {
    "dense": "specattn.selection.dense:Dense",
    "specattn": "specattn.selection.specattn:SpecAttn",
    "specattn-paper": "specattn.selection.specattn:SpecAttnPaper",
    "streaming": "specattn.selection.streaming:Streaming",
    "longformer": "specattn.selection.longformer:Longformer",
    "bigbird": "specattn.selection.bigbird:BigBird",
    "random": "specattn.selection.random:Random",
    "topk": "specattn.selection.topk:TopK",
    "oracle": "specattn.selection.oracle:Oracle",
}
"""Where each method lives; its module is imported when it is asked for."""


def method_class(name: str) -> type[Method]:
    """The class behind a method's name.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{_closest(name, METHODS)}; known: {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls


def get_method(name: str, **options: Any) -> Method:
    """Build a method from its name and options; text values are converted to the option's type.

    Raises:
        UsageError: for an unknown method or option, or a value that the option cannot take.
    """
    cls = method_class(name)
    hints = get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    values = {}
    for option, value in options.items():
        if option not in fields:
            raise UsageError(
                f"{name} has no option {option!r}{_closest(option, fields)}; its options: {', '.join(fields)}"
            )
        values[option] = _convert(name, option, value, fields[option])
    return cls(**values)


def parse_method(text: str, **defaults: Any) -> Method:
    """Build a method from ``name:option=value:option=value``.

    Raises:
        UsageError: if the text is malformed, and as :func:`get_method` does.
    """
    name, *parts = text.split(":")
    return get_method(name, **{**defaults, **parse_options(parts)})


def parse_options(parts: list[str]) -> dict[str, str]:
    """``["p=0.9", "sink=8"]`` as a dictionary."""
    options = {}
    for part in parts:
        option, separator, value = part.partition("=")
        if not separator or not option or not value:
            raise UsageError(f"{part!r} is not of the form option=value")
        options[option] = value
    return options


def split_methods(text: str) -> list[str]:
    """Split ``a:x=1,b:y=2`` at its commas, but not at those inside parentheses."""
    names, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]


def _convert(method: str, option: str, value: Any, kind: type) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                value.lower()
            ]
        return kind(value)
    except (ValueError, KeyError):
        raise UsageError(f"{method}: {option}={value!r} is not of type {kind.__name__}") from None


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
