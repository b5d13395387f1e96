"""Attention over vertical and slash lines against a float64 reading of the definition, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specattn.kernels import line_attention as module
from specattn.kernels.check import error_ratio
from specattn.kernels.line_attention import Lines, line_attention

SCALING = 0.4


def random_lines(heads: int, length: int, share: float = 0.1) -> Lines:
    verticals, slashes = torch.rand(2, heads, length) < share
    return Lines(verticals, slashes)


def reads(lines: Lines, head: int, row: int, key: int, start: int, block: int) -> bool:
    """Whether a row reads a key: a vertical, its own block, or what a row of its block has at a slash's distance."""
    first = start + (row - start) // block * block
    if key > row:
        return False
    if key >= first or lines.verticals[head, key]:
        return True
    return any(
        lines.slashes[head, r - key] for r in range(first, first + block) if r - key < lines.slashes.shape[1]
    )


def visible(lines: Lines, head: int, start: int, rows: int, block: int) -> Tensor:
    keys = range(start + rows)
    return torch.tensor(
        [[reads(lines, head, start + row, key, start, block) for key in keys] for row in range(rows)]
    )


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,start,block", [(37, 0, 8), (16, 13, 8), (5, 30, 16), (1, 0, 4), (23, 9, 1)])
def test_it_is_the_definition(heads: int, rows: int, start: int, block: int) -> None:
    torch.manual_seed(rows + heads)
    length = start + rows
    query, (key, value) = torch.randn(rows, heads, 16), torch.randn(2, length, 16)
    lines = random_lines(heads, length)
    out = line_attention(query, key, value, lines, start=start, scaling=SCALING, block=block)
    products = lines.products(start, rows, block)
    for head in range(heads):
        mask = visible(lines, head, start, rows, block)
        logits = query[:, head].double() @ key.double().T * SCALING
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        assert error_ratio(out[:, head], weights @ value.double()) < 1e-5
        assert products[head] == mask.sum()


def test_without_lines_a_row_reads_its_block_up_to_itself() -> None:
    torch.manual_seed(1)
    query, (key, value) = torch.randn(10, 1, 8), torch.randn(2, 10, 8)
    none = Lines(torch.zeros(1, 10, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool))
    out = line_attention(query, key, value, none, start=0, scaling=SCALING, block=4)
    assert error_ratio(out[[0, 4, 8], 0], value[[0, 4, 8]]) < 1e-6
    assert none.products(0, 10, 4).tolist() == [10 + 10 + 3]


def test_memory_is_bounded_by_groups_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    query, (key, value) = torch.randn(41, 3, 8), torch.randn(2, 50, 8)
    lines = random_lines(3, 50)
    options = {"start": 9, "scaling": SCALING, "block": 8}
    whole, products = line_attention(query, key, value, lines, **options), lines.products(9, 41, 8)
    largest = []
    keys = Lines.keys

    def watched(self: Lines, first: Tensor, block: int) -> Tensor:
        largest.append(len(first))
        return keys(self, first, block)

    monkeypatch.setattr(Lines, "keys", watched)
    monkeypatch.setitem(module.GROUP_LOGITS, "cpu", 2 * 3 * 8 * 50)
    assert error_ratio(line_attention(query, key, value, lines, **options), whole) < 1e-6
    assert largest == [2, 2, 2]
    assert torch.equal(lines.products(9, 41, 8), products)


def test_bfloat16_comes_back_as_bfloat16() -> None:
    torch.manual_seed(3)
    query, (key, value) = torch.randn(12, 2, 8), torch.randn(2, 12, 8)
    lines = random_lines(2, 12, 0.5)
    options = {"start": 0, "scaling": SCALING, "block": 4}
    rounded = [tensor.bfloat16() for tensor in (query, key, value)]
    out = line_attention(*rounded, lines, **options)
    assert out.dtype == torch.bfloat16
    assert error_ratio(out, line_attention(*(each.float() for each in rounded), lines, **options)) < 4e-3
