"""``specattn eval gsm8k``."""

from __future__ import annotations

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import Data, NewTokens, RunOptions, with_run_options


@with_run_options
def gsm8k(
    *,
    data: Data,
    max_new_tokens: NewTokens = 320,
    options: RunOptions,
) -> None:
    """Word problems, worked out step by step to a number."""
    from specattn.evaluation.tasks.gsm8k import GSM8K
    from specattn.evaluation.tasks.options import DataFile

    execute(GSM8K(DataFile(data), max_new_tokens), options)
