"""``sparge_attention`` in the place of PyTorch's attention, also inside a small diffusion transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripts import load_script
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from specattn import hilbert_permutation, sparge_attention
from specattn.errors import UsageError
from specattn.kernels.check import error_ratio

EXACT = {"tau": 1.0, "lam": float("inf"), "int8": False}
EXAMPLE = Path(__file__).parents[2] / "examples" / "sparge_grid.py"


def tensors(rows: int, length: int, heads: int = 4, kv_heads: int = 4, head_dim: int = 64, batch: int = 2):
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(batch, heads, rows, head_dim, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, length, head_dim, generator=generator)
    return query, key, value


@pytest.mark.parametrize("rows,length", [(200, 200), (1, 130), (300, 77)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_pytorchs_attention_if_nothing_may_be_left_out(rows, length, kv_heads, scale):
    query, key, value = tensors(rows, length, kv_heads=kv_heads)
    expected = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    out, sparsity = sparge_attention(query, key, value, scale=scale, return_sparsity=True, **EXACT)
    assert error_ratio(out, expected) < 1e-5
    assert sparsity.shape == (2, 4) and sparsity.abs().max() == 0


@pytest.mark.parametrize("head_dim", [16, 64, 72, 128, 256])
def test_a_causal_mask(head_dim):
    query, key, value = tensors(150, 150, head_dim=head_dim)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert error_ratio(sparge_attention(query, key, value, is_causal=True, **EXACT), expected) < 1e-5


def test_strided_and_low_precision_inputs():
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(150, 150))
    assert not query.is_contiguous()
    expected = scaled_dot_product_attention(query, key, value)
    assert error_ratio(sparge_attention(query, key, value, **EXACT), expected) < 1e-5
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    out = sparge_attention(*half, **EXACT)
    assert out.dtype == torch.bfloat16 and error_ratio(out, expected) < 0.01


class Block(nn.Module):
    """A DiT block: attention and MLP, both modulated by the time step; ``attention`` can be exchanged."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attention = heads, scaled_dot_product_attention
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time)[:, None].chunk(6, -1)
        normed = layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift
        query, key, value = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
        tokens = tokens + gate * self.out(mixed.transpose(1, 2).flatten(2))
        normed = layer_norm(tokens, tokens.shape[-1:]) * (1 + scale_mlp) + shift_mlp
        return tokens + gate_mlp * self.mlp(normed)


@pytest.mark.parametrize("shape", [(20, 25), (8, 12, 10)])
def test_a_diffusion_transformer_with_its_tokens_along_a_hilbert_curve(shape):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(128, heads=2) for _ in range(2)).eval()
    axes = torch.stack(torch.meshgrid(*(torch.linspace(0, 2, side) for side in shape), indexing="ij"))
    smooth = torch.sin(torch.einsum("a...,ac->...c", axes, torch.randn(len(shape), 128))).flatten(0, -2)
    tokens, time = smooth.expand(2, -1, -1), torch.randn(2, 128)

    def run(attention, tokens: Tensor) -> Tensor:
        for block in blocks:
            block.attention = attention
            tokens = block(tokens, time)
        return tokens

    shares: list[float] = []

    def sparse(*arguments, **options):
        out, sparsity = sparge_attention(*arguments, **options, tau=0.9, return_sparsity=True)
        shares.append(float(sparsity.mean()))
        return out

    order, inverse = hilbert_permutation(shape)
    with torch.no_grad():
        exact = run(scaled_dot_product_attention, tokens)
        same = run(lambda *a, **o: sparge_attention(*a, **o, **EXACT), tokens[:, order])[:, inverse]
        out = run(sparse, tokens[:, order])[:, inverse]
    assert error_ratio(same, exact) < 1e-5
    assert len(shares) == 2 and min(shares) > 0
    assert 0 < error_ratio(out, exact) < 0.1


def test_the_example_prints_a_table(capsys, monkeypatch):
    example = load_script("examples/sparge_grid.py")
    monkeypatch.setattr(example, "GRIDS", {"image": ((24, 32), (2, 3)), "video": ((4, 12, 16), (2, 2, 2))})
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8 and all(line.count("|") == 8 for line in lines)
    for line in lines[2:]:
        row_major, hilbert = (float(line.split("|")[cell].strip(" %")) for cell in (4, 6))
        assert hilbert >= row_major >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.ones(70, 70)}, "takes no attn_mask"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 must be 0"),
        ({"theta": 1.5}, r"theta=1.5 is outside \[-1, 1\]"),
        ({"theta": float("nan")}, "theta=nan is outside"),
        ({"tau": 0.0}, r"tau=0.0 is outside \(0, 1\]"),
        ({"tau": 1.2}, "tau=1.2"),
        ({"lam": 0.0}, "lam=0.0 is not above 0"),
        ({"lam": -50.0}, "lam=-50.0 is not above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        sparge_attention(*tensors(70, 70), **options)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(4, 64, 64), (4, 64, 64), (4, 64, 64)], {}, r"needs \[batch, heads, length, head_dim\]"),
        ([(1, 4, 9, 64), (1, 4, 9, 64), (1, 4, 8, 64)], {}, "keys and values alike"),
        ([(1, 4, 9, 64), (1, 3, 9, 64), (1, 3, 9, 64)], {}, "do not fit each other"),
        ([(2, 4, 9, 64), (1, 4, 9, 64), (1, 4, 9, 64)], {}, "do not fit each other"),
        ([(1, 4, 9, 64), (1, 4, 9, 32), (1, 4, 9, 32)], {}, "do not fit each other"),
        ([(1, 4, 9, 64), (1, 4, 19, 64), (1, 4, 19, 64)], {"is_causal": True}, "as many keys as rows"),
        ([(1, 4, 9, 20)] * 3, {}, "head_dim=20 is not supported.*multiple of 8"),
        ([(1, 4, 9, 512)] * 3, {}, "head_dim=512 is not supported"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, options, message):
    with pytest.raises(UsageError, match=message):
        sparge_attention(*(torch.zeros(shape) for shape in shapes), **options)


def test_training_is_refused():
    query, key, value = tensors(70, 70)
    query.requires_grad_()
    with pytest.raises(UsageError, match=r"torch\.no_grad"):
        sparge_attention(query, key, value)
    with torch.no_grad():
        assert sparge_attention(query, key, value).shape == query.shape
