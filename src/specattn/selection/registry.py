"""The selection methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specattn.registry import Registry, parse_options, split
from specattn.selection.base import Method

__all__ = [
    "METHODS",
    "REGISTRY",
    "SWEPT",
    "get_method",
    "method_class",
    "parse_method",
    "parse_options",
    "short_name",
    "split_methods",
]

METHODS: dict[str, str] = {
    "dense": "specattn.selection.dense:Dense",
    "specattn": "specattn.selection.specattn:SpecAttn",
    "specattn-paper": "specattn.selection.specattn:SpecAttnPaper",
    "self": "specattn.selection.self:Self",
    "streaming": "specattn.selection.streaming:Streaming",
    "longformer": "specattn.selection.longformer:Longformer",
    "bigbird": "specattn.selection.bigbird:BigBird",
    "random": "specattn.selection.random:Random",
    "quest": "specattn.selection.quest:Quest",
    "twilight": "specattn.selection.twilight:Twilight",
    "h2o": "specattn.selection.h2o:H2O",
    "snapkv": "specattn.selection.snapkv:SnapKV",
    "topk": "specattn.selection.topk:TopK",
    "oracle": "specattn.selection.oracle:Oracle",
    "vattention": "specattn.selection.vattention:VAttention",
}
"""Where each method lives; its module is imported when it is asked for."""

REGISTRY = Registry(
    "method", Method, METHODS, group="specattn.methods", aliases={"full": "dense", "topp": "oracle"}
)


def method_class(name: str) -> type[Method]:
    """The class behind a method's name, see :meth:`specattn.registry.Registry.find`."""
    return REGISTRY.find(name)


def get_method(name: str, **options: Any) -> Method:
    """Build a method from its name and options, see :meth:`specattn.registry.Registry.get`."""
    return REGISTRY.get(name, **options)


def parse_method(text: str, **defaults: Any) -> Method:
    """Build a method from ``name:option=value``, see :meth:`specattn.registry.Registry.parse`."""
    return REGISTRY.parse(text, **defaults)


def split_methods(text: str) -> list[str]:
    """Split ``a:x=1,b:y=2`` at its commas, but not at those inside parentheses."""
    return [name.strip() for name in split(text, ",") if name.strip()]


SWEPT = ("p", "budget", "eps", "rate")
"""Options that are swept to trace a frontier."""


def short_name(name: str, options: Mapping[str, object]) -> str:
    """A method for a reader: ``specattn p=0.9 map=global``.

    Named are the options that are swept, unless they are 0, the method that is wrapped, and what differs from its
    default.
    """
    defaults = method_class(name)().options()
    shown = {
        option: value
        for option, value in options.items()
        if (option in (*SWEPT, "base") and value) or value != defaults.get(option)
    }
    return " ".join([name, *(f"{option}={value}" for option, value in shown.items())])
