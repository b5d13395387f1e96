"""What keeps a model on a GPU from the kernels, each with its reason; no GPU is needed to say it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from specattn.fast.decoder import lacks_kernels


def model(dtype: torch.dtype = torch.bfloat16, channels: int = 128, device: str = "cuda") -> SimpleNamespace:
    """What :func:`lacks_kernels` looks at."""
    layer = SimpleNamespace(self_attn=SimpleNamespace(head_dim=channels))
    decoder = SimpleNamespace(layers=[layer])
    return SimpleNamespace(device=torch.device(device), dtype=dtype, get_decoder=lambda: decoder)


@pytest.fixture
def new_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("new_gpu")
def test_a_model_of_the_kernels_kind_lacks_nothing():
    assert lacks_kernels(model()) is None
    assert lacks_kernels(model(torch.float32, 80, "cpu")) is None


@pytest.mark.usefixtures("new_gpu")
@pytest.mark.parametrize(
    ("found", "reason"), [(model(torch.float32), "not float32"), (model(channels=512), "512 channels")]
)
def test_what_the_kernels_do_not_take_is_named(found, reason):
    assert reason in lacks_kernels(found)


def test_an_old_gpu_and_a_missing_compiler_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in lacks_kernels(model())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in lacks_kernels(model())
