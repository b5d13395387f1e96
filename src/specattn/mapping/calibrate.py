"""Calibrate the map between a target and its draft on a few texts: layer map and head mixtures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import specattn
from specattn.attention import attached
from specattn.cache import check_memory
from specattn.errors import UsageError
from specattn.gamma import check_gamma
from specattn.geometry import KVGeometry
from specattn.mapping.artifact import Mapping, MappingMetadata
from specattn.mapping.global_set import fit_groups, groups_for
from specattn.mapping.identity import config_hash, describe
from specattn.mapping.layer_map import monotone_map
from specattn.mapping.mixture import fit_mixture, layer_mixture, mixture_divergence
from specattn.mapping.samples import Geometry, RoundSample
from specattn.mapping.signals import fit_signals
from specattn.mapping.similarity import METRICS, similarity
from specattn.mapping.statistics import collect, statistics_bytes
from specattn.pairs import Pair
from specattn.text import required_tokens

Progress = Callable[[str, int], None]
"""Called with a stage (``target``, ``draft``, ``mixture``) and how many tokens or passes of it were just finished."""

ITERATIONS = 60
"""Passes of a mixture fit at most."""


def calibrate(
    pair: Pair,
    texts: Sequence[str | Sequence[int]],
    *,
    tokens: int = 4096,
    rounds: int = 128,
    gamma: int = 4,
    metric: str = "kl",
    heads: int = 84,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mapping:
    """Find which draft attention predicts which target attention.

    Args:
        pair: target and draft.
        texts: what to calibrate on, as text or token ids: the like of what will be served.
        tokens: how much of each text is read; longer contexts teach longer distances.
        rounds: rounds sampled in each text.
        gamma: draft length of the sampled rounds.
        metric: similarity of the layer map: ``kl`` (paper), ``js`` or ``recall``.
        heads: about how many draft heads make the global set (``map=global``): whole groups of those that share keys.
        seed: of the sampled positions.

    Raises:
        UsageError: if there is no draft, a text is too short or a figure out of range, before any work.
        CacheFullError: if the statistics do not fit in memory.
    """
    geometry = _check(pair, tokens, rounds, gamma, metric, heads)
    assert pair.draft is not None
    tokenized = [required_tokens(pair.tokenizer, number, text, tokens) for number, text in enumerate(texts)]
    if not tokenized:
        raise UsageError("no text to calibrate on; give at least one")
    needed = len(texts) * statistics_bytes(*_kv_geometries(pair), tokens, rounds)
    check_memory(needed, pair.device, f"the statistics of {len(texts)} x {rounds} rounds of {tokens} tokens")
    generator = torch.Generator().manual_seed(seed)
    with attached(pair.target, pair.draft):
        by_text = [
            collect(pair, ids, rounds=rounds, gamma=gamma, generator=generator, progress=progress)
            for ids in tokenized
        ]
    samples = [sample for of_text in by_text for sample in of_text]
    mapping = _fit(pair, geometry, samples, tokenized, metric=metric, heads=heads, progress=progress)
    weight, half_life = fit_signals(by_text, geometry, mapping.heads_kv, gamma + 1)
    return replace(mapping, signal_weight=weight, signal_half_life=half_life)


def _fit(
    pair: Pair,
    geometry: Geometry,
    samples: Sequence[RoundSample],
    tokenized: Sequence[Sequence[int]],
    *,
    metric: str,
    heads: int,
    progress: Progress | None,
) -> Mapping:
    """The mapping that the statistics give."""
    assert pair.draft is not None
    report = (lambda iteration, divergence: progress("mixture", 1)) if progress else None
    scores = similarity(samples, geometry, metric)
    layer_map = monotone_map(scores)
    weights, divergence = fit_mixture(samples, geometry.all_rows, iterations=ITERATIONS, progress=report)
    size = _kv_geometries(pair)[1].group
    chosen, limited, limited_divergence = fit_groups(
        samples,
        geometry.all_rows,
        weights,
        groups=groups_for(heads, size, geometry.draft_rows // size),
        size=size,
        iterations=ITERATIONS,
        progress=report,
    )
    by_layer = layer_mixture(layer_map, geometry, geometry.kv_heads).to(weights.device)
    heads_kv, heads_query = geometry.split(weights)
    global_kv, global_query = geometry.split(limited)
    return Mapping(
        layer_map=layer_map.cpu(),
        similarity=scores.cpu(),
        heads_kv=heads_kv.cpu(),
        heads_query=heads_query.cpu(),
        global_heads=chosen.cpu(),
        global_kv=global_kv.cpu(),
        global_query=global_query.cpu(),
        metadata=MappingMetadata(
            target=describe(pair.target.config),
            target_hash=config_hash(pair.target.config),
            draft=describe(pair.draft.config),
            draft_hash=config_hash(pair.draft.config),
            text_hash=hashlib.sha256(json.dumps(tokenized).encode()).hexdigest(),
            metric=metric,
            tokens=sum(len(ids) for ids in tokenized),
            rounds=len(samples),
            specattn=specattn.__version__,
            geometry=geometry,
            kl_layer_map=float(mixture_divergence(samples, geometry.kv_rows, by_layer).mean()),
            kl_heads=_kv_mean(divergence, geometry),
            kl_global=_kv_mean(limited_divergence, geometry),
        ),
    )


def _check(pair: Pair, tokens: int, rounds: int, gamma: int, metric: str, heads: int) -> Geometry:
    if pair.draft is None:
        raise UsageError("calibration maps a draft to its target, and the pair has no draft; give one")
    if metric not in METRICS:
        raise UsageError(f"metric={metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if min(tokens, rounds, gamma, heads) < 1:
        raise UsageError(f"{tokens=}, {rounds=}, {gamma=} and {heads=} must all be at least 1")
    check_gamma(gamma)
    if tokens > pair.context_limit:
        raise UsageError(
            f"tokens={tokens:,} is beyond the models' context of {pair.context_limit:,}; use fewer tokens"
        )
    target, draft = _kv_geometries(pair)
    return Geometry(target.layers, target.query_heads, target.kv_heads, draft.layers, draft.query_heads)


def _kv_geometries(pair: Pair) -> tuple[KVGeometry, KVGeometry]:
    assert pair.draft is not None
    return (
        KVGeometry.from_config(pair.target.config, pair.target.dtype),
        KVGeometry.from_config(pair.draft.config, pair.draft.dtype),
    )


def _kv_mean(divergence: Tensor, geometry: Geometry) -> float:
    return float(geometry.split(divergence)[0].mean())
