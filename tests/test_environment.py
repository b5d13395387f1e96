"""The environment of a result: what it was measured with, and nothing about whom it belongs to."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import specattn
from specattn.environment import _cpu_model, environment


def test_versions_processor_device_and_dtype() -> None:
    found = environment(torch.device("cpu"), torch.bfloat16)
    assert found["specattn"] == specattn.__version__
    assert found["torch"] == version("torch") and found["transformers"] == version("transformers")
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    assert found["cpu_count"] == os.cpu_count() and found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["python"] == platform.python_version()
    assert "gpu" not in found


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specattn.environment.PACKAGES", ("torch", "no-such-package"))
    found = environment()
    assert "torch" in found and "no-such-package" not in found


def test_a_gpu_is_named_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert environment(torch.device("cuda", 0), torch.float16)["gpu"] == "H200"
    assert "gpu" not in environment(torch.device("cpu"), torch.float16)


def test_a_machine_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(self: Path, **options: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", read_text)
    assert _cpu_model() == (platform.processor() or platform.machine())


def test_nobody_is_named() -> None:
    text = json.dumps(environment(torch.device("cpu"), torch.float32))
    for secret in (socket.gethostname(), str(Path.home()), os.getcwd()):
        assert secret not in text
    assert f'"{getpass.getuser()}"' not in text
