"""Which attention a prefill gets: the kernel where it can run, and the reference, with the same figures, elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from specattn.kernels.check import error_ratio
from specattn.kernels.device import has_kernels
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
    from specattn.kernels import block_sparse_launch as module

    calls, kernel = [], module.block_sparse_attention

    def recorded(query, key, value, blocks, **options):
        calls.append(query.dtype)
        return kernel(query, key, value, blocks, **options)

    monkeypatch.setattr(block_attention, "has_kernels", lambda device: True)
    monkeypatch.setattr(module, "block_sparse_attention", recorded)
    return calls


def example(dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of 350 tokens, in stretches of like tokens, so that blocks are compressed."""
    generator = torch.Generator().manual_seed(0)
    stretches = [torch.randn(1, heads, 6, 64, generator=generator) for heads in (4, 2)]
    tokens = [stretch.repeat_interleave(64, 2)[:, :, :350] for stretch in stretches]
    tokens = [part + 0.4 * torch.randn(part.shape, generator=generator) for part in tokens]
    return [part.to(DEVICE, dtype) for part in (*tokens, torch.randn(1, 2, 350, 64, generator=generator))]


def run(start: int | None, int8: bool, dtype: torch.dtype = torch.float16) -> TwoStageOutput:
    query, key, value = example(dtype)
    thresholds = Thresholds.uniform(0.3, 0.7, 1.5, 4, DEVICE)
    rows = query[:, :, start or 0 :]
    return two_stage_attention(rows, key, value, thresholds, start=start, scaling=0.3, int8=int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("start", [50, None])
def test_both_report_the_same(kernel_calls, monkeypatch, start, int8):
    kernel = run(start, int8)
    assert kernel_calls == [torch.int8 if int8 else torch.float16]
    monkeypatch.setattr(block_attention, "has_kernels", lambda device: False)
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


def test_float32_goes_to_the_reference(kernel_calls):
    assert torch.isfinite(run(50, True, torch.float32).out).all()
    assert not kernel_calls


def test_kernels_run_on_gpus_that_are_new_enough(monkeypatch):
    assert not has_kernels(torch.device("cpu"))
    for capability, runs in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        has_kernels.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_kernels(torch.device("cuda")) is runs
    has_kernels.cache_clear()
