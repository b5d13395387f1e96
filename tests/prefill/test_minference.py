"""MInference against plain readings of the paper's definitions, on heads of a known pattern, and its options."""

from __future__ import annotations

import pytest
import torch
from known_heads import LENGTH, call_of, slash_head, topic_head, vertical_head
from prefill_calls import causal_logits, masked_attention, random_call
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall
from specattn.prefill.head_patterns import HeadPattern
from specattn.prefill.lines import diagonal_sums
from specattn.prefill.minference import MInference
from specattn.prefill.registry import parse_prefill

BLOCK = 16


def heaviest(scores: list[float], count: int, forced: int) -> set[int]:
    """The ``count`` best places, the first ``forced`` of them in any case."""
    order = sorted(range(len(scores)), key=lambda place: (place >= forced, -scores[place]))
    return set(order[: max(count, min(forced, len(scores)))])


def lines(call: PrefillCall, head: int, vertical: int, slash: int, last: int, sink: int, window: int):
    """The verticals and slashes of the last queries, summed one product at a time."""
    probabilities = causal_logits(call, head).softmax(-1)[-last:]
    length = len(call.key)
    by_key, by_distance = [0.0] * length, [0.0] * length
    for row, weights in enumerate(probabilities.tolist()):
        position = length - len(probabilities) + row
        for key in range(position + 1):
            by_key[key] += weights[key]
            by_distance[position - key] += weights[key]
    return heaviest(by_key, vertical, sink), heaviest(by_distance, slash, window)


def line_mask(call: PrefillCall, verticals: set[int], slashes: set[int]) -> Tensor:
    """What rows read: verticals, the tiles of their block's slashes, their own block; up to themselves."""
    rows, length = len(call.query), len(call.key)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for first in range(0, rows, BLOCK):
        start = call.start + first
        tiles = {start + row - distance for distance in slashes for row in range(BLOCK)}
        keys = verticals | tiles | set(range(start, start + BLOCK))
        for row in range(first, min(first + BLOCK, rows)):
            for key in keys:
                if 0 <= key <= call.start + row:
                    mask[row, key] = True
    return mask


@pytest.mark.parametrize("group", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,start", [(93, 0), (64, 32), (41, 57), (3, 90)])
def test_vertical_slash_is_the_definition(group: int, rows: int, start: int) -> None:
    torch.manual_seed(rows * group)
    call = random_call(rows, start, group, 1)
    out = MInference(vertical=7, slash=5, last=12, sink=2, window=3, block=BLOCK).attention(call).out
    for head in range(group):
        mask = line_mask(call, *lines(call, head, 7, 5, 12, 2, 3))
        assert error_ratio(out[:, head], masked_attention(call, head, mask)) < 1e-5


class BlockSparse(MInference):
    def heads(self, call: PrefillCall) -> list[HeadPattern]:
        return [HeadPattern("block-sparse", blocks=2)] * call.query.shape[1]


@pytest.mark.parametrize("group", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,start", [(93, 0), (64, 32), (40, 48)])
def test_block_sparse_is_the_definition(group: int, rows: int, start: int) -> None:
    torch.manual_seed(rows * group)
    call = random_call(rows, start, group, 1)
    out = BlockSparse(block=BLOCK).attention(call).out
    for head in range(group):
        mask = torch.zeros(rows, start + rows, dtype=torch.bool)
        for first in range(0, rows, BLOCK):
            query = call.query[first : first + BLOCK, head].mean(0)
            own = (start + first) // BLOCK
            products = [float(query @ call.key[j * BLOCK : (j + 1) * BLOCK, 0].mean(0)) for j in range(own)]
            best = sorted(range(own), key=lambda block: -products[block])[:1]  # its own is the other one
            for row in range(first, min(first + BLOCK, rows)):
                for block in [*best, own]:
                    mask[row, block * BLOCK : min((block + 1) * BLOCK, start + row + 1)] = True
        assert error_ratio(out[:, head], masked_attention(call, head, mask)) < 1e-5


@pytest.mark.parametrize("rows,start", [(93, 0), (41, 57)])
def test_a_shape_is_sink_and_window(rows: int, start: int) -> None:
    class Shape(MInference):
        def heads(self, call: PrefillCall) -> list[HeadPattern]:
            return [HeadPattern("a-shape", 3, 20)] * call.query.shape[1]

    torch.manual_seed(rows)
    call = random_call(rows, start, 3, 1)
    out = Shape(block=BLOCK).attention(call).out
    mask = line_mask(call, {0, 1, 2}, set(range(20)))
    for head in range(3):
        assert error_ratio(out[:, head], masked_attention(call, head, mask)) < 1e-5


def test_sums_along_the_diagonals() -> None:
    torch.manual_seed(0)
    for rows, length in ((1, 1), (1, 6), (4, 4), (3, 7)):
        matrix = torch.rand(rows, length).tril(length - rows)
        expected = [0.0] * length
        for row in range(rows):
            for key in range(length - rows + row + 1):
                expected[length - rows + row - key] += float(matrix[row, key])
        assert diagonal_sums(matrix).tolist() == pytest.approx(expected)


def dense(call: PrefillCall) -> Tensor:
    return dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling)


def test_vertical_and_slash_lines_are_found() -> None:
    torch.manual_seed(1)
    call = call_of(vertical_head([7, 200, 201, 390]), slash_head(250))
    output = MInference(vertical=8, slash=3, sink=2, window=2, block=BLOCK).attention(call)
    exact = dense(call)
    assert error_ratio(output.out[:, 0], exact[:, 0]) < 1e-3
    assert error_ratio(output.out[300:, 1], exact[300:, 1]) < 1e-3
    # The last queries take a fifth of the products; lines and own blocks little more.
    last = sum(range(LENGTH - 63, LENGTH + 1)) / (LENGTH * (LENGTH + 1) / 2)
    assert last < output.computed < last + 0.15


def test_blocks_of_one_topic_are_found() -> None:
    class Blocks(MInference):
        def heads(self, call: PrefillCall) -> list[HeadPattern]:
            return [HeadPattern("block-sparse", blocks=10)]

    torch.manual_seed(2)
    call = call_of(topic_head())
    output = Blocks(block=BLOCK).attention(call)
    assert error_ratio(output.out, dense(call)) < 1e-3
    assert output.computed < 0.5


@pytest.mark.parametrize(
    "spec,named",
    [
        ("minference:vertical=0", "vertical=0"),
        ("minference:slash=1.5", "slash=1.5"),
        ("minference:slash=-3", "slash=-3"),
        ("minference:last=0", "last=0"),
        ("minference:sink=-1", "sink=-1"),
        ("minference:window=-1", "window=-1"),
        ("minference:block=0", "block=0"),
        ("minference:ratio=0", "ratio=0"),
        ("minference:verticals=3", "vertical"),
        ("minference:tuned=heads.json:slash=100", "leave out"),
    ],
)
def test_bad_options_are_refused(spec: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse_prefill(spec)


def test_the_default_is_the_released_one() -> None:
    torch.manual_seed(3)
    call = random_call(1, 6999, 2, 1)
    assert MInference().heads(call) == [HeadPattern("vertical-slash", 1000, 6096)] * 2
    assert MInference(vertical=0.01, ratio=2).heads(call) == [HeadPattern("vertical-slash", 140, 12192)] * 2
