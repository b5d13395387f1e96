"""The scores of LongBench: an output against one right answer, from 0 to 1 (its ``metrics.py``)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from difflib import SequenceMatcher

from specattn.evaluation.tasks.rouge import rouge_l

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def f1(output: str, reference: str) -> float:
    """F1 of the words, without case, punctuation and articles (SQuAD's)."""
    return overlap(_english(output), _english(reference))


def f1_zh(output: str, reference: str) -> float:
    """F1 of Chinese words, as jieba cuts them."""
    return overlap(_chinese(_cut(output)), _chinese(_cut(reference)))


def f1_characters(output: str, reference: str) -> float:
    """F1 of characters, without punctuation and blanks."""
    return overlap("".join(_chinese([output])), "".join(_chinese([reference])))


def overlap(output: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F1 of two bags of tokens."""
    shared = (Counter(output) & Counter(reference)).total()
    return 2 * shared / (len(output) + len(reference)) if shared else 0.0


def rouge(output: str, reference: str) -> float:
    """ROUGE-L."""
    return rouge_l(output, reference)


def rouge_zh(output: str, reference: str) -> float:
    """ROUGE-L of Chinese words, as jieba cuts them."""
    return rouge_l(" ".join(_cut(output)), " ".join(_cut(reference)))


def classification(output: str, reference: str, classes: Collection[str]) -> float:
    """One over the classes that the output names, if the right one is among them.

    A class whose name is a part of the right one's does not count as named.
    """
    named = [name for name in classes if name in output and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(output: str, reference: str) -> float:
    """Share of the output's numbers that are the reference's first: ``Paragraph 7`` or ``段落7``."""
    found = re.search(r"\d+", reference)
    return count(output, found[0]) if found else 0.0


def count(output: str, reference: str) -> float:
    """Share of the output's numbers that are the reference."""
    numbers = re.findall(r"\d+", output)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def edit_similarity(output: str, reference: str) -> float:
    """Likeness, in per cent without decimals, of the output's first line of code (``fuzz.ratio``)."""
    lines = output.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def has_jieba() -> bool:
    """Whether Chinese can be cut into words."""
    from importlib.util import find_spec

    return find_spec("jieba") is not None


def _english(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _chinese(words: Iterable[str]) -> list[str]:
    """Words without punctuation and blanks; those of which nothing is left are dropped."""
    dropped = set(string.punctuation + CHINESE_PUNCTUATION)
    kept = ("".join(c for c in word.lower() if c not in dropped and not c.isspace()) for word in words)
    return [word for word in kept if word]


def _cut(text: str) -> list[str]:
    import jieba

    return list(jieba.cut(text, cut_all=False))
