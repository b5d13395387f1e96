"""The statistics of a generation, as a panel for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.panel import Panel
    from rich.table import Table

BAR = 32
"""Columns of the longest bar."""


def panel(report: dict[str, Any]) -> Panel:
    """The panel of a report, the JSON document of ``specattn generate``."""
    from rich.console import Group
    from rich.panel import Panel

    parts: list[Table | str] = [_figures(report)]
    if report["accepted_per_round"] and report["gamma"]:
        parts += ["", "draft tokens accepted in a round", _histogram(report)]
    return Panel(Group(*parts), title="statistics", title_align="left", expand=False)


def histogram(accepted: Sequence[int], gamma: int) -> list[tuple[int, int, str]]:
    """For each accepted length from 0 to ``gamma``: the rounds that had it, and a bar."""
    counts = Counter(accepted)
    most = max(counts.values(), default=1)
    return [(length, counts[length], "█" * round(BAR * counts[length] / most)) for length in range(gamma + 1)]


def _histogram(report: dict[str, Any]) -> Table:
    from rich.table import Table

    accepted = report["accepted_per_round"]
    # gamma may be "auto"; what was accepted bounds it from below.
    gamma = max([*accepted, *(g for g in (report["gamma"],) if isinstance(g, int))])
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="bold")
    table.add_column(style="cyan")
    table.add_column()
    for length, rounds, bar in histogram(accepted, gamma):
        share = rounds / len(accepted)
        table.add_row(str(length), bar, f"{rounds} ({share:.0%})" if rounds else "")
    return table


def _lossless(figures: dict[str, Any]) -> str:
    return (
        f"{figures['dense_passes']:,} dense passes accepted {figures['acceptance_rate']:.1%} of what sparse rounds had;"
        f" {figures['dense_reads_per_token']:.3f} dense passes and {figures['kv_reads_per_token']:.2f} full KV reads"
        " a token"
    )


def _path(path: dict[str, Any]) -> str:
    return path["name"] if path["reason"] is None else f"{path['name']}: {path['reason']}"


def _figures(report: dict[str, Any]) -> Table:
    from rich.table import Table

    from specattn.memory import human_bytes
    from specattn.selection.registry import short_name

    rounds, seconds, memory = report["rounds"], report["seconds"], report["memory"]
    where = report["environment"]
    decoded = max(0, len(report["tokens"]) - 1)
    prefill = f"{report['prefill']}, {report['prefill_computed']:.1%} of the target's query-key products"
    rows = {
        "pair": f"{report['pair']}, {where['dtype']} on {where.get('gpu') or where['device']}",
        "method": short_name(report["method"], report["options"]),
        "path": _path(report["path"]),
        **({"choice": report["plans"]["reason"]} if report["plans"]["reason"] else {}),
        **({"prefill": prefill} if report["prefill"] != "dense" else {}),
        "tokens": f"{report['prompt_tokens']:,} read, {len(report['tokens']):,} generated"
        f" ({report['finish_reason']})",
        "speed": f"{report['tokens_per_second']:.1f} tokens/s; load {seconds['load']:.1f} s,"
        f" prefill {seconds['prefill']:.1f} s, decode {seconds['decode']:.1f} s",
        "KV read": f"target {report['kv_read_fraction']:.1%}, draft {report['draft_read_fraction']:.1%}"
        " of the target's full reads",
        "rounds": f"{rounds:,} of {decoded / rounds if rounds else 0:.2f} tokens"
        + (f", {report['acceptance_rate']:.1%} of the draft's accepted" if report["gamma"] else ""),
        **({"lossless": _lossless(report["lossless"])} if report["lossless"] else {}),
        **({"audit": _audit(report["audit"])} if report["audit"] else {}),
        "memory": f"{human_bytes(memory['kv_cache_bytes'])} of KV cache,"
        f" peak {human_bytes(memory['peak_bytes'])}",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _audit(found: dict[str, Any]) -> str:
    """What an audit has found, in a line."""
    if not found["queries"]:
        return "no sparse attention was drawn"
    text = (
        f"{found['units']:,} heads: {found['attention_mass']:.1%} of the attention kept"
        f" (least {found['least_mass']:.1%}), output off by {found['output_error']:.2%}"
        f" (most {found['largest_error']:.1%}); read {found['read_fraction']:.1%} more"
    )
    if found["promised_error"] is None:
        return text
    return f"{text}; {found['violations']:.2%} beyond the promised {found['promised_error']:g}"
