"""Products of few rows, fused with what stands around them: kernels against exact products, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels import linear_add, norm_linear
from specattn.kernels.check import error_ratio
from specattn.kernels.default_tilings import LONG, split_tiling
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.product_tiling import MOST_ROWS, ProductTiling, ProductWorkspace

linear_add_triton = pytest.importorskip("specattn.kernels.linear_add_triton")
norm_linear_triton = pytest.importorskip("specattn.kernels.norm_linear_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts numbers off where it makes bfloat16 of them; float16 it rounds, as a GPU does with both.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TYPES = [(torch.float32, 1e-6), (HALF, 1e-2 if torch.cuda.is_available() else 2e-3)]
ROWS = [1, 5, 16, 17, 48]
EPS = 1e-6
SMALL = ProductTiling(columns=16, depth=32)
DEEP = ProductTiling(columns=16, depth=64, stages=2)
DESCRIBED = ProductTiling(columns=16, depth=32, described=True)
WIDER = ProductTiling(columns=32, depth=64, described=True, parts=2)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a result that was not written is NaN."""
    for owner, name in ((Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(empty):
    def fill(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return fill


def exact_norm(stream: Tensor, gain: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(stream.double(), stream.shape[-1:], gain.double(), EPS)


def begun(stream: Tensor, gain: Tensor, parts: int) -> NormedRows:
    """The norm of ``stream`` as the kernel before leaves it."""
    squares = [part.float().square().sum(-1) for part in stream.tensor_split(parts, -1)]
    rows = (stream.float() * gain.float() * shrinkage(stream.dtype)).to(stream.dtype)
    return NormedRows(rows, torch.stack(squares), EPS)


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels,outputs,has_bias", [(64, 48, True), (72, 40, False), (136, 23, True)])
@pytest.mark.parametrize("tiling", [SMALL, DEEP, DESCRIBED, WIDER])
def test_norm_linear(poisoned, dtype, bound, rows, channels, outputs, has_bias, tiling):
    stream, gain = 30 * randn(rows, channels, dtype=dtype), randn(channels, seed=1, dtype=dtype)
    weight = randn(outputs, channels, seed=2, dtype=dtype)
    bias = randn(outputs, seed=3, dtype=dtype) if has_bias else None
    exact = exact_norm(stream, gain) @ weight.double().T
    exact = exact if bias is None else exact + bias
    normed = begun(stream, gain, parts=5)
    assert error_ratio(norm_linear.norm_linear(normed, weight, bias), exact) < bound
    kernel = norm_linear_triton.norm_linear(normed, weight, bias, tiling=tiling)
    assert kernel.shape == (rows, outputs) and kernel.dtype == dtype
    assert error_ratio(kernel, exact) < bound


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels,width", [(64, 48), (72, 40), (136, 23)])
@pytest.mark.parametrize("tiling", [SMALL, DEEP, DESCRIBED, WIDER])
def test_norm_gated_linear(poisoned, dtype, bound, rows, channels, width, tiling):
    stream, gain = randn(rows, channels, dtype=dtype), randn(channels, seed=1, dtype=dtype)
    weight = randn(2 * width, channels, seed=2, dtype=dtype) / channels**0.5
    gate, up = (exact_norm(stream, gain) @ weight.double().T).chunk(2, -1)
    exact = gate * gate.sigmoid() * up
    normed = begun(stream, gain, parts=1)
    assert error_ratio(norm_linear.norm_gated_linear(normed, weight), exact) < bound
    kernel = norm_linear_triton.norm_gated_linear(normed, weight, tiling=tiling)
    assert kernel.shape == (rows, width) and kernel.dtype == dtype
    assert error_ratio(kernel, exact) < bound


@pytest.mark.parametrize("tiling", [DESCRIBED, WIDER])
@pytest.mark.parametrize("rows", [5, 48])
def test_linear_add_by_described_tiles(poisoned, rows, tiling):
    x, weight = randn(rows, 168), randn(40, 168, seed=1)
    stream, gain = randn(rows, 40, seed=2), randn(40, seed=3)
    total, normed = linear_add_triton.linear_add(x, weight, None, stream, gain, EPS, tiling=tiling)
    exact = stream.double() + x.double() @ weight.double().T
    assert error_ratio(total, exact) < 1e-6 and error_ratio(normed.rows, exact * gain) < 1e-6
    assert error_ratio(normed.squares.sum(0), exact.square().sum(-1)) < 1e-6


def test_rows_that_are_normalised_already_are_multiplied_as_they_are():
    rows, weight = randn(5, 64), randn(32, 64, seed=1)
    kernel = norm_linear_triton.norm_linear(NormedRows(rows), weight, tiling=SMALL)
    assert error_ratio(kernel, rows.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels,outputs,has_bias", [(64, 48, True), (168, 40, False), (136, 23, True)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_linear_add(poisoned, dtype, bound, rows, channels, outputs, has_bias, parts):
    x, weight = randn(rows, channels, dtype=dtype), randn(outputs, channels, seed=2, dtype=dtype)
    stream, gain = randn(rows, outputs, seed=1, dtype=dtype), randn(outputs, seed=4, dtype=dtype)
    bias = randn(outputs, seed=3, dtype=dtype) if has_bias else None
    exact = stream.double() + x.double() @ weight.double().T
    exact = exact if bias is None else exact + bias
    total, normed = linear_add.linear_add(x, weight, bias, stream, gain, EPS)
    assert error_ratio(total, exact) < bound and error_ratio(normed.rows, exact_norm(exact, gain)) < bound
    tiling = ProductTiling(columns=16, depth=32, parts=parts)
    workspace = ProductWorkspace(
        torch.full((parts * 3 * 64 * 16,), torch.nan, device=DEVICE),
        torch.zeros(3, dtype=torch.int32, device=DEVICE),
    )
    before = stream.clone()
    for _ in range(2):  # the arrivals of each are counted from 0
        total, normed = linear_add_triton.linear_add(
            x, weight, bias, stream, gain, EPS, workspace, tiling=tiling
        )
        assert total.shape == stream.shape and total.dtype == dtype
        assert error_ratio(total, exact) < bound
        assert error_ratio(normed.squares.sum(0), total.double().square().sum(-1)) < 1e-6
        wanted = total.double() * gain.double() * shrinkage(dtype)
        assert error_ratio(normed.rows, wanted) < bound
    assert torch.equal(stream, before) and not workspace.arrivals.any()


@pytest.mark.parametrize("rows", [3, 20, 48, MOST_ROWS])
@pytest.mark.parametrize("outputs,channels", [(32, 2080), (320, 2080), (72, LONG + 24)])
def test_a_layer_by_default_tilings(rows, outputs, channels):
    assert split_tiling(rows, outputs, channels, DEVICE).parts > 1 or outputs == 320
    x, out = randn(rows, channels), randn(outputs, channels, seed=1)
    stream, gain = randn(rows, outputs, seed=2), randn(outputs, seed=3)
    total, normed = linear_add_triton.linear_add(x, out, None, stream, gain, EPS)
    exact = stream.double() + x.double() @ out.double().T
    assert error_ratio(total, exact) < 1e-6
    weight = randn(96, outputs, seed=4)
    product = exact_norm(exact, gain) @ weight.double().T
    assert error_ratio(norm_linear_triton.norm_linear(normed, weight), product) < 1e-6
    gate, up = product.chunk(2, -1)
    assert (
        error_ratio(norm_linear_triton.norm_gated_linear(normed, weight), gate * gate.sigmoid() * up) < 1e-6
    )


def test_a_stream_that_its_gain_takes_out_of_range():
    """The norm has float16's range where the stream times the gain would leave it."""
    stream, gain = (2e4 * randn(4, 64)).clamp(-6e4, 6e4).half(), 8 * randn(64, seed=1).half()
    x, out, weight = randn(4, 32).half(), randn(64, 32, seed=2).half(), randn(32, 64, seed=3).half()
    total, normed = linear_add_triton.linear_add(x, out, None, stream, gain, EPS, tiling=SMALL)
    assert not (total * gain).isfinite().all()
    exact = exact_norm(total, gain) @ weight.double().T
    assert error_ratio(norm_linear_triton.norm_linear(normed, weight, tiling=SMALL), exact) < 2e-3


def test_what_does_not_fit_is_refused():
    x, weight, stream, gain = randn(65, 64), randn(32, 64), randn(65, 32), randn(32)
    with pytest.raises(UsageError, match="65 rows"):
        linear_add_triton.linear_add(x, weight, None, stream, gain, EPS)
    with pytest.raises(UsageError, match="must be contiguous"):
        linear_add_triton.linear_add(x[:16], weight, None, randn(16, 64)[:, :32], gain, EPS)
    workspace = ProductWorkspace(
        torch.empty(16, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    )
    tiling = ProductTiling(16, 32, parts=2)
    with pytest.raises(UsageError, match="workspace of 16 elements"):
        linear_add_triton.linear_add(x[:16], weight, None, stream[:16], gain, EPS, workspace, tiling=tiling)


@pytest.mark.parametrize(
    "parts,channels,cut", [(1, 100, (1, 4)), (2, 168, (2, 3)), (5, 64, (2, 1)), (4, 160, (3, 2))]
)
def test_every_part_has_channels(parts, channels, cut):
    assert ProductTiling(16, 32, parts=parts).cut(channels) == cut
