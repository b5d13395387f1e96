"""What a benchmark reports: checks, which come first, and timings that count only if all of them passed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """A correctness check: passed if ``error`` is within ``bound``. NaN is not."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass
class Report:
    """Collects the checks, rows and ratios of a run.

    Attributes:
        benchmark: what runs now; part of each row, if any.
    """

    benchmark: str = ""
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)

    def check(self, name: str, error: float, bound: float) -> None:
        """The correctness gate: one failed check, and no timing of the run is reported."""
        self.checks.append(Check(name, float(error), float(bound)))

    def row(self, **fields: Any) -> None:
        """A timing with what it is of."""
        self.rows.append(({"benchmark": self.benchmark} if self.benchmark else {}) | fields)

    def ratio(self, key: str, value: float) -> None:
        """A figure that sums up a comparison."""
        self.ratios[key] = value

    @property
    def gate(self) -> str:
        """``passed`` if checks ran and all passed, ``not run`` if there were none, otherwise ``failed``."""
        if not self.checks:
            return "not run"
        return "failed" if self.failures else "passed"

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def document(self, command: str) -> dict[str, Any]:
        """The JSON document of the run; without rows and ratios unless the gate is ``passed``."""
        import torch

        from specattn.environment import environment

        passed = self.gate == "passed"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "command": command,
            "environment": environment(device),
            "gate": self.gate,
            "rows": self.rows if passed else [],
            "ratios": self.ratios if passed else {},
        }
