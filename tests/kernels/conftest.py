"""Triton's interpreter runs the kernels where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True, scope="session")
def scalars_as_loop_bounds() -> Iterator[None]:
    """Let the interpreter of Triton 3.6 take a tensor as a loop's bound under NumPy 2.4.

    It asks for ``int()`` of an array of one element, which NumPy refuses from 2.4 on.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield
