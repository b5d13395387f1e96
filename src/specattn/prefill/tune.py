"""The search for SpargeAttn's thresholds, head by head, under a bound on the error of the head's output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

import specattn
from specattn.attention import attached
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.mapping.identity import config_hash, describe
from specattn.pairs import Pair
from specattn.prefill.thresholds import OFF, Thresholds
from specattn.prefill.trial import Candidates, Trial
from specattn.prefill.tuned import TunedThresholds
from specattn.prefill.two_stage import check_head_dim
from specattn.runner import ModelRunner
from specattn.text import required_tokens

THETAS = (0.8, 0.6, 0.4, 0.2)
TAUS = (0.99, 0.98, 0.95, 0.9, 0.8)
LAMS = (OFF, 20.0, 15.0, 12.0, 10.0, 8.0, 6.0, 4.0)
"""What is tried, the careful values first: of equally sparse candidates the first wins."""

FIRST_SHARE = 7 / 8
"""How much of the bound theta and tau may use up: .07 of .08, the paper's figures. The rest is left to lam."""

LEAST_SPARSITY = 0.1
"""A head that would leave out less than this stays dense: its choice of blocks would cost more."""

Progress = Callable[[str, int], None]
"""Called with a stage, ``theta and tau`` or ``lam``, and how many tokens of it were just finished."""


def tune_sparge(
    pair: Pair,
    texts: Sequence[str | Sequence[int]],
    *,
    tokens: int = 8192,
    l1: float = 0.08,
    int8: bool = True,
    progress: Progress | None = None,
) -> TunedThresholds:
    """Find the sparsest thresholds for each layer and query head of the target (SpargeAttn, arXiv 2502.18137).

    The target reads the texts densely, twice. The first time every pair of theta and tau is tried beside it, and each
    head takes the sparsest pair whose output is within seven eighths of ``l1`` of dense attention's; the second time
    lam is searched in the same way, within ``l1``. A head that then leaves out no more than a tenth of its blocks is
    left dense. The memory does not depend on the number of texts.

    Args:
        pair: its target is tuned; a draft is not needed.
        texts: what to tune on, as text or token ids: the like of what will be served, as long as that.
        tokens: how much of each text is read.
        l1: bound of ``sum |sparse - dense| / sum |dense|`` over all tokens, for each head.
        int8: tune for eight-bit queries and keys.

    Raises:
        UsageError: if a text is too short or a figure out of range, before any work.
        CacheFullError: if a text does not fit in memory.
    """
    _check(pair, tokens, l1)
    if not texts:
        raise UsageError("no text to tune on; give at least one")
    ids = [required_tokens(pair.tokenizer, number, text, tokens) for number, text in enumerate(texts)]
    geometry = KVGeometry.from_config(pair.target.config, pair.dtype)
    runner = ModelRunner(pair.target, tokens=tokens, slots=1)

    def trial(stage: str, candidates: Candidates) -> Trial:
        return _run(runner, ids, Trial.of(candidates, int8, geometry, pair.device), stage, progress)

    first = trial("theta and tau", lambda layer: _grid(geometry.query_heads, pair.device))
    theta, tau = _first_choice(first, FIRST_SHARE * l1)
    dense = tau == 1
    second = trial("lam", lambda layer: _lams(theta[layer], tau[layer]))
    choice = _sparsest(second, l1).masked_fill(dense, 0)
    lam = torch.tensor(LAMS, device=pair.device)[choice]
    chosen_l1, sparsity = (
        figure.gather(-1, choice[..., None])[..., 0].tolist() for figure in (second.l1, second.sparsity)
    )
    return TunedThresholds(
        theta=_numbers(theta),
        tau=_numbers(tau),
        lam=_numbers(lam),
        l1=chosen_l1,
        sparsity=sparsity,
        target=describe(pair.target.config),
        target_hash=config_hash(pair.target.config),
        text_hash=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        tokens=sum(map(len, ids)),
        bound=l1,
        int8=int8,
        specattn=specattn.__version__,
    )


def check_bound(l1: float) -> None:
    """Refuse an error bound outside (0, 1).

    Raises:
        UsageError: naming it.
    """
    if not 0 < l1 < 1:
        raise UsageError(f"l1={l1} is outside (0, 1); it is a relative error, for example l1=0.08")


def _check(pair: Pair, tokens: int, l1: float) -> None:
    check_bound(l1)
    limit = pair.target.config.max_position_embeddings
    if not 1 <= tokens <= limit:
        raise UsageError(f"tokens={tokens:,} is outside 1 to {limit:,}, the context of the target")
    check_head_dim("tune sparge", KVGeometry.from_config(pair.target.config, pair.dtype).head_dim)


def _run(
    runner: ModelRunner, texts: Sequence[list[int]], trial: Trial, stage: str, progress: Progress | None
) -> Trial:
    """``trial`` after all texts."""
    with attached(runner.model):
        for ids in texts:
            slot = runner.cache.allocate(len(ids))
            report = (lambda count: progress(stage, count)) if progress else None
            runner.prefill(slot, ids, method=trial, progress=report)
            runner.cache.free(slot)
    return trial


def _grid(heads: int, device: torch.device) -> list[Thresholds]:
    return [Thresholds.uniform(theta, tau, OFF, heads, device) for theta, tau in product(THETAS, TAUS)]


def _lams(theta: Tensor, tau: Tensor) -> list[Thresholds]:
    # A dense head has no lam: it takes part to report its error.
    return [Thresholds(theta, tau, torch.full_like(theta, lam).masked_fill(tau == 1, OFF)) for lam in LAMS]


def _first_choice(trial: Trial, bound: float) -> tuple[Tensor, Tensor]:
    """theta and tau ``[layers, heads]``; tau is 1 where a head stays dense."""
    grid = torch.tensor(list(product(THETAS, TAUS)), device=trial.error.device)
    choice = _sparsest(trial, bound)
    theta, tau = grid[choice].unbind(-1)
    allowed = (trial.l1 <= bound).any(-1)
    sparsity = trial.sparsity.gather(-1, choice[..., None])[..., 0]
    return theta, tau.masked_fill(~allowed | (sparsity <= LEAST_SPARSITY), 1)


def _sparsest(trial: Trial, bound: float) -> Tensor:
    """int64 ``[layers, heads]``: the sparsest candidate within the bound, the first if there is none."""
    return trial.sparsity.masked_fill(trial.l1 > bound, -1).argmax(-1)


def _numbers(table: Tensor) -> list[list[float]]:
    """float32 numbers as they were written: 0.98, not 0.9800000190734863."""
    return [[round(value, 6) for value in row] for row in table.tolist()]
