"""Each metric against its definition, and the accumulation over rounds."""

import math

import pytest
import torch
from mapping_rounds import GEOMETRY, attention, random_rounds
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.samples import EPSILON, RoundSample
from specattn.mapping.similarity import METRICS, negative_js, negative_kl, nucleus_recall, similarity


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return attention(3, 40, generator), attention(5, 40, generator)


def test_kl_is_the_sum_over_tokens() -> None:
    target, draft = pair()
    expected = -(target[:, None] * (target[:, None] / (draft[None] + EPSILON)).log()).sum(-1)
    torch.testing.assert_close(negative_kl(target, draft), expected)


def test_kl_stays_finite_where_the_draft_has_a_zero() -> None:
    value = negative_kl(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])).item()
    assert value == pytest.approx(-(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-10)), rel=1e-5)


def test_js_is_the_mean_divergence_from_the_midpoint() -> None:
    target, draft = pair()
    middle = (target[:, None] + draft[None]) / 2
    to_target = (target[:, None] * (target[:, None] / middle).log()).sum(-1)
    to_draft = (draft[None] * (draft[None] / middle).log()).sum(-1)
    torch.testing.assert_close(negative_js(target, draft), -(to_target + to_draft) / 2, atol=1e-6, rtol=1e-5)


def test_js_reaches_its_bounds() -> None:
    rows = torch.eye(2)
    expected = torch.tensor([[0.0, -math.log(2)], [-math.log(2), 0.0]])
    torch.testing.assert_close(negative_js(rows, rows), expected)


def test_recall_counts_the_nucleus_mass_in_the_drafts_top_tokens() -> None:
    # The nucleus is {0, 1, 2}, mass .96; the drafts' three highest are {0, 1, 3}, {0, 3, 4} and {0, 1, 2}.
    target = torch.tensor([[0.5, 0.3, 0.16, 0.04, 0.0]])
    draft = torch.tensor([[0.4, 0.3, 0.0, 0.2, 0.1], [0.2, 0.1, 0.0, 0.4, 0.3], [0.1, 0.4, 0.5, 0.0, 0.0]])
    expected = torch.tensor([[0.8 / 0.96, 0.5 / 0.96, 1.0]])
    torch.testing.assert_close(nucleus_recall(target, draft), expected)


def test_recall_takes_the_size_of_each_targets_own_nucleus() -> None:
    target = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.4, 0.3, 0.28, 0.02]])
    draft = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    # One token for the first target, the draft's being token 1; three for the second.
    torch.testing.assert_close(nucleus_recall(target, draft), torch.tensor([[0.0], [1.0]]))


@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_is_most_like_itself(metric: str) -> None:
    rows = attention(4, 50, torch.Generator().manual_seed(1))
    scores = METRICS[metric](rows, rows)
    assert scores.argmax(-1).tolist() == [0, 1, 2, 3]
    best = 1.0 if metric == "recall" else 0.0
    torch.testing.assert_close(scores.diagonal(), torch.full((4,), best), atol=1e-6, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_is_the_mean_over_rounds(metric: str) -> None:
    samples = random_rounds(3)
    each = [METRICS[metric](GEOMETRY.layer_rows(s), GEOMETRY.draft_layer_rows(s)) for s in samples]
    result = similarity(iter(samples), GEOMETRY, metric)
    assert result.shape == (3, 2)
    torch.testing.assert_close(result, torch.stack(each).mean(0))


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'cosine'.*kl, js, recall"):
        similarity(random_rounds(1), GEOMETRY, "cosine")


def test_no_round_is_refused() -> None:
    empty: list[RoundSample] = []
    with pytest.raises(UsageError, match="longer text"):
        similarity(empty, GEOMETRY)
