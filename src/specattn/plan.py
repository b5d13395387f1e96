"""What a round does: how many tokens the draft proposes, and whether the target reads all of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specattn.gamma import AUTO, GAMMAS
from specattn.selection.base import Method, Need
from specattn.selection.dense import Dense
from specattn.selection.eviction import Evicting


@dataclass(frozen=True)
class Plan:
    """One way to run a round.

    Attributes:
        gamma: draft tokens; with 0 the draft does not run.
        sparse: whether the target reads what the method selects, or everything.
    """

    gamma: int
    sparse: bool

    @property
    def mode(self) -> tuple[bool, bool]:
        """What plans have in common whose costs behave alike: whether the draft runs, and how the target reads."""
        return (self.gamma > 0, self.sparse)

    def __str__(self) -> str:
        reading = "sparse" if self.sparse else "dense"
        return f"{reading}, gamma {self.gamma}" if self.gamma else f"{reading}, no draft"


def candidates(
    method: Method, gamma: int | str, *, drafting: bool, fallback: bool, lossless: bool = False
) -> Sequence[Plan]:
    """The plans that an engine may choose from; the first is what was asked for.

    Dense rounds, and rounds without a draft, are there as a fallback, since both give what the target itself would.
    With ``gamma`` ``auto`` rounds without a draft are there anyway, if the method does without it. A method that
    remembers its rounds, such as one that evicts, has to run all of them. So does the lossless mode, whose cycles have
    dense passes of their own and keep the draft's cache up.

    Args:
        drafting: whether there is a draft.
        fallback: whether rounds may read everything though the method is sparse.
        lossless: whether dense passes verify the rounds.
    """
    sparse = not isinstance(method, Dense)
    remembers = lossless or isinstance(method, Evicting) or Need.SCORES in method.needs
    lengths = [0] if not drafting else GAMMAS if gamma == AUTO else [int(gamma)]
    plans = [Plan(length, sparse) for length in lengths]
    if gamma == AUTO and not (remembers or Need.DRAFT in method.needs):
        plans.append(Plan(0, sparse))
    if fallback and not remembers:
        plans += [Plan(length, False) for length in (*lengths, 0)]
    return list(dict.fromkeys(plans))


def draft_steps(method: Method, gamma: int) -> int:
    """Steps of the draft in a round of ``gamma`` proposals.

    One more where the method wants every row predicted; one where nothing is proposed, for the cache to keep up.
    """
    return gamma + (Need.EVERY_ROW in method.needs) if gamma else 1
