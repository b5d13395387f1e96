"""Join the JSON of evaluations that differ in texts or methods only: ``merge_results.py A.json B.json > ALL.json``.

Documents and methods are independent, so that they can be evaluated by processes side by side. An interrupted part
gives the results that it has: the whole is then not ``complete``, and ``incomplete_parts`` names it. A result that
several parts have counts once, of the first complete one. All parts must have the same dense reference:
``reference_spread`` says how far the perplexities of one document under it lie apart, as a share.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.fidelity import FidelityResult
from specattn.evaluation.summary import intervals, label
from specattn.report.evaluations import parse_evaluation

Part = Mapping[str, Any]

OWN = (
    "documents",
    "results",
    "intervals",
    "complete",
    "without_results",
    "incomplete_parts",
    "reference_spread",
)
"""What a part says of itself; all else is the protocol and the environment, and the same in all parts."""

ROUNDING = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""How far rounding may move a perplexity: the same reference, read in batches of another size.

In bfloat16 it moved one of 255 tokens after 32,768 by 4e-3; another text moves it by far more.
"""


def merge(parts: Mapping[str, Part]) -> dict[str, Any]:
    """One report with all documents and results.

    Args:
        parts: reports by the names of their files.

    Raises:
        SystemExit: if there are no results, or the parts differ in the protocol, environment or dense reference.
    """
    usable = {name: part for name, part in parts.items() if part.get("results")}
    incomplete = [
        name for name, part in parts.items() if name not in usable or not part.get("complete", True)
    ]
    if not usable:
        sys.exit(f"no results in {', '.join(parts)}")
    shared = _shared(usable)
    read = [entry for name, part in usable.items() for entry in _entries(name, part)]
    source: dict[tuple[str, str], str] = {}
    for entry in sorted(read, key=lambda entry: entry.part in incomplete):
        source.setdefault(entry.key, entry.part)
    kept = [entry for entry in read if source[entry.key] == entry.part]
    asked = [
        name
        for part in parts.values()
        for name in (*part.get("documents", ()), *part.get("without_results", ()))
    ]
    found = {entry.result.document for entry in kept}
    return {
        **shared,
        "complete": not incomplete,
        "incomplete_parts": incomplete,
        "reference_spread": _reference_spread(read, shared),
        "documents": list(dict.fromkeys(name for name in asked if name in found)),
        "without_results": list(dict.fromkeys(name for name in asked if name not in found)),
        "results": [entry.row for entry in kept],
        "intervals": _intervals(usable, kept),
    }


@dataclass(frozen=True)
class Entry:
    """A result: the part that it is of, as it was read, and as it stands there."""

    part: str
    result: FidelityResult
    row: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """Entries with the same key measured the same."""
        return label(self.result), self.result.document


def _shared(parts: Mapping[str, Part]) -> dict[str, Any]:
    """What all parts have in common."""
    (first, one), *others = parts.items()
    shared = {key: value for key, value in one.items() if key not in OWN}
    for name, part in others:
        for key in dict.fromkeys([*shared, *part]):
            if key not in OWN and part.get(key) != shared.get(key):
                sys.exit(f"{first} and {name} differ in {key!r}: {shared.get(key)!r} and {part.get(key)!r}")
    return shared


def _entries(name: str, part: Part) -> list[Entry]:
    try:
        results = parse_evaluation(part, name).results
    except UsageError as error:
        sys.exit(str(error))
    return [Entry(name, result, row) for result, row in zip(results, part["results"], strict=True)]


def _reference_spread(read: Sequence[Entry], shared: Part) -> float:
    """The largest difference of one document's dense perplexity between parts, as a share of it."""
    dtype = str(shared.get("environment", {}).get("dtype"))
    limit = ROUNDING.get(dtype, min(ROUNDING.values()))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in read:
        if math.isfinite(entry.result.perplexity_dense):
            found[entry.result.document][entry.part] = entry.result.perplexity_dense
    spread = 0.0
    for document, by_part in found.items():
        least, most = min(by_part, key=by_part.__getitem__), max(by_part, key=by_part.__getitem__)
        this = by_part[most] / by_part[least] - 1
        if this > limit:
            sys.exit(
                f"{least} and {most} have other dense references for {document!r}: perplexities of "
                f"{by_part[least]:.6g} and {by_part[most]:.6g}, {this:.1e} apart, and rounding in {dtype} explains "
                f"{limit:.0e}; evaluate the same text with the same models"
            )
        spread = max(spread, this)
    return spread


def _intervals(
    parts: Mapping[str, Part], kept: Sequence[Entry]
) -> dict[str, dict[str, Sequence[float] | None]]:
    """A method's intervals: its part's own, where one part has all of it, else over all its documents.

    A part that has one document knows its rounds, which are not in the report, so its interval cannot be made again.
    """
    known = {name: part.get("intervals") or {} for name, part in parts.items()}
    kinds = {kind for of_part in known.values() for ends in of_part.values() for kind in ends}
    kinds = kinds or {"kl" if any("kl" in entry.row for entry in kept) else "change"}
    whole: dict[str, dict[str, Sequence[float] | None]] = {}
    for method, ends in intervals([entry.result for entry in kept]).items():
        sources = {entry.part for entry in kept if entry.key[0] == method}
        own = known[sources.pop()].get(method) if len(sources) == 1 else None
        whole[method] = own or {kind: _finite(ends[kind]) for kind in sorted(kinds)}
    return whole


def _finite(ends: Sequence[float] | None) -> Sequence[float] | None:
    return ends if ends is not None and all(map(math.isfinite, ends)) else None


def read_part(path: Path) -> Part:
    """A report, alone in its file or in the last line of it; nothing of one that was killed before its end.

    Raises:
        OSError: if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return {}
    for candidate in (text, text[text.rfind("\n") + 1 :]):
        try:
            part = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(part, dict):
            return part
    return {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the whole, and on stderr what is missing in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="a file that has an evaluation's JSON")
    asked = parser.parse_args(arguments)
    try:
        parts = {path: read_part(Path(path)) for path in asked.reports}
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    whole = merge(parts)
    for name in whole["incomplete_parts"]:
        print(f"incomplete: {name}", file=sys.stderr)
    print(f"dense references differ by {whole['reference_spread']:.1e} at most", file=sys.stderr)
    json.dump(whole, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
