"""Head mixtures of exported scores: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from draft_case import CUDA, DEVICE, NAN, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import attention_probabilities
from specattn.kernels.export_attention import export_attention
from specattn.kernels.head_mixture import head_mixture, head_mixture_reference
from specattn.kernels.score_export import ScoreExport, export_places

BOTH = pytest.mark.parametrize("mix", [head_mixture, head_mixture_reference])
# rows, heads, targets
SHAPES = [(1, 1, 1), (2, 5, 3), (4, 16, 17), (9, 33, 70), (1, 64, 56), (3, 300, 2)]
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def scores(
    lengths: list[int], rows: int, heads: int, capacity: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and log-sum-exps as the draft leaves them; what a row does not see is poison."""
    generator = torch.Generator().manual_seed(heads)
    logits = torch.randn(len(lengths), rows, heads, capacity, generator=generator) * 3
    logits = logits.to(dtype)
    lse = torch.full((len(lengths), rows, heads), float("-inf"))
    for request, length in enumerate(lengths):
        for row in range(rows):
            seen = max(0, length - rows + 1 + row)
            lse[request, row] = logits[request, row, :, :seen].float().logsumexp(-1)
            logits[request, row, :, seen:] = NAN
    return logits.to(DEVICE), lse.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def simplex(targets: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(targets)
    return torch.randn(targets, heads, generator=generator).mul(2).softmax(-1).to(DEVICE)


def poisoned(batch: int, targets: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((batch, targets, length), NAN, dtype=dtype, device=DEVICE)


def exact(logits: Tensor, lse: Tensor, weights: Tensor, lengths: Tensor, out_length: int) -> Tensor:
    """Row by row and head by head in float64."""
    batch, rows, heads, _ = logits.shape
    out = torch.zeros(batch, len(weights), out_length, dtype=torch.float64, device=DEVICE)
    for request, length in enumerate(lengths.tolist()):
        for row in range(rows):
            seen = length - rows + 1 + row
            for head in range(heads if seen > 0 else 0):
                probability = (logits[request, row, head, :seen].double() - lse[request, row, head]).exp()
                out[request, :, :seen] += weights[:, head, None].double() * probability / rows
    return out


@BOTH
@pytest.mark.parametrize("rows,heads,targets", SHAPES)
def test_mixtures(mix, rows, heads, targets):
    logits, lse, lengths = scores([150, 9, 0, 160], rows, heads, 160)
    weights = simplex(targets, heads)
    out = mix(logits, lse, weights, lengths, out=poisoned(4, targets, 160))
    assert error_ratio(out, exact(logits, lse, weights, lengths, 160)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * CUDA)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_half_precision_scores(dtype, out_dtype):
    logits, lse, lengths = scores([150, 20], 4, 20, 160, dtype)
    weights = simplex(7, 20)
    out = head_mixture(logits, lse, weights, lengths, out=poisoned(2, 7, 160, out_dtype))
    assert error_ratio(out, exact(logits, lse, weights, lengths, 160)) < BOUND[dtype]


@BOTH
@pytest.mark.parametrize("capacity,out_length", [(131, 131), (144, 200), (160, 133), (129, 128)])
def test_everything_is_written_and_nothing_behind_the_length_counts(mix, capacity, out_length):
    """The selection also looks at the round's last tokens, which the draft has not seen: they must be 0."""
    logits, lse, lengths = scores([128, 40, 0], 2, 6, capacity)
    weights = simplex(3, 6)
    out = mix(logits, lse, weights, lengths, out=poisoned(3, 3, out_length))
    assert error_ratio(out, exact(logits, lse, weights, lengths, out_length)) < 1e-5
    for request, length in enumerate([128, 40, 0]):
        assert (out[request, :, length:] == 0).all()


def test_a_group_of_heads_averaged():
    """What the draft's own nucleus is taken from: the mean of each group, and of the rows."""
    logits, lse, lengths = scores([90, 33], 2, 14, 96)
    weights = torch.zeros(2, 14, device=DEVICE)
    weights[0, :7] = weights[1, 7:] = 1 / 7
    out = head_mixture(logits, lse, weights, lengths, out=poisoned(2, 2, 96))
    probabilities = (logits - lse[..., None]).exp().nan_to_num(0)
    assert error_ratio(out, probabilities.unflatten(2, (2, 7)).mean((1, 3))) < 1e-5
    assert torch.allclose(out.sum(-1), torch.ones(2, 2, device=DEVICE))


def test_a_rounds_mixture_is_that_of_the_pytorch_path():
    """Three draft steps, the first of two rows, in two layers: exported, mixed, and compared with probabilities."""
    steps, heads = [2, 1, 1], torch.tensor([1, 2, 5, 6, 11])
    length, start = 64, 40
    weights = simplex(4, len(heads))
    logits = torch.full((1, 3, len(heads), length), NAN, device=DEVICE)
    lse = torch.full((1, 3, len(heads)), NAN, device=DEVICE)
    expected = torch.zeros(3, len(heads), length, device=DEVICE)
    for layer, places in enumerate(export_places(heads.to(DEVICE), layers=2, query_heads=6)):
        for step, rows in enumerate(steps):
            end = start + step + 1
            case = draft_case([end], rows=rows, seed=10 * layer + step)
            export = ScoreExport(places, logits[:, step], lse[:, step])
            arguments = case.query, case.keys, case.values, case.batch, 0.3
            export_attention(*arguments, out=case.out(), workspace=case.workspace(), export=export)
            segments = [(case.clean_keys[0], case.clean_values[0])]
            rows_of_heads = attention_probabilities(case.query[0], segments, end - rows, 0, 0.3)[:, -1]
            for head, place in enumerate(places.tolist()):
                if place >= 0:
                    expected[step, place, :end] = rows_of_heads[head]
    lengths = torch.tensor([start + 3], dtype=torch.int32, device=DEVICE)
    out = head_mixture(logits, lse, weights, lengths, out=poisoned(1, 4, length))
    assert error_ratio(out[0], weights @ expected.mean(0)) < 1e-5


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lse": torch.zeros(2, 3, 4)}, "lse has shape"),
        ({"weights": torch.zeros(3, 5)}, "weights has shape"),
        ({"lengths": torch.zeros(1, dtype=torch.int32)}, "lengths has shape"),
        ({"out": torch.zeros(2, 4, 32)}, "out has shape"),
        ({"out": torch.zeros(2, 3, 64)[..., ::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "logits": torch.zeros(2, 2, 4, 32),
        "lse": torch.zeros(2, 2, 4),
        "weights": torch.zeros(3, 4),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "out": torch.zeros(2, 3, 32),
    }
    with pytest.raises(UsageError, match=message):
        head_mixture(**arguments | change)


def test_more_heads_than_a_tile_holds_are_refused():
    with pytest.raises(UsageError, match="513 heads"):
        head_mixture(
            torch.zeros(1, 1, 513, 16),
            torch.zeros(1, 1, 513),
            torch.zeros(1, 513),
            torch.zeros(1, dtype=torch.int32),
            out=torch.zeros(1, 1, 16),
        )
