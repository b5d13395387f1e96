"""A task's samples as the models will read them: token ids, and what does not fit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.request import Request

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair


@dataclass(frozen=True)
class Question:
    """A sample and its token ids."""

    sample: Sample
    tokens: list[int]

    @property
    def request(self) -> Request:
        """What the engine is asked: the likeliest tokens."""
        return Request(self.tokens, self.sample.max_new_tokens, stop=tuple(self.sample.stop))

    @property
    def room(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens) + self.sample.max_new_tokens


@dataclass(frozen=True)
class Questions:
    """What a task asks of a pair, and what it leaves out."""

    asked: Sequence[Question]
    left_out: Sequence[LeftOut]

    @property
    def digest(self) -> str:
        """SHA-256 of all that is asked, so that a run goes on with the same questions only."""
        samples = [asdict(question.sample) for question in self.asked]
        return hashlib.sha256(json.dumps(samples, sort_keys=True, default=str).encode()).hexdigest()


def questions(
    pair: Pair | FoundPair, task: Task, *, chat: bool = False, limit: int | None = None
) -> Questions:
    """All questions of a task.

    Args:
        chat: put prompts that are texts into the tokenizer's chat template, as a user's message.
        limit: take the first samples of each group only.

    Raises:
        UsageError: if nothing can be asked, two samples have one id, or there is no chat template for a chat.
    """
    asked: list[Question] = []
    left_out: list[LeftOut] = []
    taken: Counter[str] = Counter()
    for item in task.samples(pair):
        taken[item.group] += 1
        if limit is not None and taken[item.group] > limit:
            continue
        if isinstance(item, LeftOut):
            left_out.append(item)
            continue
        question = Question(item, encode(pair, item, chat=chat))
        if question.room > pair.context_limit:
            reason = f"longer than the context of {pair.context_limit:,} tokens"
            left_out.append(LeftOut(item.id, reason, item.group))
        else:
            asked.append(question)
    _check(task, asked, left_out)
    return Questions(asked, left_out)


def encode(pair: Pair | FoundPair, sample: Sample, *, chat: bool) -> list[int]:
    """Token ids of a prompt, with the beginning of its answer.

    Raises:
        UsageError: if the tokenizer has no chat template and the prompt needs one.
    """
    tokenizer: Any = pair.tokenizer
    prompt = sample.prompt
    if isinstance(prompt, str) and not chat:
        return list(tokenizer(prompt + sample.answer_prefix)["input_ids"])
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer of {pair.name} has no chat template; leave --chat out or use an instruct model"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text + sample.answer_prefix, add_special_tokens=False)["input_ids"])


def _check(task: Task, asked: Sequence[Question], left_out: Sequence[LeftOut]) -> None:
    if not asked:
        reasons = "; ".join(sorted({item.reason for item in left_out})) or "it has no samples"
        raise UsageError(f"{task.name} has nothing to ask: {reasons}")
    twice = [id for id, count in Counter(question.sample.id for question in asked).items() if count > 1]
    if twice:
        raise UsageError(f"two samples of {task.name} are called {twice[0]!r}; give each a name of its own")
