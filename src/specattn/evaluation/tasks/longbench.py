"""LongBench (Bai et al. 2023): 21 data sets of question answering, summaries, few-shot learning, retrieval and code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from specattn.evaluation.tasks import scores
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.options import DataFile, Names
from specattn.evaluation.tasks.published import Hub, check_names, cut_middle, prompts, read_rows, room
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

HUB = Hub("THUDM/LongBench", archive="data.zip")
PLAIN = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Asked without a chat template: few-shot examples and code are continued."""

FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
"""Only the first line of the output is scored."""


@dataclass(frozen=True)
class LongBench(Task):
    """The published prompts, lengths and scores; a data set is a group, and the score is the mean of their means.

    Attributes:
        data: the folder of the ``.jsonl`` files, ``data.zip`` or one of the files; from the hub if empty.
        datasets: which of the 21; all if empty.
        chat: put prompts into the tokenizer's chat template where LongBench does; few-shot examples and code stay
            plain.
        longest: tokens of a prompt at most; by default as many as the context has room for. What is longer loses its
            middle.
    """

    name: ClassVar[str] = "longbench"
    metric: ClassVar[str] = "score"

    data: DataFile = DataFile()
    datasets: Names = Names()
    chat: bool = False
    longest: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, "longest", self.longest, 0)
        check_names(self.name, self.datasets, list(_published()))

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        """All rows of the data sets; see :meth:`Task.samples`."""
        files = {name: self._rows(name) for name in check_names(self.name, self.datasets, list(_published()))}
        for name, rows in files.items():
            for number, row in enumerate(rows):
                yield self._sample(pair, name, f"{name}-{number}", row)

    def score(self, sample: Sample, output: str) -> float:
        """The data set's score against the right answer that is nearest."""
        if sample.group in FIRST_LINE:
            output = output.lstrip("\n").split("\n")[0]
        metric = _published()[sample.group]["metric"]
        if metric == "classification":
            classes = sample.metadata["classes"]
            assert isinstance(classes, list)
            return max(scores.classification(output, answer, classes) for answer in sample.references)
        return max(getattr(scores, metric)(output, answer) for answer in sample.references)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        fields = ["context", "input", "answers"]
        if _published()[name]["metric"] == "classification":
            fields.append("all_classes")
        return read_rows(self.data, f"{name}.jsonl", HUB, fields)

    def _sample(self, pair: Pair | FoundPair, name: str, id: str, row: dict[str, Any]) -> Sample | LeftOut:
        published = _published()[name]
        if published["metric"].endswith("_zh") and not scores.has_jieba():
            return LeftOut(id, "scoring Chinese needs jieba: pip install jieba", name)
        if not row["answers"]:
            return LeftOut(id, "it has no answer", name)
        tokens = published["max_new_tokens"]
        free = room(pair, tokens, self.longest)
        if free < 2:
            return LeftOut(id, f"the context has no room beside an answer of {tokens:,} tokens", name)
        whole = published["prompt"].format(context=row["context"], input=row["input"])
        text, dropped = cut_middle(pair.tokenizer, whole, free)
        templated = self.chat and name not in PLAIN
        classes = row["all_classes"] if published["metric"] == "classification" else None
        return Sample(
            id=id,
            prompt=[{"role": "user", "content": text}] if templated else text,
            references=row["answers"],
            max_new_tokens=tokens,
            group=name,
            metadata={"dropped": dropped, **({"classes": classes} if classes else {})},
        )


def _published() -> dict[str, Any]:
    return dict(prompts("longbench")["datasets"])
