"""From runs to the content of a report."""

from __future__ import annotations

from specattn.report.content import Report
from specattn.report.evaluations import join
from specattn.report.runs import Runs
from specattn.report.sections import fidelity, generations, mappings, perplexity, speed, tasks


def build(runs: Runs, title: str = "specattn report") -> Report:
    """The report: key figures, then quality, tasks, speed and mappings."""
    evaluations = join(runs.evaluations)
    return Report(
        title,
        keys=[
            *fidelity.keys(evaluations),
            *perplexity.keys(evaluations),
            *tasks.keys(runs.tasks),
            *generations.keys(runs.generations),
            *speed.keys(runs.benchmarks),
        ],
        sections=[
            *fidelity.sections(evaluations),
            *perplexity.sections(evaluations),
            *tasks.sections(runs.tasks),
            *generations.sections(runs.generations),
            *speed.sections(runs.benchmarks),
            *mappings.sections(runs.mappings),
        ],
        sources=runs.sources,
    )
