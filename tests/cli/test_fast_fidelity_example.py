"""``examples/fast_fidelity.py`` on a tiny pair: what reads everything strays nowhere, and what does not is seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script

SPARSE = "specattn:map=global:dense_layers=0:p=0.3:sink=0:window=0"


def words(tiny: SimpleNamespace, *more: object) -> list[str]:
    files = ["--text", tiny.text, "--text", tiny.text, "--mapping", tiny.mapping]
    sizes = ["--context", 60, "--rounds", 5, "--gamma", 2]
    return [str(word) for word in (*files, *sizes, *tiny.models, *more)]


@pytest.mark.parametrize("goes_on", [(), ("--copied", 10, 50), ("--greedy",)])
def test_rows_are_compared_with_a_dense_pass(
    tiny: SimpleNamespace, tmp_path: Path, goes_on: tuple[object, ...]
) -> None:
    out, everything = tmp_path / "fidelity.json", "specattn:map=global:dense_layers=0:p=1"
    methods = ["--methods", f"{everything},{SPARSE},{SPARSE}:draft_p=0.5", "--out", out]
    report = load_script("examples/fast_fidelity.py").main(words(tiny, *goes_on, *methods))
    assert json.loads(out.read_text()) == report and report["complete"] is True
    whole, sparse, both = report["results"]
    assert max(whole["kl"]) < 1e-6 and whole["top1_agreement"] == [1, 1] and whole["kv_read_fraction"] == 1
    for row in (sparse, both):
        assert len(row["kl"]) == 2 and len(row["by_row"]) == 3
        assert sum(row["by_row"]) / 3 == pytest.approx(sum(row["kl"]) / 2)
        assert row["largest_kl"] >= max(row["kl"]) > 1e-6 and row["kv_read_fraction"] < 0.9
        assert row["kl"][0] == pytest.approx(row["kl"][1], rel=1e-4)  # both texts are one
    assert both["draft_read_fraction"] < sparse["draft_read_fraction"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--skip", 5), "--skip 5 leaves none"),
        (("--copied", 58, 60), "leaves 2 tokens to copy of 16"),
        (("--copied", 10, 50, "--greedy"), "give --copied or --greedy"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    tiny: SimpleNamespace, more: tuple[object, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        load_script("examples/fast_fidelity.py").main(words(tiny, "--methods", SPARSE, *more))


def test_greedy_texts_are_the_targets_own_choices(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("examples/fast_fidelity.py")
    followed: list[list[list[int]]] = []
    rows: list[torch.Tensor] = []
    dense_rows, follow = script.dense_rows, script.follow

    def keep_rows(*given: object) -> torch.Tensor:
        rows.append(dense_rows(*given))
        return rows[-1]

    def keep_texts(setting: object, texts: list[list[int]], *given: object) -> object:
        followed.append(texts)
        return follow(setting, texts, *given)

    monkeypatch.setattr(script, "dense_rows", keep_rows)
    monkeypatch.setattr(script, "follow", keep_texts)
    script.main(words(tiny, "--methods", SPARSE))
    script.main(words(tiny, "--methods", SPARSE, "--greedy"))
    (given, greedy), context = followed, 60
    assert all(len(text) == context + 5 * 3 + 1 for text in (*given, *greedy))
    for text, own, dense in zip(greedy, given, rows[2:], strict=True):
        assert text[: context + 1] == own[: context + 1] and text != own
        assert text[context + 1 :] == dense.argmax(-1).tolist()
