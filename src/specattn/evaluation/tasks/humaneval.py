"""HumanEval (Chen et al. 2021): functions from their descriptions, checked by running their tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specattn.evaluation.tasks.base import Sample, Task
from specattn.evaluation.tasks.data import load_rows
from specattn.evaluation.tasks.options import DataFile
from specattn.evaluation.tasks.sandbox import Limits, run_python
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")
"""What follows a function's body; section 3 of the paper has the list."""

REQUEST = """\
Complete this Python function. Answer with the whole function, its imports included, in one block of code.

```python
{prompt}
```"""
ANSWER, ANSWER_STOP = "```python\n", ("\n```",)


@dataclass(frozen=True)
class HumanEval(Task):
    """Greedy pass@1: the share of functions whose tests pass.

    Attributes:
        data: the published JSON lines, or a hub id (``openai/openai_humaneval``).
        max_new_tokens: tokens of an answer at most.
        instruct: ask for the function in a chat, in place of going on with its text.
        seconds: that a program and its tests may take.
    """

    name = "humaneval"
    metric = "pass@1"

    data: DataFile = DataFile()
    max_new_tokens: int = 512
    instruct: bool = False
    seconds: int = 10

    def __post_init__(self) -> None:
        check_at_least(self.name, "max_new_tokens", self.max_new_tokens, 1)
        check_at_least(self.name, "seconds", self.seconds, 1)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample]:
        for row in load_rows(self.data, "task_id", "prompt", "entry_point", "test"):
            prompt = row["prompt"]
            asked = {"prompt": prompt, "stop": STOP}
            if self.instruct:
                message = {"role": "user", "content": REQUEST.format(prompt=prompt.rstrip())}
                asked = {"prompt": [message], "answer_prefix": ANSWER, "stop": ANSWER_STOP}
            yield Sample(
                id=row["task_id"],
                references=[],
                max_new_tokens=self.max_new_tokens,
                metadata={"declaration": prompt, "entry_point": row["entry_point"], "test": row["test"]},
                **asked,
            )

    def score(self, sample: Sample, output: str) -> float:
        verdict = run_python(self.program(sample, output), Limits(seconds=self.seconds))
        return float(verdict.passed)

    def program(self, sample: Sample, output: str) -> str:
        """The function and the call of its tests."""
        declaration, entry_point = str(sample.metadata["declaration"]), str(sample.metadata["entry_point"])
        # A whole function needs only what stands before its declaration: imports and helpers.
        before = declaration.split(f"def {entry_point}(")[0] if self.instruct else declaration
        return f"{before}{output}\n\n{sample.metadata['test']}\n\ncheck({entry_point})\n"
