"""A tiny pair in folders, a text and a mapping, made once; and what generates with them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from command import run
from generate_case import LIMIT
from tiny import tiny_pair

WORDS = "the draft reads a long book and tells its target where to look for a token of every round"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of a target and a draft, the options that name them, a text, and a calibrated mapping."""
    folder = tmp_path_factory.mktemp("tiny")
    pair = tiny_pair("llama")
    for role in ("target", "draft"):
        getattr(pair, role).save_pretrained(folder / role)
        pair.tokenizer.save_pretrained(folder / role)
    text = folder / "book.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS.split(), k=800)), encoding="utf-8")
    models = [
        "--target",
        folder / "target",
        "--draft",
        folder / "draft",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    mapping = folder / "mapping.safetensors"
    sizes = ["--tokens", 128, "--rounds", 8, "--heads", 3]
    calibrated = run("calibrate", "--text", text, *sizes, "--out", mapping, *models, "--json")
    return SimpleNamespace(
        folder=folder, text=text, models=models, mapping=mapping, calibrated=calibrated, pair=pair
    )


@pytest.fixture
def generate(tiny: SimpleNamespace):
    """Generate with the tiny pair; its mapping is named unless ``mapping`` is false."""

    def call(*arguments: object, mapping: bool = True, **options):
        named = ["--mapping", tiny.mapping] if mapping else []
        return run("generate", *LIMIT, *arguments, *named, *tiny.models, **options)

    return call
