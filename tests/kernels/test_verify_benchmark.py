"""The benchmark's way from random lists to checked rows and ratios, small, untimed and with a stand-in for its peer."""

from __future__ import annotations

import fake_flashinfer
import pytest
import torch

from specattn.geometry import KVGeometry

CUDA = torch.cuda.is_available()
HEADS = KVGeometry(1, 4, 2, 16, torch.bfloat16 if CUDA else torch.float32)


class Notes:
    """A report that only remembers."""

    def __init__(self):
        self.checks, self.rows, self.ratios = {}, [], {}

    def check(self, name, error, bound):
        self.checks[name] = error < bound

    def row(self, **fields):
        self.rows.append(fields)

    def ratio(self, key, value):
        self.ratios[key] = value


@pytest.fixture
def verify(monkeypatch):
    from specattn.benchmarks import verify as module

    small = {
        "HEADS": HEADS,
        "POOL_TOKENS": 256,
        "DEVICE": "cuda" if CUDA else "cpu",
        "SHAPES": [(2, 64)],
        "GOALS": {(2, 64): "goal"},
        "GOAL_ROWS": 2,
        "ROWS": [1, 2],
        "DENSITIES": [0.1],
        "UNEVEN": [0.5, 1.5],
        "SWEEP": module.SWEEP[::13],
        "graph_us": lambda launches: float(sum(len(launch()) > 0 for launch in launches)),
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("peer", [False, True])
def test_everything_is_checked(verify, monkeypatch, peer):
    monkeypatch.setattr(verify.flashinfer, "available", lambda: peer)
    fake_flashinfer.install(monkeypatch)
    notes = Notes()
    verify.run(notes, bandwidth=1e6)
    assert all(notes.checks.values())
    assert len(notes.rows) == (7 if peer else 5)
    assert len(notes.checks) == len(notes.rows)
    # Two copies of the batch in each timing.
    assert {row["us"] for row in notes.rows} == {2.0}
    dense = next(row for row in notes.rows if row["operation"] == "dense")
    assert dense["bytes"] == 2 * 64 * HEADS.token_bytes
    assert dense["copy_bandwidth_fraction"] == pytest.approx(dense["bytes"] / 2e-6 / 1e6)
    assert notes.ratios == (pytest.approx({"goal": 10.0, "dense_vs_flashinfer": 1.0}) if peer else {})


def test_a_sweep_times_each_tiling(verify):
    notes = Notes()
    verify.run(notes, bandwidth=1e6, sweep=True)
    assert all(notes.checks.values()) and not notes.ratios
    assert [row["tiling"] for row in notes.rows] == [str(tiling) for tiling in verify.SWEEP for _ in range(3)]
