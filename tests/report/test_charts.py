"""The figures: what is drawn lies where the figures say."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as xml

import pytest

from specattn.report.bars import bars
from specattn.report.heatmap import heatmap
from specattn.report.lines import LABELS, line_chart, percent
from specattn.report.scale import LogScale, log_scale, spread


def elements(svg: str, kind: str) -> list[xml.Element]:
    """The elements of a kind; the text is well-formed XML, or this fails."""
    return list(xml.fromstring(svg).iter(kind))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in elements(svg, "text")]


def test_a_logarithmic_axis() -> None:
    scale = LogScale(0.01, 1.0, 0.0, 200.0)
    assert [scale(value) for value in (0.01, 0.1, 1.0)] == pytest.approx([0.0, 100.0, 200.0])
    assert scale.ticks() == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert LogScale(0.08, 0.6, 0.0, 1.0).ticks() == [0.1, 0.15, 0.2, 0.3, 0.5]


def test_an_axis_holds_its_figures() -> None:
    for values in ([0.02, 0.5], [0.3]):
        scale = log_scale(values, 10.0, 90.0)
        assert all(10 < scale(value) < 90 for value in values)


@pytest.mark.parametrize(
    "places", [[50.0, 51.0, 52.0], [0.0, 99.0, 99.5, 100.0], [3.0], [100.0] * 5, [0.0] * 30, []]
)
def test_labels_do_not_touch(places: list[float]) -> None:
    moved = spread(places, 10.0, 0.0, 100.0)
    gap = min(10.0, 100.0 / max(1, len(places) - 1))
    inorder = sorted(moved)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)
    assert all(after - before > gap - 1e-9 for before, after in itertools.pairwise(inorder))
    assert [moved.index(place) for place in inorder] == sorted(range(len(places)), key=lambda n: places[n])


def test_a_frontier_has_a_named_line_for_each_method() -> None:
    curves = {
        "specattn": [(0.4, 0.01, "specattn p=0.9"), (0.1, 0.1, "specattn p=0.5")],
        "oracle": [(0.2, 0.02, "<oracle>")],
    }
    svg = line_chart(curves, "reads", "KL", frozenset({"oracle"}), percent)
    names = [e for e in elements(svg, "text") if e.get("class") == "name"]
    assert [name.text for name in names] == ["specattn", "oracle"]
    assert {float(name.get("x", "")) for name in names} == {LABELS}
    dots = [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in elements(svg, "circle")]
    # The first line's points from left to right, falling; the yardstick's point in between.
    assert dots[0][0] < dots[2][0] < dots[1][0] and dots[0][1] < dots[2][1] < dots[1][1]
    assert [e.get("class") for e in elements(svg, "g") if "curve" in (e.get("class") or "")] == [
        "curve c0 d0",
        "curve plain",
    ]
    assert [e.text for e in elements(svg, "title")] == ["specattn p=0.5", "specattn p=0.9", "<oracle>"]
    assert {"10 %", "20 %"} <= set(texts(svg))


def test_lines_of_one_method_differ_in_their_dashes() -> None:
    point = [(0.1, 0.1, "")]
    svg = line_chart({"twilight base=a": point, "quest": point, "twilight base=b": point}, "x", "y")
    classes = [e.get("class") for e in elements(svg, "g") if "curve" in (e.get("class") or "")]
    assert classes == ["curve c0 d0", "curve c1 d0", "curve c0 d1"]


def test_a_heat_map_shades_by_value() -> None:
    grid = [[0.0, 0.5], [None, 2.0]]
    svg = heatmap(
        grid, ["a", "b"], ["x", "y"], ("depth", "length"), high=1.0, show="{:.0%}".format, path=[1, 0]
    )
    cells = elements(svg, "rect")
    assert [cell.get("style") for cell in cells] == ["--shade:0%", "--shade:50%", "--shade:100%"]
    assert [e.text for e in elements(svg, "title")][-1] == "depth b, length y: 2"
    assert {"0%", "50%", "200%"} <= set(texts(svg))
    marks, box = elements(svg, "circle"), [float(cells[1].get(name, "")) for name in ("x", "width")]
    assert len(marks) == 2 and box[0] < float(marks[0].get("cx", "")) < sum(box)


def test_a_heat_map_of_one_value() -> None:
    assert elements(heatmap([[0.3]], ["a"], ["x"], ("row", "column")), "rect")[0].get("style") == "--shade:0%"


def test_bars_are_as_tall_as_their_figures() -> None:
    svg = bars([0.25, 0.5, 0.0], ["0", "1", "2"], "accepted")
    tall = [float(bar.get("height", "")) for bar in elements(svg, "rect")]
    assert tall[1] == pytest.approx(2 * tall[0], abs=0.02) and tall[2] == 0
    assert {"25%", "50%", "0%", "accepted"} <= set(texts(svg))


def test_bars_of_nothing() -> None:
    assert all(
        math.isfinite(float(bar.get("height", ""))) for bar in elements(bars([0.0], ["0"], "x"), "rect")
    )
