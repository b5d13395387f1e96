"""The scores of InfiniteBench: an output against the right answers (its ``compute_scores.py``)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from specattn.evaluation.tasks import scores
from specattn.evaluation.tasks.rouge import rouge_l_sum

Answers = Sequence[str]

QUOTES = "\n\"'.,?!{}"
CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")


def f1(output: str, answers: Answers) -> float:
    """F1 of English words with the nearest answer."""
    return max(scores.f1(output, answer) for answer in answers)


def f1_characters(output: str, answers: Answers) -> float:
    """F1 of Chinese characters with the nearest answer."""
    return max(scores.f1_characters(output, answer) for answer in answers)


def rouge_lsum(output: str, answers: Answers) -> float:
    """ROUGE-L over lines, with the nearest answer."""
    return max(rouge_l_sum(output, answer) for answer in answers)


def first_number(output: str, answers: Answers) -> bool:
    """Whether the first run of digits is the answer."""
    found = re.search(r"[0-9]+", output)
    return found is not None and found[0] == answers[0]


def word(output: str, answers: Answers) -> bool:
    """Whether the answer is one of the output's words."""
    return any(answer in _words(output, QUOTES + ":") for answer in answers)


def name(output: str, answers: Answers) -> bool:
    """Whether the first answer, a name in capitals, is one of the output's words."""
    return answers[0] in _words(output.upper(), QUOTES + ":")


def last_number(output: str, answers: Answers) -> bool:
    """Whether the last word is the number."""
    words = _words(output, "\n.`'\":")
    try:
        return bool(words) and int(words[-1]) == json.loads(answers[0])
    except ValueError:
        return False


def number(output: str, answers: Answers) -> bool:
    """Whether the first number is the answer; against a whole one, decimals are an error."""
    found = re.search(r"\d+\.\d+|\d+", output)
    wanted = json.loads(answers[0])
    if found is None or (isinstance(wanted, int) and "." in found[0]):
        return False
    return float(found[0]) == wanted


def numbers(output: str, answers: Answers) -> float:
    """Share of the intermediate values that are right before the first wrong one."""
    wanted = json.loads(answers[0])
    said = [int(digits) for digits in re.findall(r"[0-9]+", output)]
    right = 0
    for value, expected in zip(said, wanted, strict=False):
        if value != expected:
            break
        right += 1
    return right / len(wanted)


def choice(output: str, answers: Answers) -> bool:
    """Whether the first letter, what follows ``answer is`` and the like, or the first lone letter is the right one."""
    text = output.strip()
    if text[:1] in tuple("ABCD"):
        return text[0] in answers
    if text in answers:
        return True
    plain = " ".join(_words(text, QUOTES))
    after = _after(plain, CHOICE_PREFIXES)
    if after is not None:
        return after.startswith(tuple(answers))
    letters = [word for word in plain.split() if word in "ABCD"]
    return bool(letters) and letters[0] in answers


def debug(output: str, answers: Answers) -> bool:
    """Whether the output begins with the right letter and a mark, or says it or the function after ``answer:``."""
    text = output.strip()
    function, letter = answers[0], answers[1]
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    for mark in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(mark, " ")
    after = _after(re.sub(" +", " ", text), DEBUG_PREFIXES)
    return after is not None and after.startswith((letter, function))


def _after(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the prefixes that is there, and one character; ``None`` if none is."""
    for prefix in prefixes:
        place = text.find(prefix)
        if place >= 0:
            return text[place + len(prefix) + 1 :]
    return None


def _words(text: str, marks: str) -> list[str]:
    return text.translate({ord(mark): " " for mark in marks}).split()
