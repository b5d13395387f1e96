"""The Triton top-p and top-k against their references: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus import nucleus, top_k
from specattn.selection.base import Selection

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from specattn.kernels.nucleus_lists import (
    BLOCKS,
    LONG_BLOCKS,
    STREAMED_BLOCKS,
    choose_blocks,
    empty_lists,
    nucleus_lists,
    top_k_lists,
)
from specattn.kernels.threshold_triton import Blocks

# The interpreter computes with NumPy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAN, INF = float("nan"), float("inf")
POISON = 123_456_789
SLACK = 1e-5
"""How far the p of the nucleus that is kept may be from the one that was asked for."""

WHOLE = Blocks(resident=1024, tile=1024, warps=1, registers=128)
PARTS = Blocks(resident=256, tile=128, warps=1, registers=128)
WARPS = Blocks(resident=512, tile=512, warps=2, registers=128)
WIDE = Blocks(resident=1024, tile=512, warps=2, registers=128, vector=8)
LONG = Blocks(resident=65536, tile=65536, warps=16, registers=128) if not GPU else LONG_BLOCKS


def poisoned(scores: Tensor, capacity: int) -> Selection:
    out = empty_lists(scores, capacity)
    out.indices.fill_(POISON)
    out.counts.fill_(POISON)
    return out


def run(function, scores, limit, lengths, capacity=None, blocks=PARTS, **forced):
    """The lists, on the CPU, written over a poisoned output."""
    capacity = scores.shape[-1] if capacity is None else capacity
    scores = scores.to(DEVICE)
    limit = limit.to(DEVICE) if isinstance(limit, Tensor) else limit
    out = poisoned(scores, capacity)
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=DEVICE)
    got = function(scores, limit, lengths, capacity=capacity, out=out, blocks=blocks, **forced)
    assert got is out
    return Selection(out.indices.cpu(), out.counts.cpu())


def mask_of(lists: Selection, length: int) -> Tensor:
    """The positions of well-formed lists: ascending, distinct, inside of the row, the tail -1."""
    indices, counts = lists.indices, lists.counts
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    assert (indices[~used] == -1).all()
    assert ((indices[used] >= 0) & (indices[used] < length)).all()
    assert ((indices.diff() > 0) | ~used[..., 1:]).all()
    return lists.to_mask(length)


def assert_same(lists: Selection, mask: Tensor) -> None:
    assert torch.equal(mask_of(lists, mask.shape[-1]), mask)
    assert torch.equal(lists.counts, mask.sum(-1, dtype=torch.int32))


def assert_nucleus(lists: Selection, scores: Tensor, p, lengths, **forced) -> Tensor:
    """The mask of lists that lie between the nuclei of p a little smaller and a little larger."""
    mask, lengths = mask_of(lists, scores.shape[-1]), torch.as_tensor(lengths)
    assert torch.equal(lists.counts, mask.sum(-1, dtype=torch.int32))
    p = torch.as_tensor(p, dtype=torch.float64)
    assert (nucleus(scores, p * (1 - SLACK), lengths, **forced) <= mask).all()
    assert (mask <= nucleus(scores, p + SLACK, lengths, **forced)).all()
    return mask


def attention(*shape: int, temperature: float | Tensor = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * temperature).softmax(-1)


# Top-p


# Sums of these are exact in float32, if p is a multiple of 1/64: the lists must equal the reference's, ties and all.
dyadic = st.builds(lambda digits, exponent: digits * 2.0**exponent, st.integers(0, 3), st.integers(-9, 0))
rows = st.lists(st.lists(dyadic, min_size=40, max_size=40), min_size=2, max_size=2)


@settings(max_examples=8)
@given(rows, st.integers(1, 64), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_equals_the_reference_where_sums_are_exact(rows, steps, length, sink, recent):
    scores, lengths = torch.tensor(rows), torch.tensor([40, length])
    got = run(nucleus_lists, scores, steps / 64, lengths, sink=sink, recent=recent)
    assert_same(got, nucleus(scores, steps / 64, lengths, sink=sink, recent=recent))


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(1, PARTS), (127, PARTS), (129, WARPS), (700, PARTS), (700, WHOLE), (700, WARPS), (1700, WIDE)],
)
def test_rows_of_attention(length, blocks):
    """Flat to peaked, a p for each row."""
    temperature = torch.tensor([1e-3, 1.0, 3.0, 9.0])[:, None]
    scores = attention(1, 4, length, temperature=temperature, seed=length)
    p = torch.tensor([0.5, 0.9, 0.99, 0.9999])
    assert_nucleus(run(nucleus_lists, scores, p, [length], blocks=blocks), scores, p, [length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forced_positions_lengths_and_dtypes(dtype):
    """Sixteen bits mean ties in every row."""
    scores = attention(4, 2, 391, seed=1).to(dtype)
    lengths, forced = [391, 0, 5, 300], {"sink": 4, "recent": 9}
    got = run(nucleus_lists, scores, 0.8, lengths, **forced)
    mask = assert_nucleus(got, scores, 0.8, lengths, **forced)
    assert got.counts[1].tolist() == [0, 0]
    assert mask[2].sum(-1).tolist() == [5, 5]
    assert mask[0, :, :4].all() and mask[0, :, -9:].all() and mask[3, :, 291:300].all()


@pytest.mark.parametrize("sink,recent", [(300, 20), (20, 300), (0, 700), (350, 350)])
def test_forced_positions_that_reach_over_a_tile(sink, recent):
    scores = attention(1, 1, 700, seed=2)
    got = run(nucleus_lists, scores, 0.9, [690], sink=sink, recent=recent)
    assert_nucleus(got, scores, 0.9, [690], sink=sink, recent=recent)


def test_nothing_more_where_the_forced_positions_hold_enough():
    scores = torch.full((1, 600), 1e-3)
    scores[0, [0, 599]] = 10.0
    assert run(nucleus_lists, scores, 0.5, [600], sink=1, recent=1).indices[0, :3].tolist() == [0, 599, -1]


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-38, 1e-45])
def test_of_equal_weights_the_most_recent(value):
    scores = torch.full((2, 600), value)
    mask = mask_of(run(nucleus_lists, scores, 0.5, [600, 7]), 600)
    assert mask[0].nonzero().flatten().tolist() == list(range(300, 600))
    assert mask[1].nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_decimal_fractions_behave_as_written():
    p = torch.tensor([0.1, 0.3, 0.6, 0.7, 0.9])
    lists = run(nucleus_lists, torch.full((5, 10), 0.1), p, [10] * 5)
    assert lists.counts.tolist() == [1, 3, 6, 7, 9]


def test_ties_among_other_weights_are_cut_where_they_are_needed_no_more():
    """In the resident tile, between the tiles, and far behind."""
    scores = torch.full((3, 600), 1.0)
    scores[:, ::2] = 2.0**-30
    scores[:, 5] = 100.0
    kept = torch.tensor([290, 172, 50])
    p = (100 + kept) / (100 + 299 + 300 * 2**-30)
    mask = mask_of(run(nucleus_lists, scores, p, [600] * 3), 600)
    ties = [i for i in range(1, 600, 2) if i != 5]
    for row, count in zip(mask, kept, strict=True):
        assert row.nonzero().flatten().tolist() == sorted([5, *ties[-count:]])


def test_a_sink_of_nearly_everything():
    tail = torch.arange(1, 900, dtype=torch.float64).pow(-1.1)
    scores = torch.cat([torch.tensor([0.9]), 1e-3 * tail / tail.sum()]).float()[None]
    mask = assert_nucleus(run(nucleus_lists, scores, 0.9995, [900]), scores, 0.9995, [900])
    assert mask[0, 0] and 10 < mask.sum() < 300


def test_tiny_probabilities_beside_large_ones():
    row = [1e-45, 1.0, 1e-38, 0.0, 1e-30, 1e-38, -0.0, 1e-45]
    without = [0.0 if weight == 1.0 else weight for weight in row]
    mask = mask_of(run(nucleus_lists, torch.tensor([row, without]), 0.999, [8, 8]), 8)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[1], [4]]


def test_zeros_and_negative_weights_are_never_needed():
    scores = torch.tensor([[0.0, 0.5, -0.0, 0.5, -3.0, -INF]])
    assert run(nucleus_lists, scores, 0.999999, [6]).indices[0].tolist() == [1, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("forced", [{}, {"sink": 4, "recent": 9}, {"sink": 280}, {"sink": 3, "recent": 690}])
def test_negative_weights_in_tiles_that_are_read_again(forced):
    """Such tiles are searched as they are, up to the first -inf; a sink may reach beyond the resident one."""
    scores, lengths = attention(3, 701, seed=6), [701, 701, 699]
    scores[0, ::17] = -INF
    scores[1, ::3] *= -1
    scores[2, 5:350] = 0.0
    lists = run(nucleus_lists, scores, 0.9, lengths, **forced)
    assert_nucleus(lists, scores, 0.9, lengths, **forced)


@pytest.mark.parametrize("place", [5, 300, 699])
def test_nan_in_any_tile_keeps_everything_visible(place):
    scores = attention(1, 700)
    scores[0, [17, 450]] = -1.0
    scores[0, place] = NAN
    assert run(nucleus_lists, scores, 0.5, [700], sink=2).counts.tolist() == [700]


@pytest.mark.parametrize("bad", [0.0, NAN, -NAN, INF])
def test_a_row_without_a_finite_mass_keeps_everything_visible_and_only_that_row(bad):
    scores = torch.tensor([[0.1, 0.8, 0.1, 0.0], [0.0, bad, 0.0, 0.0], [0.1, 0.1, 0.8, 0.0]])
    lists = run(nucleus_lists, scores, 0.5, [4, 3, 4])
    assert lists.indices.tolist() == [[1, -1, -1, -1], [0, 1, 2, -1], [2, -1, -1, -1]]


def test_a_nan_among_the_forced_positions_keeps_everything():
    scores = attention(1, 500)
    scores[0, 499] = NAN
    assert run(nucleus_lists, scores, 0.5, [500], recent=3).counts.tolist() == [500]


def test_p_of_1_is_everything_visible():
    scores = attention(3, 300)
    scores[:, 5] = 0.0
    lists = run(nucleus_lists, scores, torch.tensor([1.0, 2.0, INF]), [300, 290, 0], sink=2, recent=3)
    assert lists.counts.tolist() == [300, 290, 0]
    assert (mask_of(lists, 300).sum(-1) == lists.counts).all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_what_lies_beyond_the_length_does_not_matter(poison):
    scores = attention(1, 2, 700)
    clean = scores.clone()
    scores[..., 391:] = poison
    for blocks in (WHOLE, PARTS):
        assert_nucleus(run(nucleus_lists, scores, 0.7, [391], blocks=blocks), clean, 0.7, [391])


# Rows as they lie, and lists that are too short


def test_rows_of_a_larger_buffer():
    """A layer of a buffer with room for more: two strides, odd ones, and rows of an odd length."""
    buffer = attention(2, 5, 3, 401, seed=4)
    scores = buffer[:, 2, :, :333]
    assert not scores.is_contiguous()
    assert_nucleus(run(nucleus_lists, scores, 0.8, [333, 200]), scores, 0.8, [333, 200])


def test_leading_dimensions_and_a_p_for_some_of_them():
    scores = attention(2, 2, 3, 130, seed=5)
    p = torch.tensor([[0.3], [0.95]])
    assert_nucleus(run(nucleus_lists, scores, p, [130, 77]), scores, p, [130, 77])


def test_entries_of_a_larger_buffer():
    """Lists of some entries in any order, one of them twice, as of a copy of them; the rest is not read."""
    scores, entries = attention(5, 2, 3, 300, seed=6), torch.tensor([4, 0, 2, 4])
    chosen, lengths = scores[entries], [300, 20, 0, 150]
    scores[[1, 3]] = NAN
    out = poisoned(chosen.to(DEVICE), 300)
    at = {"lengths": torch.tensor(lengths, device=DEVICE), "entries": entries.to(DEVICE)}
    nucleus_lists(scores.to(DEVICE), 0.8, capacity=300, sink=2, recent=5, out=out, blocks=PARTS, **at)
    wanted = run(nucleus_lists, chosen, 0.8, lengths, sink=2, recent=5)
    assert torch.equal(out.indices.cpu(), wanted.indices) and torch.equal(out.counts.cpu(), wanted.counts)


@pytest.mark.parametrize("length", [300, 3000])
def test_what_follows_a_list_can_stay_as_it_is(length):
    scores = attention(2, 3, length, seed=6).to(DEVICE)
    lengths = torch.tensor([length, 20], device=DEVICE)
    filled, left = poisoned(scores, length), poisoned(scores, length)
    for out, fill in ((filled, True), (left, False)):
        nucleus_lists(scores, 0.8, lengths, capacity=length, out=out, fill=fill)
    behind = torch.arange(length, device=DEVICE) >= filled.counts[..., None]
    assert torch.equal(left.counts, filled.counts) and behind.any()
    assert torch.equal(left.indices, filled.indices.masked_fill(behind, POISON))
    assert torch.equal(left.padded().indices, filled.indices)


def test_lists_lie_beside_each_other_untouched():
    scores = attention(2, 3, 300, seed=6).to(DEVICE)
    buffer = torch.full((8, 40), POISON, dtype=torch.int32, device=DEVICE)
    counts = torch.full((8,), POISON, dtype=torch.int32, device=DEVICE)
    out = Selection(buffer[1:7].view(2, 3, 40), counts[1:7].view(2, 3))
    lengths = torch.tensor([300, 20], device=DEVICE)
    nucleus_lists(scores, 0.9, lengths, capacity=40, out=out, blocks=PARTS)
    assert (buffer[[0, 7]] == POISON).all() and (counts[[0, 7]] == POISON).all()
    assert (buffer[1:7] != POISON).all() and (counts[1:7] <= 40).all()


@pytest.mark.parametrize("p", [0.99, 1.0])
@pytest.mark.parametrize("sink,recent", [(0, 0), (3, 10)])
def test_a_nucleus_beyond_the_capacity_keeps_the_heaviest_and_what_is_forced(p, sink, recent):
    scores = attention(3, 1, 600, temperature=0.5, seed=7).bfloat16()
    lengths = torch.tensor([600, 480, 50])
    lists = run(nucleus_lists, scores, p, lengths, capacity=64, sink=sink, recent=recent)
    mask = mask_of(lists, 600)
    assert lists.counts.flatten().tolist()[:2] == [64, 64]
    expected = top_k(scores, 64, lengths, sink=sink, recent=recent)
    fits = nucleus(scores, p, lengths, sink=sink, recent=recent).sum(-1, keepdim=True) <= 64
    assert torch.equal(mask, torch.where(fits, mask, expected))


def test_everything_beyond_the_capacity_with_nan_and_zeros():
    """NaN ranks with infinity, zeros come last, the most recent ones of equals first."""
    scores = torch.zeros(2, 500)
    scores[0, [30, 400]] = NAN
    scores[0, 350] = INF
    scores[:, 17] = 2.0
    lists = run(nucleus_lists, scores, torch.tensor([0.5, 1.0]), [500, 450], capacity=5, recent=1)
    assert lists.indices.tolist() == [[17, 30, 350, 400, 499], [17, 446, 447, 448, 449]]


@pytest.mark.parametrize("blocks", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_infinite_score_makes_the_list_whole(dtype, blocks):
    """A request without scores has zeros and, at its first token, which is forced, infinity."""
    scores = torch.zeros(2, 2, 600, dtype=dtype)
    scores[:, :, 0] = INF
    lists = run(nucleus_lists, scores, 0.5, [470, 1], blocks=blocks, sink=4, recent=30)
    assert lists.counts.tolist() == [[470] * 2, [1] * 2]
    assert torch.equal(mask_of(lists, 600), nucleus(scores, 0.5, torch.tensor([470, 1]), sink=4, recent=30))


def test_capacity_of_just_what_is_forced():
    scores = attention(1, 300)
    lists = run(nucleus_lists, scores, 0.99, [300], capacity=6, sink=2, recent=4)
    assert lists.indices.tolist() == [[0, 1, 296, 297, 298, 299]]


# Top-k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [WHOLE, PARTS], ids=["whole", "parts"])
def test_top_k_equals_the_reference(dtype, blocks):
    scores = attention(2, 2, 500, seed=8).to(dtype)
    k, lengths, forced = torch.tensor([1, 133]), [500, 301], {"sink": 4, "recent": 8}
    assert_same(run(top_k_lists, scores, k, lengths, blocks=blocks), top_k(scores, k, torch.tensor(lengths)))
    got = run(top_k_lists, scores, k, lengths, blocks=blocks, **forced)
    assert_same(got, top_k(scores, k, torch.tensor(lengths), **forced))


@pytest.mark.parametrize("blocks", [PARTS, WIDE], ids=["parts", "wide"])
def test_top_k_cuts_ties_anywhere(blocks):
    """In the resident tile, in the others, at their borders, and where the weight of all ties is 0."""
    scores = torch.randint(0, 3, (12, 1700), generator=torch.Generator().manual_seed(10)).bfloat16()
    scores[3:6, 700:900] = 2.0
    scores[6:9, 300:] = 1.0
    k, lengths = torch.randint(1, 1700, (12,), generator=torch.Generator().manual_seed(11)), [1700] * 12
    forced = {"sink": 3, "recent": 200}
    got = run(top_k_lists, scores, k, lengths, blocks=blocks, **forced)
    assert_same(got, top_k(scores, k, torch.tensor(lengths), **forced))


def test_top_k_ranks_nan_with_infinity_and_negative_weights_with_zero():
    scores = torch.tensor([[0.0, -NAN, -0.0, INF, -1.0, 0.5, NAN, 0.0]]).repeat(9, 1)
    k, lengths = torch.arange(9), torch.full((9,), 8)
    assert_same(run(top_k_lists, scores, k, lengths), top_k(scores, k, lengths))


def test_top_k_of_zeros_and_of_more_than_there_is():
    scores = torch.zeros(3, 200)
    scores[:, 7] = 1.0
    lists = run(top_k_lists, scores, torch.tensor([0, 3, 500]), [200, 150, 150], sink=1)
    assert lists.counts.tolist() == [1, 3, 150]
    assert lists.indices[1, :4].tolist() == [0, 7, 149, -1]


def test_top_k_beyond_the_capacity():
    scores = attention(1, 400, seed=9)
    lists = run(top_k_lists, scores, 100, [400], capacity=20, recent=4)
    assert_same(lists, top_k(scores, 20, torch.tensor([400]), recent=4))


# Long rows


def long_rows() -> dict[str, Tensor]:
    length = 131_072
    peaked = attention(length, temperature=8.0)
    sink = attention(length, temperature=1.0) * 1e-3
    sink[0] = 1.0
    tiny = torch.full((length,), 1e-38)
    tiny[[3, length // 2]] = 1.0
    return {
        "flat": torch.full((length,), 1 / length),
        "nearly flat": attention(length, temperature=1e-4),
        "attention": attention(length, temperature=2.0),
        "peaked": peaked,
        "sink": sink,
        "tiny": tiny,
    }


@pytest.mark.parametrize("kind", long_rows())
def test_long_rows(kind):
    """The mass that is asked for, up to rounding, and no more than that and the tolerance without any of the kept."""
    row = long_rows()[kind]
    p = 0.9995 if kind == "sink" else 0.9
    lists = run(nucleus_lists, row[None], p, [len(row)], blocks=LONG)
    mask = assert_nucleus(lists, row[None], p, [len(row)])[0]
    mass, kept = row.double() / row.double().sum(), row[mask].double() / row.double().sum()
    assert kept.sum() >= p * (1 - SLACK)
    assert kept.sum() - kept.min() < p + SLACK
    assert kept.min() >= mass[~mask].max()
    if kind == "flat":
        assert mask.nonzero().flatten().min() == len(row) - len(kept)


# Refusals, and what only a GPU can show


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 0.0}, "p = 0.0"),
        ({"p": NAN}, "p = nan"),
        ({"lengths": torch.tensor([4])}, "lengths has shape"),
        ({"scores": torch.rand(2, 8, dtype=torch.float64)}, "float64"),
        ({"scores": torch.rand(8)}, r"\[batch, ..., length\]"),
        ({"scores": torch.rand(8, 2).T}, "strides"),
        ({"scores": torch.rand(2, 3, 4, 8)[:, :, ::2].transpose(1, 2)}, "strides"),
        ({"capacity": 4, "sink": 3, "recent": 2}, "capacity = 4"),
        ({"sink": -1}, "sink = -1"),
        ({"out": Selection(torch.empty(2, 7).int(), torch.empty(2).int())}, "out has indices"),
        ({"out": Selection(torch.empty(8, 2).int().T, torch.empty(2).int())}, "contiguous"),
    ],
)
def test_refusals(changes, message):
    arguments = {"scores": torch.rand(2, 8), "p": 0.9, "lengths": torch.tensor([8, 8]), "capacity": 8}
    arguments |= changes
    with pytest.raises(UsageError, match=message):
        nucleus_lists(**arguments)


def test_a_negative_k_is_refused():
    with pytest.raises(UsageError, match="k = -1"):
        top_k_lists(torch.rand(1, 4), -1, torch.tensor([4]), capacity=4)


def test_no_rows():
    lists = nucleus_lists(torch.rand(0, 3, 8), 0.9, torch.empty(0).int(), capacity=8)
    assert lists.indices.shape == (0, 3, 8) and lists.counts.shape == (0, 3)


def test_blocks_hold_rows_and_threads_have_registers_for_them():
    assert [choose_blocks(length) for length in (1, 4096, 4097)] == [BLOCKS[0], BLOCKS[1], BLOCKS[2]]
    assert choose_blocks(32769) == LONG_BLOCKS
    lengths = (8192, 8193, 49152, 49153)
    chosen = [choose_blocks(length, torch.bfloat16) for length in lengths]
    assert chosen == [BLOCKS[2], STREAMED_BLOCKS, STREAMED_BLOCKS, LONG_BLOCKS]
    for blocks in (*BLOCKS, LONG_BLOCKS, STREAMED_BLOCKS):
        row = 32 * blocks.vector
        assert blocks.resident % (row * blocks.warps) == blocks.tile % (row * blocks.warps) == 0
        assert blocks.resident // (32 * blocks.warps) < blocks.registers <= 255
        assert 32 * blocks.warps * blocks.registers <= 65536


gpu_only = pytest.mark.skipif(not GPU, reason="asks a GPU")


@gpu_only
@pytest.mark.parametrize("length", [1000, 4000, 16000, 32768, 50001, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_blocks(length, dtype):
    scores = attention(3, 100, length, seed=length).to(dtype)
    lengths = [length, length // 2 + 1, 7]
    got = run(nucleus_lists, scores, 0.9, lengths, blocks=None, sink=4, recent=64)
    assert_nucleus(got, scores, 0.9, lengths, sink=4, recent=64)
    got = run(top_k_lists, scores, 500, lengths, capacity=600, blocks=None, sink=4, recent=64)
    assert torch.equal(mask_of(got, length), top_k(scores, 500, torch.tensor(lengths), sink=4, recent=64))


@gpu_only
def test_a_cuda_graph_follows_the_lengths():
    scores = attention(2, 8, 3000).cuda()
    lengths = torch.tensor([3000, 3000], dtype=torch.int32, device="cuda")
    out = poisoned(scores, 3000)
    nucleus_lists(scores, 0.9, lengths, capacity=3000, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nucleus_lists(scores, 0.9, lengths, capacity=3000, out=out)
    lengths.copy_(torch.tensor([2000, 11]))
    graph.replay()
    lists = Selection(out.indices.cpu(), out.counts.cpu())
    assert_nucleus(lists, scores.cpu(), 0.9, [2000, 11])
