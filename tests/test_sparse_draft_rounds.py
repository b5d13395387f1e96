"""Rounds whose draft reads its own nucleus, on the fast path with references."""

from __future__ import annotations

import pytest
import torch
from test_fast import make
from test_fast_engine import PROMPT, RAGGED, SAMPLED, figures, serve

from specattn.errors import UsageError
from specattn.request import Request
from specattn.sampling import SamplingParams
from specattn.selection.registry import parse_method

LONG = torch.randint(3, 90, (90,), generator=torch.Generator().manual_seed(4)).tolist()


def ask(prompts, count: int, sampling: SamplingParams | None = None) -> list[Request]:
    return [Request(prompt, count, sampling or SamplingParams(), ignore_eos=True) for prompt in prompts]


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_lists_of_all_that_counts_are_a_dense_draft(sampling):
    pair, requests = make("qwen2", layers=4), ask(RAGGED, 25, sampling)
    options = {"fast": True, "max_batch": 3}
    dense = serve(pair, requests, "specattn:p=0.6", **options)
    sparse = serve(pair, requests, "specattn:p=0.6:draft_p=0.9999999", **options)
    assert [result.tokens for result in sparse] == [result.tokens for result in dense]
    assert [result.accepted_per_round for result in sparse] == [r.accepted_per_round for r in dense]


@pytest.mark.parametrize("draft_p", [0.3, 0.9])
def test_a_target_that_reads_everything_is_not_led_astray(draft_p):
    """Whatever the draft proposes, greedy tokens are the target's."""
    pair, requests = make("llama", layers=4), ask([LONG, PROMPT], 30)
    options = {"fast": True, "max_batch": 2, "max_tokens": 600}
    dense = serve(pair, requests, "dense", **options)
    sparse = serve(pair, requests, f"specattn:p=1:draft_p={draft_p}", **options)
    assert [result.tokens for result in sparse] == [result.tokens for result in dense]


def test_the_draft_reads_less():
    pair, requests = make("qwen3", layers=4), ask([LONG], 40)
    options = {"fast": True, "max_tokens": 600}
    dense, sparse = (serve(pair, requests, f"specattn:p=0.9:draft_p={p}", **options)[0] for p in (1, 0.2))
    # Of four steps' keys and values it reads lists, in which the newest tokens always are, and the keys once.
    assert sparse.draft_read_fraction < 0.8 * dense.draft_read_fraction
    assert sparse.draft_read_fraction > 0.5 * dense.draft_read_fraction / 4


def test_neighbours_and_reused_slots_change_nothing():
    pair = make("qwen2", layers=4)
    options = {"fast": True, "max_tokens": 600}
    method = "specattn:p=0.6:draft_p=0.5"
    alone = [figures(serve(pair, ask([prompt], 20), method, **options))[0] for prompt in [LONG, *RAGGED]]
    together = figures(serve(pair, ask([LONG, *RAGGED], 20), method, **options, max_batch=3))
    assert together == alone


def test_rounds_of_another_kind_in_between():
    """A draft whose last scores are old starts anew: the same tokens as with lists of everything."""
    pair = make("qwen2", layers=4)
    mixed = serve(pair, ask([PROMPT], 30), "specattn:p=0.6:draft_p=0.9999999", fast=True, gamma="auto")
    assert len(mixed[0].tokens) == 30


def test_the_share_is_checked():
    with pytest.raises(UsageError, match="draft_p=0"):
        parse_method("specattn:draft_p=0")
