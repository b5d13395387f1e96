"""The sections: which figures stand in the tables, and which are the key ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import benchmark, evaluation, generation, row, write

import specattn
from specattn.report.build import build
from specattn.report.content import Column, Figure, Section, Table, Text
from specattn.report.evaluations import Evaluation, parse_evaluation
from specattn.report.runs import read_runs
from specattn.report.sections import fidelity, generations, layers, perplexity, speed

MAPPING = Path(specattn.__file__).parent / "mapping" / "data" / "qwen2.5-coder.safetensors"


def parsed(*results: dict[str, object], **changes: object) -> list[Evaluation]:
    return [parse_evaluation(evaluation(results, **changes), "run.json")]


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def figures(section: Section) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)]


def test_cells_without_a_figure_are_a_dash() -> None:
    assert [Column("KL", ".2f").show(value) for value in (0.5, None, float("nan"), "n/a")] == [
        "0.50",
        "–",
        "–",
        "n/a",
    ]


def test_fidelity_marks_what_nothing_beats() -> None:
    runs = parsed(
        row("dense", 1.0, 0.0001),
        row("oracle", 0.1, 0.001, p=0.9),
        row("streaming", 0.2, 0.2, budget=0.1),
        row("quest", 0.2, 0.1, budget=0.1),
        row("quest", 0.4, 0.009, budget=0.3),
        row("random", 0.5, 0.3, budget=0.4),
    )
    (section,) = fidelity.sections(runs)
    (table,) = tables(section)
    assert [table.rows[number][0] for number in sorted(table.marked)] == [
        "quest budget=0.1",
        "quest budget=0.3",
    ]
    assert [row[0] for row in table.rows][:2] == ["dense", "oracle p=0.9"]
    (key,) = fidelity.keys(runs)
    assert (key.value, "quest budget=0.3" in key.where) == ("40.0%", True)
    assert "dense" not in figures(section)[0].svg.split('class="name"', 1)[1]


def test_without_anything_good_the_best_is_named() -> None:
    (key,) = fidelity.keys(parsed(row("streaming", 0.2, 0.2), row("random", 0.3, 0.4)))
    assert key.value == "0.2000" and "20.0%" in key.what


def test_fidelity_of_several_documents() -> None:
    runs = parsed(
        row("streaming", 0.2, 0.1, "book"),
        row("streaming", 0.2, 0.3, "code"),
        row("random", 0.2, 0.3, "book"),
    )
    (section,) = fidelity.sections(runs)
    table, by_document = tables(section)
    assert table.rows[0][3] == 0.2
    assert [list(line)[1:] for line in by_document.rows] == [[0.1, 0.3], [0.3, None]]
    assert by_document.fold == "KL of each document"


def test_intervals_are_those_of_the_run_or_over_its_documents() -> None:
    rows = [row("streaming", 0.2, kl, text) for kl, text in ((0.1, "a"), (0.1, "b"))]
    computed = tables(fidelity.sections(parsed(*rows))[0])[0]
    place = [column.heading for column in computed.columns].index("95 %")
    assert computed.rows[0][place] == "0.1000 to 0.1000"
    given = parsed(row("streaming", 0.2, 0.1), intervals={"streaming": {"kl": [0.05, 0.15]}})
    assert tables(fidelity.sections(given)[0])[0].rows[0][place] == "0.0500 to 0.1500"
    assert tables(fidelity.sections(parsed(row("streaming", 0.2, 0.1)))[0])[0].rows[0][place] is None


def test_layers_of_evaluations_with_a_breakdown() -> None:
    def layered(document: str, density: float) -> dict[str, object]:
        breakdown = {
            "layers": [2, 3],
            "density": [[density, 0.4], [0.1, 0.1]],
            "mass": [[1.0, 0.8], [0.5, 0.5]],
        }
        return row("streaming", 0.2, 0.1, document) | {"breakdown": breakdown}

    runs = parsed(layered("a", 0.2), layered("b", 0.4), row("random", 0.2, 0.1, "a"))
    density, mass = layers.figures(runs[0])
    assert density.table is not None and mass.table is not None
    assert [column.heading for column in density.table.columns] == ["method", "2", "3"]
    assert [list(line) for line in density.table.rows] == [["streaming", pytest.approx(0.35), 0.1]]
    assert mass.table.rows[0][1] == 0.9
    assert density.svg.count('class="cell"') == 2
    assert [figure.caption for figure in figures(fidelity.sections(runs)[0])][1:] == [
        density.caption,
        mass.caption,
    ]
    assert layers.figures(parsed(row("random", 0.2, 0.1))[0]) == []


def test_an_interrupted_run_says_so() -> None:
    (section,) = fidelity.sections(parsed(row("streaming", 0.2, 0.2), complete=False))
    assert isinstance(section.blocks[0], Text) and "interrupted" in section.blocks[0].text


def test_perplexity() -> None:
    worse, good = row("streaming", 0.2, 0.0), row("quest", 0.4, 0.0) | {"perplexity": 10.01}
    runs = parsed(*({key: value for key, value in line.items() if key != "kl"} for line in (worse, good)))
    (section,) = perplexity.sections(runs)
    assert not fidelity.sections(runs)
    assert [round(line[4], 6) for line in tables(section)[0].rows] == [0.1, 0.001]
    assert [key.value for key in perplexity.keys(runs)] == ["60.0%"]


def test_accepted_lengths() -> None:
    runs = [("one", generation([4, 4, 0, 2])), ("none", generation([]))]
    (section,) = generations.sections(runs)
    (figure,) = figures(section)
    assert figure.table is not None
    assert [line[1] for line in figure.table.rows] == [1, 0, 1, 0, 2]
    assert [key.value for key in generations.keys(runs)] == ["3.50"]
    assert generations.sections([]) == []


def test_speed() -> None:
    run = [("kernels", benchmark())]
    (section,) = speed.sections(run)
    ratios, nucleus, verify = tables(section)
    assert list(map(list, ratios.rows)) == [["nucleus_vs_sort", 21.5]]
    assert (nucleus.note, [column.heading for column in nucleus.columns]) == ("nucleus", ["rows", "us"])
    assert [list(line) for line in verify.rows] == [[3.0]]
    assert [(key.value, key.what) for key in speed.keys(run)] == [("21.50", "nucleus_vs_sort")]


def test_speed_up_against_context() -> None:
    found = [
        {
            "shape": "s",
            "batch": 1,
            "crossover": 2000.4,
            "bound": None,
            "speed_up": {"1024": 0.8, "8192": 2.0},
        },
        {"shape": "s", "batch": 4, "crossover": None, "bound": "above 8192", "speed_up": {"8192": 0.9}},
    ]
    (section,) = speed.sections([("decode", {**benchmark(), "crossover": found})])
    assert (
        "s batch 4" in figures(section)[0].svg
        and "8,192 tokens: 2.00 times as fast" in figures(section)[0].svg
    )
    crossings = tables(section)[1]
    shown = [
        [column.show(value) for column, value in zip(crossings.columns, row, strict=True)]
        for row in crossings.rows
    ]
    assert shown == [["s batch 1", "2,000", "2.00"], ["s batch 4", "above 8192", "0.90"]]
    assert figures(speed.sections([("kernels", benchmark())])[0]) == []


def test_many_ratios_stay_in_their_section() -> None:
    run = {**benchmark(), "ratios": {f"ratio_{n}": 1.0 for n in range(7)}}
    assert speed.keys([("kernels", run)]) == []
    assert len(tables(speed.sections([("kernels", run)])[0])[0].rows) == 7


def test_speed_after_a_failed_check_has_no_timings() -> None:
    run = [("kernels", benchmark("failed"))]
    (section,) = speed.sections(run)
    assert tables(section) == [] and speed.keys(run) == []
    assert isinstance(section.blocks[0], Text) and "gate: failed" in section.blocks[0].text


def test_a_report_has_a_section_for_every_kind(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "fidelity.json", evaluation([row("streaming", 0.2, 0.1)])),
        write(tmp_path / "generation.json", generation([1, 2])),
        write(tmp_path / "bench.json", benchmark()),
        MAPPING,
    ]
    report = build(read_runs(paths))
    assert [section.title for section in report.sections] == [
        "Fidelity at 4,096 tokens",
        "Generation",
        "Speed: bench",
        "Mapping qwen2.5-coder",
    ]
    assert [source[1] for source in report.sources] == ["fidelity", "generation", "benchmark", "mapping"]
    assert report.sources[0][2] == "a GPU, bfloat16"
