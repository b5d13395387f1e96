"""The list of what to compile is what the launchers launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from draft_case import DEVICE, draft_case

from specattn.kernels.draft_variants import ALL_DUE, NO_EXPORT, ROUND_SHAPES, SHAPES, variants
from specattn.kernels.export_attention import export_attention
from specattn.kernels.head_mixture import head_mixture
from specattn.kernels.page_bounds import PageBounds, update_page_bounds
from specattn.kernels.page_scores import page_scores
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys
from specattn.kernels.quantised_round_scores import quantised_round_scores
from specattn.kernels.quantised_scores import quantised_scores
from specattn.kernels.round_scores import round_scores
from specattn.kernels.value_attention import value_attention

MODULES = {
    "export_attention_kernel": "export_attention_triton",
    "head_mixture_kernel": "head_mixture_triton",
    "page_bounds_kernel": "page_bounds_triton",
    "page_scores_kernel": "page_scores_triton",
    "quantise_keys_kernel": "quantised_keys_triton",
    "quantised_round_scores_kernel": "quantised_round_scores_triton",
    "quantised_scores_kernel": "quantised_scores_triton",
    "round_scores_kernel": "round_scores_triton",
    "value_attention_kernel": "value_attention_triton",
}
DEFAULTS = {"num_warps": 4, "num_stages": 3}

Launched = tuple[str, tuple[tuple[str, object], ...]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Launched]:
    """The kernels' names and options, instead of their results."""
    found: set[Launched] = set()

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: found.add(entry(self.name, DEFAULTS | on_a_gpu(options)))

    for name, module in MODULES.items():
        monkeypatch.setattr(importlib.import_module(f"specattn.kernels.{module}"), name, Recorder(name))
    return found


def on_a_gpu(options: dict[str, object]) -> dict[str, object]:
    """What is launched there, where there is none."""
    return options | ({"PTX": True} if "PTX" in options else {})


def entry(name: str, options: dict[str, object]) -> Launched:
    return name, tuple(sorted(options.items()))


def test_the_variants_are_what_is_launched(launched):
    for rows, query_heads, kv_heads, head_dim in SHAPES:
        launch_attention(rows, query_heads, kv_heads, head_dim)
    for rows, query_heads, kv_heads, head_dim in ROUND_SHAPES:
        launch_round(rows, query_heads, kv_heads, head_dim)
    for heads, targets in ((64, 56), (500, 640), (14, 2)):
        logits = torch.zeros(1, 4, heads, 16, dtype=torch.float16)
        weights, lengths = torch.zeros(targets, heads), torch.zeros(1, dtype=torch.int32)
        head_mixture(logits, torch.zeros(1, 4, heads), weights, lengths, out=torch.zeros(1, targets, 16))
    listed = set()
    for kernel, _, constants, warps, stages, *_ in variants():
        options = {name: value for name, value in constants.items() if name not in NO_EXPORT | ALL_DUE}
        listed.add(entry(kernel.__name__, options | {"num_warps": warps, "num_stages": stages}))
    # Of the kernels that do not depend on the query, one size stands for all.
    assert listed == {(name, options) for name, options in launched if typical(name, dict(options))}


def typical(name: str, options: dict[str, object]) -> bool:
    return name not in ("quantise_keys_kernel", "page_bounds_kernel") or options["D"] == 64


def launch_attention(rows: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"rows": rows, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = draft_case([20], dtype=torch.float16, **shape)
    workspace, export = case.workspace(16), case.export(torch.float16)
    arguments = case.query, case.keys, case.values, case.batch, 0.1
    for wanted in (export, None):
        export_attention(*arguments, out=case.out(), workspace=workspace, export=wanted)
    logits, lse = case.scores(torch.float16)
    for bits in (4, 8):
        copy = QuantisedKeys.empty(case.keys, bits)
        quantise_keys(case.keys, torch.arange(3, device=DEVICE), copy)
        buffers = {"logits": logits, "lse": lse, "workspace": workspace}
        quantised_scores(case.query, copy, case.batch, 0.1, **buffers)
    lists = torch.zeros(1, kv_heads, 4, dtype=torch.int32, device=DEVICE)
    value_attention(
        logits,
        case.values,
        lists,
        lists[..., 0].contiguous(),
        case.batch,
        out=case.out(),
        workspace=workspace,
    )
    bounds = PageBounds.empty(case.keys, 16)
    update_page_bounds(case.keys, bounds, case.batch, 1)
    entries = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    page_scores(case.query, bounds.lower, bounds.upper, entries, case.batch.lengths // 16, 0.1)


def launch_round(rows: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"rows": rows, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = draft_case([20], dtype=torch.float16, **shape)
    lse = torch.zeros(1, rows, query_heads, device=DEVICE)
    places, length = case.export().places, 32
    own = torch.zeros(len(case.batch.block_table), kv_heads, length, device=DEVICE)
    heads = torch.zeros(1, query_heads, length, device=DEVICE)
    one_layer = case.query.transpose(0, 1)[:, None], lse.transpose(0, 1)[:, None]
    out = {"heads_out": heads, "own_out": own}
    round_scores(one_layer[0], case.keys[None], case.batch, one_layer[1], places[None], 0.1, **out)
    for bits in (4, 8):
        copy = QuantisedKeys.empty(case.keys, bits)
        quantised_round_scores(one_layer[0], copy, case.batch, one_layer[1], places[None], 0.1, **out)


def test_signatures_name_every_argument():
    for kernel, signature, constants, _, _, aligned, *_ in variants():
        assert list(signature) == list(kernel.arg_names)
        assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constants)
        assert set(aligned) <= set(signature) - set(constants)
