"""Echoes in the lists of ``specattn``: beside what the draft says, with a weight of their own, in any kind of list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import tiny_mapping, tiny_pair

from specattn.errors import UsageError
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.kernels.echoes import echo_mask, echoes_reference
from specattn.selection.base import RoundState, Selection
from specattn.selection.registry import parse_method
from specattn.selection.specattn import SpecAttn

GAMMA, CONTEXT, ROUNDS = 3, 120, 2
TOKENS = torch.randint(3, 20, (CONTEXT + 1,), generator=torch.Generator().manual_seed(4))
SEEN: list[tuple[int, Selection]] = []


@dataclass(frozen=True)
class Watched(SpecAttn):
    """Keeps the lists of each round."""

    name: ClassVar[str] = "watched"

    def prepare(self, state: RoundState):
        lists = super().prepare(state)
        assert isinstance(lists, Selection)
        SEEN.append((int(state.starts[0]), lists))
        return lists


def lists_of(**options: object) -> tuple[float, list[tuple[int, Selection]]]:
    """The KV bytes that are read, and the lists of each round."""
    SEEN.clear()
    pair = tiny_pair()
    given = {"context": CONTEXT, "rows": ROUNDS * (GAMMA + 1), "gamma": GAMMA, "mapping": tiny_mapping(pair)}
    document = Document("text", TOKENS.tolist())
    (result,) = evaluate(pair, [document], [Watched(sink=1, window=2, **options)], **given)
    return result.kv_read_fraction, list(SEEN)


def masks(lists: Selection) -> torch.Tensor:
    """Bool ``[layers, kv_heads, CONTEXT]``."""
    flat = Selection(lists.indices[0], lists.counts[0])
    return flat.to_mask(CONTEXT)


@pytest.mark.parametrize("options", [{"p": 0.3}, {"p": 0.3, "tail": 6.0}, {"rate": 0.05}])
def test_lists_hold_echoes_with_certainty(options):
    few, usual = lists_of(**options)
    more, echoing = lists_of(echo=2, **options)
    assert len(usual) == len(echoing) == ROUNDS and more > few
    for (start, plain), (again, lists) in zip(usual, echoing, strict=True):
        assert start == again
        text = TOKENS[None].int()
        found = echoes_reference(text, torch.tensor([0]), torch.tensor([start]), GAMMA + 1, 2)
        echoes = echo_mask(found, CONTEXT)[0]
        assert masks(lists)[..., echoes].all() and not masks(plain)[..., echoes].all()
        if lists.log_weights is None:
            assert torch.equal(masks(lists), masks(plain) | echoes)
        else:
            listed = lists.indices[0]
            certain = (listed >= 0) & echoes[listed.clamp(min=0)]
            assert (lists.log_weights[0][certain] == 0).all()


def test_a_negative_number_is_refused():
    with pytest.raises(UsageError, match="echo=-1"):
        parse_method("specattn:echo=-1")
    with pytest.raises(UsageError, match="echo=-1"):
        parse_method("self:echo=-1")
