"""Means over documents, and the picture of what fidelity costs."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specattn.errors import UsageError
from specattn.evaluation.attention_mass import Breakdown
from specattn.evaluation.bootstrap import interval
from specattn.evaluation.fidelity import Detail, FidelityResult
from specattn.evaluation.summary import NAMES, intervals, means, plot_frontier
from specattn.selection.registry import parse_method


def result(method: str, document: str = "book", **figures: float) -> FidelityResult:
    parsed = parse_method(method)
    numbers = {
        field.name: figures.pop(field.name, 0.5)
        for field in fields(FidelityResult)
        if field.name not in NAMES
    }
    assert not figures
    return FidelityResult(parsed.name, parsed.options(), document, **numbers)


def test_means_are_over_the_documents_of_one_method_and_its_options():
    table = means(
        [
            result("specattn:p=0.9", "a", kl=0.1, kv_read_fraction=0.2),
            result("streaming:budget=64", "a", kl=1.0),
            result("specattn:p=0.9", "b", kl=0.3, kv_read_fraction=0.1),
            result("specattn:p=0.8", "a", kl=7.0),
            result("specattn:p=0.9:map=global", "a", kl=8.0),
            result("specattn:p=0.9:dense_layers=0", "a", kl=9.0),
        ]
    )
    assert [round(figures["kl"], 6) for figures in table.values()] == [0.2, 1.0, 7.0, 8.0, 9.0]
    first = next(iter(table.values()))
    assert first["kv_read_fraction"] == pytest.approx(0.15)
    assert set(first) == {field.name for field in fields(FidelityResult)} - set(NAMES)


def test_a_name_says_what_tells_a_row_from_the_others():
    names = list(
        means([result("specattn:p=0.9"), result("specattn:p=0.9:map=global"), result("streaming:budget=64")])
    )
    assert [name.split()[0] for name in names] == ["specattn", "specattn", "streaming"]
    assert all("p=0.9" in name.split() for name in names[:2])
    assert "map=global" in names[1].split()
    assert "budget=64.0" in names[2].split()
    assert not any("sink" in name for name in names), "what is as by default is left out"


def test_a_sparse_prefill_is_part_of_the_name():
    dense, sparse = result("dense", kl=1.0), replace(result("dense", kl=3.0), prefill="sparge:tau=0.9")
    table = means([dense, sparse])
    assert [figures["kl"] for figures in table.values()] == [1.0, 3.0]
    assert "prefill" not in " ".join(list(table)[:1]) and "prefill=sparge:tau=0.9" in list(table)[1]


def test_options_given_by_default_or_by_hand_are_the_same_method():
    table = means([result("specattn", "a", kl=1.0), result("specattn:p=0.95:sink=4", "b", kl=3.0)])
    assert [figures["kl"] for figures in table.values()] == [2.0]


def test_perplexities_are_averaged_as_their_logarithms():
    table = means(
        [
            result("dense", "a", perplexity=2.0, perplexity_dense=3.0, kl=0.0),
            result("dense", "b", perplexity=32.0, perplexity_dense=27.0, kl=1.0),
        ]
    )
    (figures,) = table.values()
    assert figures["perplexity"] == pytest.approx(8.0)
    assert figures["perplexity_dense"] == pytest.approx(9.0)
    assert figures["kl"] == 0.5
    assert math.log(figures["perplexity"]) == pytest.approx((math.log(2) + math.log(32)) / 2)


def test_intervals_are_over_documents_and_of_a_single_one_over_its_rounds():
    detail = Detail((0.1, 0.3, 0.2), (0.01, 0.03, -0.01), Breakdown([], [], []))
    alone = replace(result("oracle", kl=0.2), detail=detail)
    documents = [replace(result("dense", str(n), kl=n, perplexity=1.5), detail=detail) for n in range(5)]
    found = intervals([alone, *documents])
    assert list(found) == list(means([alone, *documents]))
    (of_rounds, of_documents) = found.values()
    assert of_rounds["kl"] == interval([detail.kl])
    assert of_rounds["change"] == pytest.approx([math.exp(end) - 1 for end in interval([detail.nll_change])])
    assert of_documents["kl"] == interval([[0, 1, 2, 3, 4]])
    assert of_documents["change"] == pytest.approx((2, 2))
    assert list(intervals([result("dense")]).values()) == [{"kl": None, "change": None}]


def test_nothing_has_no_means():
    assert means([]) == {}


def drawn(results: list[FidelityResult], path: Path, monkeypatch: pytest.MonkeyPatch) -> Axes:
    """The axes of the picture that ``plot_frontier`` saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_frontier(results, path)
    (figure,) = figures
    (axes,) = figure.axes
    return axes


RESULTS = [
    result("specattn:p=0.95", "a", kl=0.1, kv_read_fraction=0.4),
    result("specattn:p=0.9", "a", kl=0.3, kv_read_fraction=0.2),
    result("specattn:p=0.9", "b", kl=0.5, kv_read_fraction=0.1),
    result("specattn:p=0.95", "b", kl=0.2, kv_read_fraction=0.2),
    result("specattn:p=0.9:map=layer", "a", kl=0.9, kv_read_fraction=0.25),
    result("streaming:budget=64", "a", kl=2.0, kv_read_fraction=0.05),
    result("streaming:budget=0.2", "a", kl=1.0, kv_read_fraction=0.25),
]


def test_a_line_a_method_and_a_point_a_setting(tmp_path, monkeypatch):
    axes = drawn(RESULTS, tmp_path / "frontier.png", monkeypatch)
    lines = {
        line.get_label(): [(round(x, 6), round(y, 6)) for x, y in line.get_xydata()] for line in axes.lines
    }
    assert lines == {
        "specattn": [(0.15, 0.4), (0.3, 0.15)],
        "specattn map=layer": [(0.25, 0.9)],
        "streaming": [(0.05, 2.0), (0.25, 1.0)],
    }
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == list(lines)
    assert axes.get_yscale() == "log"
    assert "KL" in axes.get_ylabel()
    assert "read" in axes.get_xlabel()


def test_a_line_goes_from_few_reads_to_many(tmp_path, monkeypatch):
    shares = [0.7, 0.2, 0.9, 0.4, 0.1, 0.6, 0.3]
    results = [result(f"oracle:p={share}", kl=1 - share, kv_read_fraction=share) for share in shares]
    axes = drawn(results, tmp_path / "frontier.png", monkeypatch)
    assert list(axes.lines[0].get_xdata()) == sorted(shares)
    assert list(axes.lines[0].get_ydata()) == [1 - share for share in sorted(shares)]


def test_a_picture_is_written_and_closed(tmp_path):
    before = pyplot.get_fignums()
    path = tmp_path / "frontier.png"
    plot_frontier(RESULTS, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == before


def test_dense_has_no_place_on_a_logarithmic_axis_and_does_no_harm(tmp_path, monkeypatch):
    dense = result("dense", kl=0.0, kv_read_fraction=1.0)
    axes = drawn([dense, *RESULTS], tmp_path / "frontier.png", monkeypatch)
    low, high = axes.get_ylim()
    assert 0.01 < low < high < 10


def test_says_how_to_install_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install \"specattn\[plot\]\""):
        plot_frontier(RESULTS, tmp_path / "frontier.png")
