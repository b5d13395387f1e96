"""One more step of the draft, for the attention of the round's last row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import tiny_mapping, tiny_pair
from torch import Tensor

from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.selection.base import RoundState
from specattn.selection.specattn import SpecAttn

GAMMA = 3
SEEN: list[tuple[int, Tensor]] = []


@dataclass(frozen=True)
class Watched(SpecAttn):
    """Keeps what each round's rows saw of the draft."""

    name: ClassVar[str] = "watched"

    def prepare(self, state: RoundState):
        assert state.draft is not None
        SEEN.append((int(state.starts[0]), state.draft.probabilities[0].clone()))
        return super().prepare(state)


def rounds(run) -> list[tuple[int, Tensor]]:
    SEEN.clear()
    run()
    return list(SEEN)


def evaluated(every_row: bool):
    pair = tiny_pair()
    tokens = torch.randint(3, 90, (61,), generator=torch.Generator().manual_seed(4)).tolist()
    method = Watched(p=0.8, every_row=every_row)
    options = {"context": 60, "rows": 2 * (GAMMA + 1), "gamma": GAMMA, "mapping": tiny_mapping(pair)}
    (result,) = evaluate(pair, [Document("text", tokens)], [method], **options)
    return result


def test_the_other_rows_stay_and_the_last_sees_one_token_more():
    usual, more = rounds(lambda: evaluated(False)), rounds(lambda: evaluated(True))
    assert len(usual) == len(more) == 2
    for (start, few), (again, many) in zip(usual, more, strict=True):
        assert start == again and len(few) == GAMMA and len(many) == GAMMA + 1
        torch.testing.assert_close(many[:GAMMA], few)
        torch.testing.assert_close(many.sum(-1), torch.ones_like(many[..., 0]))
        seen = (many > 0).any(1).sum(-1).tolist()
        assert seen == [start + row + 1 for row in range(GAMMA + 1)]


def test_the_draft_reads_one_step_more():
    few, more = evaluated(False).draft_read_fraction, evaluated(True).draft_read_fraction
    assert more / few == pytest.approx((GAMMA + 1) / GAMMA, rel=0.03)


def test_decoding_predicts_every_row_too_and_proposes_the_same():
    pair = tiny_pair()
    results = {}

    def run(every_row: bool) -> None:
        method = Watched(p=1.0, every_row=every_row)
        options = {"gamma": GAMMA, "mapping": tiny_mapping(pair), "max_new_tokens": 12}
        results[every_row] = generate(pair, "a tiny text", method=method, **options)

    usual, more = rounds(lambda: run(False)), rounds(lambda: run(True))
    assert results[False].tokens == results[True].tokens
    assert [start for start, _ in usual] == [start for start, _ in more]
    for (_, few), (_, many) in zip(usual, more, strict=True):
        assert len(many) == len(few) + 1
        torch.testing.assert_close(many[:-1], few)
        torch.testing.assert_close(many.sum(-1), torch.ones_like(many[..., 0]))
