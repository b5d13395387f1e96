"""``specattn eval``: what a method costs in quality, on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.models import Models, load_mapping
from specattn.cli.options import (
    OUTPUT,
    Debug,
    Device,
    Draft,
    Dtype,
    FixedGamma,
    Json,
    MappingFile,
    MethodList,
    PairName,
    Prefill,
    Target,
    Texts,
    Yarn,
    parse_methods,
)
from specattn.cli.output import check_plot, console, print_json
from specattn.cli.progress import Bars
from specattn.cli.tables import FIDELITY, PERPLEXITY, View, results_table
from specattn.errors import UsageError

if TYPE_CHECKING:
    from specattn.evaluation.documents import Document
    from specattn.evaluation.fidelity import FidelityResult
    from specattn.mapping.artifact import Mapping
    from specattn.pairs import FoundPair, Pair
    from specattn.prefill.base import PrefillMethod
    from specattn.selection.base import Method

BatchSize = Annotated[
    int,
    typer.Option(
        "--batch", metavar="N", min=1, help="Texts that are decoded at once; less needs less memory."
    ),
]
Context = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each text.")]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw KL against the KV bytes read.", rich_help_panel=OUTPUT),
]
ByLayer = Annotated[
    bool,
    typer.Option(
        "--breakdown",
        help="Add attention mass and density by layer and KV head to --json.",
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="A row for each document.", rich_help_panel=OUTPUT)]


def fidelity(
    text: Texts,
    context: Context = 4096,
    rows: Annotated[
        int, typer.Option(metavar="R", min=1, help="The last tokens, which are decoded with the method.")
    ] = 255,
    gamma: FixedGamma = 4,
    batch: BatchSize = 8,
    methods: MethodList = "specattn",
    prefill: Prefill = "dense",
    mapping: MappingFile = None,
    plot: Plot = None,
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    device: Device = None,
    dtype: Dtype = None,
    yarn: Yarn = None,
    verbose: Verbose = False,
    breakdown: ByLayer = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """How far the next-token distributions stray from dense attention's: KL, total variation, agreement."""
    protocol = Protocol(text, context, rows, gamma, batch)
    models = Models(pair, target, draft, device, dtype, yarn)
    _run(
        FIDELITY,
        protocol,
        methods,
        prefill,
        mapping,
        models,
        plot=plot,
        verbose=verbose,
        breakdown=breakdown,
        json=json,
    )


class PerplexityProtocol(Enum):
    """Proportions of a text: what is read densely, and what is decoded with the method."""

    PAPER = "paper"
    """The SpecAttn paper's: the first tenth of a short text is read densely."""
    LONG = "long"
    """The next tokens after a long context, as in decoding an answer."""

    @property
    def context(self) -> int:
        """Tokens of a text, unless told otherwise."""
        return 2048 if self is PerplexityProtocol.PAPER else 16384

    def rows(self, context: int) -> int:
        """The tokens of ``context`` that are decoded with the method."""
        return context * 9 // 10 if self is PerplexityProtocol.PAPER else 1020


