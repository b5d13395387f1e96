"""Join the JSON of evaluations that differ in texts or methods only: ``merge_results.py A.json B.json > ALL.json``.

Documents and methods are independent, so that they can be evaluated by processes side by side.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def merge(parts: list[dict]) -> dict:
    """One report with all documents and results.

    Raises:
        SystemExit: if the parts differ in more than that.
    """
    first, *rest = parts
    own = ("documents", "results", "intervals")  # an interval is one of all documents
    shared = {key: value for key, value in first.items() if key not in own}
    for part in rest:
        for key, value in shared.items():
            if part.get(key) != value:
                sys.exit(f"the reports differ in {key!r}: {value!r} and {part.get(key)!r}")
    return {
        **{key: value for key, value in first.items() if key not in own},
        "documents": list(dict.fromkeys(name for part in parts for name in part["documents"])),
        "results": [result for part in parts for result in part["results"]],
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    json.dump(merge([json.loads(Path(path).read_text()) for path in sys.argv[1:]]), sys.stdout, indent=1)
