"""The audit against transformers' own eager attention, what it draws, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch
from paged import SCALING, contents, paged_round
from tiny import tiny_mapping, tiny_pair

from specattn.attention import LayerCall
from specattn.audit import Audit
from specattn.engine import Engine
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.geometry import KVGeometry
from specattn.kernels.sparse_attention import sparse_attention
from specattn.pairs import Pair
from specattn.selection.base import Selection
from specattn.selection.registry import parse_method

GEOMETRY = KVGeometry(2, 6, 2, 8, torch.float32)
LENGTHS, ROWS, LAYER = [30, 9], 3, 1
PROMPT = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(2)).tolist()


def observed(promised: float | None, rate: float = 1.0):
    """An audit of one layer of a ragged batch, and the selection and the output that it saw."""
    round = paged_round(GEOMETRY, LENGTHS, ROWS)
    position, starts = torch.arange(max(LENGTHS) + ROWS), torch.tensor(LENGTHS)[:, None, None]
    mask = ((position % 3 == 0) | (position >= starts)) & (position < starts + ROWS)
    selection = Selection.from_mask(mask.expand(-1, 2, -1))
    queries = round.queries(LAYER)
    keys, values = round.source.gather(LAYER, selection.indices)
    output = sparse_attention(queries, keys, values, selection, round.step.positions, SCALING)
    audit = Audit(rate, promised, torch.device("cpu"))
    for slot in round.step.host_slots:
        audit.begin(slot, 7)
    audit(round.step, LayerCall(LAYER, queries, SCALING, None), selection, output)
    return audit, round, output


def plain_figures(round, output, request: int) -> tuple[list[float], list[float]]:
    """Kept mass and relative error of each query of a request, one at a time in float64."""
    length = LENGTHS[request]
    keys, values = (part[LAYER].double() for part in contents(GEOMETRY, length, ROWS, round.seed))
    masses, errors = [], []
    for row in range(ROWS):
        for head in range(GEOMETRY.query_heads):
            kv, seen = head // GEOMETRY.group, length + row + 1
            query = round.queries(LAYER)[request, row, head].double()
            weights = (keys[kv, :seen] @ query * SCALING).softmax(0)
            masses.append(sum(float(weights[t]) for t in range(seen) if t % 3 == 0 or t >= length))
            exact = weights @ values[kv, :seen]
            errors.append(float((output[request, row, head].double() - exact).norm() / exact.norm()))
    return masses, errors


def test_figures_are_those_of_a_plain_reading():
    audit, round, output = observed(promised=1.5)
    for request, slot in enumerate(round.step.host_slots):
        masses, errors = plain_figures(round, output, request)
        report = audit.finish(slot, full=1e6)
        assert (report.units, report.queries) == (2, ROWS * GEOMETRY.query_heads)
        assert report.attention_mass == pytest.approx(sum(masses) / len(masses), rel=1e-5)
        assert report.least_mass == pytest.approx(min(masses), rel=1e-5)
        assert report.output_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert report.largest_error == pytest.approx(max(errors), rel=1e-4)
        assert report.violations == sum(error > 1.5 for error in errors) / len(errors)
        assert 0 < report.violations < 1
        # Each KV head was read once, keys and values.
        assert report.read_fraction * 1e6 == pytest.approx((LENGTHS[request] + ROWS) * 2 * 2 * 8 * 4)


def test_without_a_promise_there_are_no_violations():
    audit, round, _ = observed(promised=None)
    report = audit.finish(round.step.host_slots[0], full=1e6)
    assert report.promised_error is None and report.violations is None


def run(method: str, prompts, audit: float, pair: Pair | None = None, **options):
    pair = pair or tiny_pair("llama")
    options = {"ignore_eos": True, "max_new_tokens": 40, **options}
    return generate(pair, prompts, method=method, mapping=tiny_mapping(pair), audit=audit, **options)


def test_an_audit_changes_nothing_and_is_in_no_other_figure():
    without, audited = (run("specattn:p=0.5", [PROMPT], rate)[0] for rate in (0.0, 0.5))
    assert without.audit is None and audited.audit is not None
    assert audited.tokens == without.tokens
    assert audited.kv_read_fraction == without.kv_read_fraction
    assert 0 < audited.audit.attention_mass < 1 and audited.audit.output_error > 0


def test_everything_audited_reads_all_sparse_layers_once_more():
    (result,) = run("specattn:p=0.5", [PROMPT], 1.0)
    assert result.audit.read_fraction == pytest.approx(1 / 3)  # one layer of three is sparse
    assert result.audit.units == 2 * result.rounds


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_rate_is_what_it_costs(rate):
    (result,) = run("specattn:p=0.5:dense_layers=0", [PROMPT], rate, max_new_tokens=150)
    units = 6 * result.rounds
    assert abs(result.audit.units / units - rate) < 4 * (rate * (1 - rate) / units) ** 0.5
    assert result.audit.read_fraction == pytest.approx(rate, rel=0.3)


def test_a_request_is_audited_alike_in_any_batch():
    prompts = [PROMPT, PROMPT[:13], PROMPT[4:30]]
    together = run("specattn:p=0.5", prompts, 0.3)
    for number, (prompt, result) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = run("specattn:p=0.5", [prompt], 0.3, seed=number)
        assert result.audit.units == alone.audit.units
        assert result.audit.output_error == pytest.approx(alone.audit.output_error, rel=1e-4)


def test_full_lists_keep_everything():
    (result,) = run("specattn:p=1", [PROMPT], 1.0)
    assert result.audit.attention_mass == pytest.approx(1, abs=1e-6)
    assert result.audit.largest_error < 1e-5


def test_dense_attention_has_nothing_to_audit():
    (result,) = run("dense", [PROMPT], 1.0)
    assert (result.audit.units, result.audit.attention_mass, result.audit.output_error) == (0, 1.0, 0.0)


def test_the_promise_of_vattention_is_checked():
    method = "vattention:base=(streaming:budget=4:sink=0):sink=1:window=1:least=4:eps=0.3:delta=0.2"
    (result,) = run(method, [PROMPT], 1.0)
    assert result.audit.promised_error == 0.3
    assert 0 <= result.audit.violations < 0.2
    assert parse_method(f"{method}:verify=denominator").promised_error is None


def test_the_promise_of_specattn_is_checked():
    (result,) = run("specattn:p=0.3:eps=0.3:delta=0.2:sink=0:window=0", [PROMPT], 1.0)
    assert result.audit.promised_error == 0.3
    assert 0 <= result.audit.violations < 0.2
    assert parse_method("specattn:p=0.5").promised_error is None


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_rates_outside_the_unit_interval_are_refused(rate):
    with pytest.raises(UsageError, match=r"audit=.* is outside \[0, 1\].*audit=0\.01"):
        Engine(tiny_pair("llama"), method="dense", audit=rate, max_tokens=50)


def test_evicting_methods_have_nothing_to_compare_with():
    with pytest.raises(UsageError, match="method 'h2o' drops it"):
        Engine(tiny_pair("llama"), method="h2o", audit=0.1, max_tokens=50)
