"""What the tests of ``specattn generate`` ask for, and what they compare it with."""

from __future__ import annotations

from types import SimpleNamespace

import specattn

PROMPT = "the draft reads a long book"
TOKENS = 14
LIMIT = ["--max-new-tokens", TOKENS]


def dense(tiny: SimpleNamespace, prompt: str) -> specattn.GenerationResult:
    """What the library makes of a prompt, read densely."""
    return specattn.generate(tiny.pair, prompt, method="dense", max_new_tokens=TOKENS)
