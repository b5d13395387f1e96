"""Where a text repeats itself: the tokens behind earlier occurrences of what a row is fed.

Heads that copy look for what came before like what they are fed, and attend to the token behind it (induction heads;
Olsson et al. 2022). Which token that is does not depend on any score. So it can be known of rows that no draft step has
seen, such as the last of a round, and of tokens that a sparse draft's lists do not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 8
"""Tokens that are compared: an occurrence of more of them is not a better one."""

NOWHERE = -1
"""In the place of an echo that there is not."""


def echoes_reference(text: Tensor, slots: Tensor, starts: Tensor, rows: int, matches: int) -> Tensor:
    """The positions behind the best earlier occurrences of what each of a round's rows is fed.

    A row at position ``q`` is fed ``text[q]``. Of the positions before with the same token those are best that agree
    with it in most of the tokens before, up to :data:`LONGEST` in all, and of these the most recent.

    Args:
        text: int32 ``[slots, length]``, the tokens of all slots.
        slots: integer ``[batch]``, those of the round.
        starts: integer ``[batch]``, the positions of the first rows.
        rows: of the round; their tokens are in ``text``.
        matches: occurrences a row.

    Returns:
        int32 ``[batch, rows * matches]``: one more than the occurrences' positions, so none behind the row itself;
        :data:`NOWHERE` where a row has fewer.
    """
    tokens = text[slots]
    position = torch.arange(tokens.shape[1], device=tokens.device)
    own = starts.long()[:, None] + torch.arange(rows, device=tokens.device)
    agree = torch.ones(*own.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)
    agree &= position < own[..., None]
    number = torch.zeros_like(agree, dtype=torch.int64)
    for back in range(LONGEST):
        fed = tokens.gather(1, (own - back).clamp(min=0))
        before = tokens.roll(back, 1)[:, None]
        agree = agree & (before == fed[..., None]) & (position >= back)
        number += agree
    rank = torch.where(number > 0, number * tokens.shape[1] + position, -1)
    best = rank.topk(min(matches, rank.shape[-1])).values
    found = torch.where(best < 0, NOWHERE, best % tokens.shape[1] + 1)
    missing = matches - found.shape[-1]
    return torch.nn.functional.pad(found, (0, missing), value=NOWHERE).flatten(1).int()


def following(echoes: Tensor, count: int) -> Tensor:
    """The ``count`` positions from each of ``echoes`` ``[batch, n]`` on: int32 ``[batch, n * count]``."""
    stretches = echoes[..., None] + torch.arange(count, dtype=torch.int32, device=echoes.device)
    return torch.where(echoes[..., None] < 0, NOWHERE, stretches).flatten(1)


def echo_mask(echoes: Tensor, length: int) -> Tensor:
    """Bool ``[batch, length]``: the positions among ``echoes`` ``[batch, n]``."""
    mask = torch.zeros(len(echoes), length + 1, dtype=torch.bool, device=echoes.device)
    places = torch.where((echoes < 0) | (echoes >= length), length, echoes).long()
    return mask.scatter_(1, places, True)[:, :length]
