"""Which mapping a method will use on a pair."""

from __future__ import annotations

from specattn.errors import UsageError
from specattn.mapping.artifact import Mapping
from specattn.pairs import FoundPair, Pair
from specattn.selection.base import Method, Need


def resolve_mapping(pair: Pair | FoundPair, method: Method, mapping: Mapping | None) -> Mapping | None:
    """The mapping that ``method`` will use on ``pair``: the one given, or the pair's own; ``None`` if it needs none.

    Raises:
        UsageError: if the method needs a draft or a mapping and there is none, or the mapping is another pair's.
    """
    if Need.DRAFT in method.needs and pair.draft is None:
        raise UsageError(
            f"method {method.name!r} reads where the draft looks, and there is no draft; "
            "give one (--draft), or use a method that needs none: dense, streaming"
        )
    if Need.MAPPING not in method.needs:
        return None
    if mapping is None and pair.mapping_file is not None:
        mapping = Mapping.load(pair.mapping_file)
    if mapping is None:
        raise UsageError(
            f"method {method.name!r} needs a mapping calibrated for {pair.name}; make one with "
            "`specattn calibrate --text FILE --out mapping.safetensors` and pass it with --mapping"
        )
    assert pair.draft is not None
    mapping.check(pair.target.config, pair.draft.config)
    return mapping
