"""Where sparse speculation overtakes dense speculation, from rows of timings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specattn.benchmarks.crossover import crossover, crossovers, plot_speed_up, speed_ups


def rows(shape: str, batch: int, speed_ups: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"shape": shape, "batch": batch, "context": context, "mode": mode, "tokens_per_second": speed}
        for context, speed_up in speed_ups.items()
        for mode, speed in {"plain": 40.0, "dense": 50.0, "sparse": 50.0 * speed_up}.items()
    ]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # Half way between the logarithms of 1,024 and 4,096.
        ([(1024, 0.8), (4096, 1.2), (8192, 1.6)], 2048.0),
        ([(1024, 0.8), (2048, 0.9), (4096, 1.0)], 4096.0),
        # What counts is the last time that it comes to 1.
        ([(256, 1.1), (1024, 0.5), (4096, 1.5)], 2048.0),
        ([(1024, 1.0), (4096, 2.0)], 1024.0),
        ([(1024, 0.5), (4096, 0.99)], None),
        ([(1024, 1.5)], 1024.0),
        ([(1024, 1.5), (4096, 0.5)], None),
    ],
)
def test_interpolation(points: list[tuple[int, float]], expected: float | None) -> None:
    found = crossover(points)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_row_for_each_shape_and_batch() -> None:
    skipped = {"shape": "b", "batch": 16, "context": 65536, "mode": "skipped", "note": "too large"}
    weights = {"shape": "c", "mode": "skipped", "note": "too large"}
    given = [
        *rows("b", 16, {8192: 1.2, 2048: 0.8}),
        skipped,
        weights,
        *rows("a", 1, {1024: 0.5, 2048: 0.9}),
        *rows("a", 4, {1024: 1.5}),
    ]
    found = {(row["shape"], row["batch"]): row for row in crossovers(given)}
    assert list(found) == [("a", 1), ("a", 4), ("b", 16)]
    assert found["b", 16]["crossover"] == pytest.approx(4096)
    assert found["b", 16]["speed_up"] == {"2048": pytest.approx(0.8), "8192": pytest.approx(1.2)}
    bounds = {key: row["bound"] for key, row in found.items()}
    assert bounds == {("a", 1): "above 2048", ("a", 4): "at most 1024", ("b", 16): None}
    assert crossovers([]) == crossovers([skipped]) == []


def test_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "speed_up.png"
    given = [*rows("a", 1, {1024: 0.5, 2048: 0.9}), *rows("b", 4, {1024: 1.5})]
    assert speed_ups(given)["a", 1] == [(1024, 0.5), (2048, pytest.approx(0.9))]
    plot_speed_up(given, path)
    assert path.read_bytes().startswith(b"\x89PNG")
