"""RULER's question answering: the paragraphs that hold the answer among others of the same data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.tasks.data import read_json
from specattn.evaluation.tasks.ruler.parts import Puzzle, fitted

TEMPLATE = """\
Answer the question from the documents below. Give the answer alone, without any other words.

{text}

Question: {question}
"""
PREFIX = "Answer:"


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the numbers of the documents that hold them."""

    text: str
    answers: Sequence[str]
    documents: Sequence[int]


@dataclass(frozen=True)
class QuestionSet:
    """All documents of a data set and the questions on them.

    Attributes:
        name: ``qa_1`` for SQuAD (Rajpurkar et al. 2018), ``qa_2`` for HotpotQA (Yang et al. 2018).
    """

    name: str
    documents: Sequence[str]
    questions: Sequence[Question]

    def __call__(self, random: Random, tokenizer: Any, limit: int) -> Puzzle:
        question = random.choice(self.questions)
        held = [self.documents[number] for number in question.documents]
        others = [text for number, text in enumerate(self.documents) if number not in question.documents]
        random.shuffle(others)
        seed = random.getrandbits(64)

        def render(count: int) -> str:
            documents = held + others[: count - 1]
            Random(seed).shuffle(documents)
            text = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
            return TEMPLATE.format(text=text, question=question.text)

        return fitted(render, PREFIX, question.answers, tokenizer, limit, most=len(others) + 1)


def read_questions(path: str) -> QuestionSet:
    """A JSON file of SQuAD or of HotpotQA, told apart by their shapes.

    Raises:
        UsageError: if the file cannot be read or has neither shape.
    """
    content = read_json(path)
    try:
        found = _squad(content["data"]) if isinstance(content, Mapping) else _hotpot(content)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UsageError(
            f"--qa {path} has neither the shape of SQuAD nor of HotpotQA ({type(error).__name__}: {error}); "
            "give train or dev files as they are published"
        ) from None
    if not found.questions:
        raise UsageError(f"--qa {path} holds no question that can be answered; check the file")
    return found


def _squad(articles: Sequence[Mapping[str, Any]]) -> QuestionSet:
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    questions = [
        Question(qa["question"], list(dict.fromkeys(answer["text"] for answer in qa["answers"])), [number])
        for number, paragraph in enumerate(paragraphs)
        for qa in paragraph["qas"]
        if qa["answers"] and not qa.get("is_impossible")
    ]
    return QuestionSet("qa_1", [paragraph["context"] for paragraph in paragraphs], questions)


def _hotpot(rows: Sequence[Mapping[str, Any]]) -> QuestionSet:
    numbers: dict[str, int] = {}
    questions = []
    for row in rows:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        held = [numbers.setdefault(text, len(numbers)) for text in texts.values()]
        questions.append(Question(row["question"], [row["answer"]], held))
    return QuestionSet("qa_2", list(numbers), questions)
