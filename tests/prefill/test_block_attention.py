"""Which attention a prefill gets: the kernel where it can run, and the reference, with the same figures, elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from naive_sparge import example

from specattn.kernels.check import error_ratio
from specattn.prefill import block_attention, two_stage
from specattn.prefill.thresholds import Thresholds
from specattn.prefill.two_stage import TwoStageOutput, two_stage_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def kernel_calls(monkeypatch):
    """What the kernel, which here may be an interpreted one, was called with."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    from specattn.kernels import block_sparse_attention_triton as module

    calls, kernel = [], module.block_sparse_attention

    def recorded(query, key, value, blocks, **options):
        calls.append(query.dtype)
        return kernel(query, key, value, blocks, **options)

    monkeypatch.setattr(block_attention, "_has_kernels", lambda value: True)
    monkeypatch.setattr(module, "block_sparse_attention", recorded)
    return calls


def run(start: int | None, int8: bool, head_dim: int = 64) -> TwoStageOutput:
    query, key, value = (part.to(DEVICE, torch.float16) for part in example(300, 350, head_dim=head_dim))
    thresholds = Thresholds.uniform(0.3, 0.7, 1.5, 4, DEVICE)
    return two_stage_attention(query, key, value, thresholds, start=start, scaling=0.6, int8=int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("start", [50, None])
def test_both_report_the_same(kernel_calls, monkeypatch, start, int8):
    kernel = run(start, int8)
    assert kernel_calls == [torch.int8 if int8 else torch.float16]
    monkeypatch.setattr(block_attention, "_has_kernels", lambda value: False)
    reference = run(start, int8)
    assert len(kernel_calls) == 1
    assert kernel.out.dtype == torch.float16
    assert error_ratio(kernel.out, reference.out) < 2e-3
    assert torch.equal(kernel.computed, reference.computed) and kernel.computed.mean() < 1
    # Logits on the edge of lam may be rounded to its other side.
    assert torch.allclose(kernel.skipped, reference.skipped, atol=1e-3) and kernel.skipped.mean() > 0.01


def test_what_the_kernel_cannot_take_goes_to_the_reference(kernel_calls, monkeypatch):
    monkeypatch.setattr(two_stage, "QUERY_BLOCK", 96)
    assert torch.isfinite(run(50, False).out).all() and not kernel_calls


def test_on_a_cpu_and_in_float32_there_is_no_kernel():
    assert not block_attention._has_kernels(torch.ones(1, dtype=torch.float16))
    assert not block_attention._has_kernels(torch.ones(1, device=DEVICE))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_on_a_gpu_there_is():
    assert block_attention._has_kernels(torch.ones(1, device=DEVICE, dtype=torch.bfloat16))