def perplexity(
    text: Texts,
    protocol: Annotated[
        PerplexityProtocol,
        typer.Option(
            help="paper: a tenth of 2048 tokens is read densely; long: all but the last 1020 of 16384."
        ),
    ] = PerplexityProtocol.PAPER,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Tokens of each text.", show_default="by protocol"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            min=1,
            help="The last tokens, which are decoded with the method.",
            show_default="by protocol: 90 % of the context, or 1020",
        ),
    ] = None,
    gamma: FixedGamma = 4,
    batch: BatchSize = 8,
    methods: MethodList = "specattn",
    prefill: Prefill = "dense",
    mapping: MappingFile = None,
    plot: Plot = None,
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    device: Device = None,
    dtype: Dtype = None,
    yarn: Yarn = None,
    verbose: Verbose = False,
    breakdown: ByLayer = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity in the protocol of the SpecAttn paper, or at the end of a long context."""
    size = protocol.context if context is None else context
    decoded = protocol.rows(size) if rows is None else rows
    models = Models(pair, target, draft, device, dtype, yarn)
    _run(
        PERPLEXITY,
        Protocol(text, size, decoded, gamma, batch),
        methods,
        prefill,
        mapping,
        models,
        plot=plot,
        verbose=verbose,
        breakdown=breakdown,
        json=json,
    )


@dataclass(frozen=True)
class Protocol:
    """What is decoded: the last ``rows`` of ``context`` tokens of each text, in rounds of ``gamma + 1``.

    ``batch`` texts are decoded at once.
    """

    texts: Sequence[Path]
    context: int
    rows: int
    gamma: int
    batch: int

    def check(self) -> None:
        """Refuse what can be refused without a model.

        Raises:
            UsageError: if a text cannot be read, two have one name, or the rows fill the context.
        """
        from specattn.evaluation.documents import read_text

        for path in self.texts:
            read_text(path)
        names = [path.stem for path in self.texts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(
                f"two texts are called {twice[0]!r}; rename one, results are told apart by the name"
            )
        if self.rows >= self.context:
            raise UsageError(
                f"--rows {self.rows} must be below --context {self.context}; what is left is read densely"
            )

    def documents(self, pair: FoundPair) -> list[Document]:
        """The texts' tokens.

        Raises:
            UsageError: if the models cannot serve the protocol, or a text is too short for it.
        """
        from specattn.evaluation.documents import load_documents
        from specattn.evaluation.fidelity import check_protocol

        check_protocol(pair, self.context, self.rows, self.gamma)
        return load_documents(self.texts, pair.tokenizer, self.context + 1)

    def total(self, what: str) -> int:
        """Tokens that a stage of the evaluation will report."""
        return self.context - self.rows if what.endswith("prefill") else self.rows


def _run(
    view: View,
    protocol: Protocol,
    methods: str,
    prefill: str,
    mapping: Path | None,
    models: Models,
    *,
    plot: Path | None,
    verbose: bool,
    breakdown: bool,
    json: bool,
) -> None:
    """Evaluate and report; an interruption or an error on the way keeps the results that there are."""
    from specattn.evaluation.summary import plot_frontier
    from specattn.mapping.resolve import resolve_mapping
    from specattn.prefill.registry import parse_prefill

    chosen, reading = parse_methods(methods), parse_prefill(prefill)
    protocol.check()
    check_plot(plot)
    calibrated = load_mapping(mapping)
    found = models.find()
    documents = protocol.documents(found)
    for method in chosen:
        resolve_mapping(found, method, calibrated)
    reading.check(found.target.config)
    pair, _ = models.load(found)
    results: list[FidelityResult] = []
    failure: BaseException | None = None
    try:
        _evaluate(pair, protocol, documents, chosen, calibrated, reading, results)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, UsageError) and not results:
            raise  # refused before any work
        failure = error
    if results:
        console().print(results_table(results, view, by_document=verbose or len(protocol.texts) > 1))
    if json:
        print_json(_report(pair, protocol, results, view, breakdown=breakdown, complete=failure is None))
    if results and plot is not None:
        plot_frontier(results, plot)
    if failure is not None:
        raise failure


def _evaluate(
    pair: Pair,
    protocol: Protocol,
    documents: Sequence[Document],
    methods: Sequence[Method],
    mapping: Mapping | None,
    prefill: PrefillMethod,
    results: list[FidelityResult],
) -> None:
    """Append a result to ``results`` as soon as it is there."""
    from specattn.evaluation.fidelity import evaluate

    with Bars(protocol.total) as bars:
        for result in evaluate(
            pair,
            documents,
            methods,
            context=protocol.context,
            rows=protocol.rows,
            gamma=protocol.gamma,
            batch=protocol.batch,
            mapping=mapping,
            prefill=prefill,
            progress=bars,
        ):
            results.append(result)


def _report(
    pair: Pair,
    protocol: Protocol,
    results: Sequence[FidelityResult],
    view: View,
    *,
    breakdown: bool,
    complete: bool,
) -> dict[str, Any]:
    """The JSON document."""
    from specattn.environment import environment
    from specattn.evaluation.summary import intervals

    asked, found = [path.stem for path in protocol.texts], {result.document for result in results}
    return {
        "pair": pair.name,
        "context": protocol.context,
        "rows": protocol.rows,
        "gamma": protocol.gamma,
        "documents": [name for name in asked if name in found],
        "results": [_row(result, view, breakdown) for result in results],
        "intervals": {
            name: {view.interval: ends[view.interval]} for name, ends in intervals(results).items()
        },
        "complete": complete,
        "without_results": [name for name in asked if name not in found],
        "environment": environment(pair.device, pair.dtype),
    }


def _row(result: FidelityResult, view: View, breakdown: bool) -> dict[str, Any]:
    row = {name: getattr(result, name) for name in view.fields}
    if breakdown and result.detail is not None:
        row["breakdown"] = asdict(result.detail.breakdown)
    return row
