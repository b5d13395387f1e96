"""What SpargeAttn leaves out on smooth grids of features, in row-major order and along a Hilbert curve.

``python examples/sparge_grid.py`` prints, for an image and a video of random smooth features, the share of the matrix
products that was left out and the relative L1 error of the output. With theta -1 every block is compressed, whether its
tokens are alike or not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

import specattn

GRIDS = {"image": ((64, 64), (4, 4)), "video": ((12, 20, 20), (2, 3, 3))}
"""Cells of a grid, and of the coarse one whose features it interpolates."""

HEADS, HEAD_DIM = 2, 64
SHARPNESS = 0.8
"""A larger factor makes attention look at fewer cells."""


def smooth_features(shape: tuple[int, ...], coarse: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``[1, HEADS, cells, HEAD_DIM]`` in row-major order: coarse noise, interpolated, with a little fine noise."""
    noise = torch.randn(1, HEADS * HEAD_DIM, *coarse, generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    smooth = interpolate(noise, shape, mode=mode, align_corners=False)
    features = smooth / smooth.std() + 0.2 * torch.randn(smooth.shape, generator=generator)
    return features.view(1, HEADS, HEAD_DIM, -1).mT


def inputs(shape: tuple[int, ...], coarse: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; a cell looks for cells with features like its own."""
    generator = torch.Generator().manual_seed(0)
    features = smooth_features(shape, coarse, generator)
    return SHARPNESS * features, features, smooth_features(shape, coarse, generator)


def measure(tensors: tuple[Tensor, Tensor, Tensor], theta: float, tau: float) -> tuple[float, float]:
    """Sparsity, and the L1 error relative to exact attention."""
    exact = scaled_dot_product_attention(*tensors)
    out, sparsity = specattn.sparge_attention(*tensors, theta=theta, tau=tau, return_sparsity=True)
    return float(sparsity.mean()), float((out - exact).abs().sum() / exact.abs().sum())


def main() -> None:
    """Print the table."""
    print(
        "| grid | theta | tau | row-major: sparsity | L1 | Hilbert: sparsity | L1 |\n|---|---|---|---|---|---|---|"
    )
    for name, (shape, coarse) in GRIDS.items():
        tensors = inputs(shape, coarse)
        order, _ = specattn.hilbert_permutation(shape)
        along = tuple(tensor[:, :, order] for tensor in tensors)
        for theta in (0.6, -1.0):
            for tau in (0.98, 0.9):
                figures = [
                    f"{s:.1%} | {e:.3f}" for s, e in (measure(t, theta, tau) for t in (tensors, along))
                ]
                size = " x ".join(map(str, shape))
                print(f"| {name} {size} | {theta} | {tau} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
