"""The rows of a sample: their means, their order, and that they are distributions."""

import torch
from mapping_rounds import GEOMETRY, random_rounds

from specattn.mapping.samples import normalised


def test_rows_of_half_precision_samples_are_distributions() -> None:
    (sample,) = random_rounds(1)
    for rows in (GEOMETRY.layer_rows, GEOMETRY.draft_layer_rows, GEOMETRY.query_rows, GEOMETRY.kv_rows):
        assert rows(sample).dtype == torch.float32
        torch.testing.assert_close(rows(sample).sum(-1), torch.ones(len(rows(sample))))


def test_normalised_leaves_its_input_alone() -> None:
    rows = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(normalised(rows), torch.tensor([[0.25, 0.75]]))
    assert rows.tolist() == [[1.0, 3.0]]


def test_a_kv_head_is_the_mean_of_its_own_group() -> None:
    (sample,) = random_rounds(1)
    query = normalised(sample.target).view(3, 6, -1)
    expected = torch.stack((query[:, :3].mean(1), query[:, 3:].mean(1)), dim=1)
    torch.testing.assert_close(GEOMETRY.kv_rows(sample).view(3, 2, -1), expected)


def test_layers_are_the_mean_of_their_heads() -> None:
    (sample,) = random_rounds(1)
    torch.testing.assert_close(GEOMETRY.layer_rows(sample)[1], normalised(sample.target)[6:12].mean(0))
    torch.testing.assert_close(GEOMETRY.draft_layer_rows(sample)[1], normalised(sample.draft)[3:].mean(0))


def test_split_undoes_all_rows() -> None:
    (sample,) = random_rounds(1)
    kv, query = GEOMETRY.split(GEOMETRY.all_rows(sample))
    torch.testing.assert_close(kv.flatten(0, 1), GEOMETRY.kv_rows(sample))
    torch.testing.assert_close(query.flatten(0, 1), GEOMETRY.query_rows(sample))
    assert kv.shape[:2] == (3, 2)
    assert query.shape[:2] == (3, 6)
