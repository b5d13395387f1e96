"""The head mixture: it finds known weights, never gets worse, and ends at the optimum."""

import pytest
import torch
from mapping_rounds import GEOMETRY, mixed_rounds, random_rounds

from specattn.errors import UsageError
from specattn.mapping.mixture import fit_mixture, layer_mixture, mixture_divergence
from specattn.mapping.samples import EPSILON, RoundSample, Targets, normalised

SPARSE = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.2, 0.3, 0.5]])


def target_rows(sample: RoundSample) -> torch.Tensor:
    return sample.target


def gradients(samples: list[RoundSample], targets: Targets, weights: torch.Tensor) -> torch.Tensor:
    """``E[target / mixture * draft]`` in float64."""
    total = torch.zeros_like(weights, dtype=torch.float64)
    for sample in samples:
        target, draft = targets(sample).double(), normalised(sample.draft).double() + EPSILON
        total += (target / (weights.double() @ draft)) @ draft.T
    return total / len(samples)


def test_recovers_the_weights_that_made_the_targets() -> None:
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.1, 0.4, 0.5], [0.0, 0.0, 0.0, 1.0]])
    found, divergence = fit_mixture(mixed_rounds(weights), target_rows, iterations=120, tolerance=1e-6)
    torch.testing.assert_close(found, weights, atol=5e-3, rtol=0)
    assert divergence.max() < 1e-4


def test_the_divergence_is_that_of_the_weights() -> None:
    samples = random_rounds()
    weights, divergence = fit_mixture(samples, GEOMETRY.kv_rows, iterations=7)
    expected = torch.zeros(6, dtype=torch.float64)
    for sample in samples:
        target, draft = GEOMETRY.kv_rows(sample).double(), normalised(sample.draft).double()
        expected += (target * (target / (weights.double() @ draft)).log()).sum(-1) / len(samples)
    torch.testing.assert_close(divergence, expected.float())
    torch.testing.assert_close(mixture_divergence(samples, GEOMETRY.kv_rows, weights), divergence)


def test_every_rows_divergence_is_non_increasing() -> None:
    samples = random_rounds()
    runs = [fit_mixture(samples, GEOMETRY.all_rows, iterations=n, tolerance=0)[1] for n in range(1, 25)]
    falls = -torch.stack(runs).diff(dim=0)
    assert (falls >= 0).all()
    assert falls[0].min() > 0


def test_weights_lie_on_the_simplex() -> None:
    weights, _ = fit_mixture(random_rounds(), GEOMETRY.all_rows)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_ends_where_the_optimality_conditions_hold() -> None:
    # Karush, Kuhn, Tucker: no head's gradient above one, and exactly one for the heads in use.
    samples = mixed_rounds(SPARSE, power=1.5)
    weights, divergence = fit_mixture(samples, target_rows, iterations=120, tolerance=0)
    assert divergence.min() > 0.01, "the targets can be met exactly: all conditions would be equalities"
    gradient = gradients(samples, target_rows, weights)
    used = weights > 1e-4
    assert (gradient[used] - 1).abs().max() < 1e-3
    assert gradient[~used].max() < 1 - 1e-3


def test_stops_close_to_the_optimum() -> None:
    samples = random_rounds()
    passes: list[float] = []
    _, divergence = fit_mixture(samples, GEOMETRY.kv_rows, progress=lambda number, mean: passes.append(mean))
    _, best = fit_mixture(samples, GEOMETRY.kv_rows, iterations=120, tolerance=0)
    assert len(passes) < 100
    assert passes == sorted(passes, reverse=True)
    assert best.mean() <= divergence.mean() < 1.01 * best.mean()


def test_needs_fewer_passes_than_plain_em() -> None:
    samples = mixed_rounds(SPARSE, power=1.5, alike=0.8)
    plain = torch.full((2, 4), 1 / 4, dtype=torch.float64)
    for _ in range(59):
        plain = plain * gradients(samples, target_rows, plain)
    reached = mixture_divergence(samples, target_rows, plain.float())
    assert (fit_mixture(samples, target_rows, iterations=15, tolerance=0)[1] < reached).all()


def test_beats_the_best_single_head_and_the_layer_map() -> None:
    samples = random_rounds()
    _, mixture = fit_mixture(samples, GEOMETRY.kv_rows)
    singles = [
        mixture_divergence(samples, GEOMETRY.kv_rows, torch.eye(6)[head].expand(6, -1)) for head in range(6)
    ]
    assert (mixture < torch.stack(singles).amin(0)).all()
    layers = layer_mixture(torch.tensor([0, 1, 1]), GEOMETRY, rows=2)
    assert (mixture < mixture_divergence(samples, GEOMETRY.kv_rows, layers)).all()


def test_fewer_heads_never_fit_better() -> None:
    samples = random_rounds()
    _, full = fit_mixture(samples, GEOMETRY.kv_rows, iterations=120, tolerance=0)
    heads = torch.tensor([1, 4])
    weights, restricted = fit_mixture(samples, GEOMETRY.kv_rows, heads=heads, iterations=120, tolerance=0)
    assert weights.shape == (6, 2)
    assert (restricted >= full - 1e-6).all()
    spread = torch.zeros(6, 6).index_copy(1, heads, weights)
    torch.testing.assert_close(mixture_divergence(samples, GEOMETRY.kv_rows, spread), restricted)


def test_zeros_of_either_side_are_no_trouble() -> None:
    target = torch.tensor([[0.5, 0.5, 0.0]])
    draft = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    weights, divergence = fit_mixture([RoundSample(target, draft)], target_rows)
    assert weights[0, 0] > 0.999
    assert divergence.isfinite().all()


def test_layer_mixture_is_the_mapped_layers_mean() -> None:
    (sample,) = random_rounds(1)
    weights = layer_mixture(torch.tensor([1, 0, 1]), GEOMETRY, rows=2)
    mean = GEOMETRY.draft_layer_rows(sample)
    torch.testing.assert_close(weights @ normalised(sample.draft), mean[[1, 1, 0, 0, 1, 1]])


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="longer text"):
        fit_mixture([], GEOMETRY.kv_rows)
    with pytest.raises(UsageError, match="iterations=0"):
        fit_mixture(random_rounds(1), GEOMETRY.kv_rows, iterations=0)
