"""What the scripts that measure have in common: the options that name a pair, its texts and the report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import specattn
from specattn.files import write_file
from specattn.pairs import Pair


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options for a pair, a mapping, texts and a report; a script adds its own."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--pair", help="a built-in pair; qwen2.5-coder by default")
    result.add_argument("--target", help="or a target")
    result.add_argument("--draft", help="and its draft")
    result.add_argument("--device")
    result.add_argument("--dtype")
    result.add_argument("--mapping", help="the calibrated mapping, if not the pair's own")
    result.add_argument("--text", action="append", required=True, help="a text file; repeatable")
    result.add_argument("--out", help="where the JSON document goes")
    return result


def load_pair(asked: argparse.Namespace) -> Pair:
    """The pair that the options name."""
    return specattn.load_pair(
        asked.pair or (None if asked.target else "qwen2.5-coder"),
        target=asked.target,
        draft=asked.draft,
        device=asked.device,
        dtype=asked.dtype,
    )


def save(report: dict[str, Any], out: str | None) -> None:
    """Replace the document, after every part of it: an interruption keeps what is done."""
    if out:
        write_file(Path(out), (json.dumps(report, indent=1) + "\n").encode(), "the report")
