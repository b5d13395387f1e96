"""A mapping's section in a report."""

from __future__ import annotations

from mapping_examples import example_mapping

from specattn.report.content import Figure
from specattn.report.sections.mappings import sections


def test_both_heat_maps_show_every_pair_of_layers() -> None:
    mapping = example_mapping()
    (section,) = sections([("tiny", mapping)])
    similarity, weights = (block for block in section.blocks if isinstance(block, Figure))
    for figure in (similarity, weights):
        assert figure.svg.count('class="cell"') == mapping.similarity.numel()
    assert similarity.svg.count("<circle") == len(mapping.layer_map) and "<circle" not in weights.svg


def test_the_numbers_are_those_of_the_layer_map() -> None:
    mapping = example_mapping()
    (section,) = sections([("tiny", mapping)])
    (table,) = (block.table for block in section.blocks if isinstance(block, Figure) and block.table)
    assert [line[1] for line in table.rows] == mapping.layer_map.tolist()
    assert [line[2] for line in table.rows] == [
        mapping.similarity[layer, draft].item() for layer, draft in enumerate(mapping.layer_map.tolist())
    ]
