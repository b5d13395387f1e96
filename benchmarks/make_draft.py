"""A worse draft out of a model: its first layers only, or its weights rounded to a few bits.

``make_draft.py qwen2.5-coder-0.5b --layers 12 --out FOLDER`` writes a model that ``--draft FOLDER`` takes. It is for
studies of what the draft's quality matters to the selection; nothing is trained or compressed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.pairs.load import find_pair, load_model

GROUP = 32
"""Weights of a row that share a scale."""


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Drop all layers behind the first ``count``."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight`` with each group of :data:`GROUP` values of a row on a symmetric grid of ``2**bits - 1`` steps."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    largest = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-12)
    return (groups.div(scale).round() * scale).flatten(1).to(weight.dtype)


def round_weights(model: PreTrainedModel, bits: int) -> None:
    """Round the matrices of all layers; the embedding and the output head stay as they are."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, bits)


def main(arguments: list[str] | None = None) -> None:
    """Load, change, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a hub id, a folder, a GGUF file or a built-in model")
    parser.add_argument("--layers", type=int, help="how many of the first layers to keep")
    parser.add_argument("--bits", type=int, help="bits of a weight, 2 to 8")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    asked = parser.parse_args(arguments)
    found = find_pair(target=asked.model)
    model = load_model(found.target, torch.device("cpu"), found.dtype)
    if asked.layers:
        keep_layers(model, asked.layers)
    if asked.bits:
        round_weights(model, asked.bits)
    model.save_pretrained(asked.out)
    found.tokenizer.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
