"""Keys and values that no text holds by chance."""

from __future__ import annotations

import uuid
from random import Random

from specattn.errors import UsageError

_ADJECTIVES = """
able aged amber ample azure bare bitter blank bold brave brief bright brisk broad calm candid cheap chilly civil clean
clever cosy crisp curly daring deep dim dry dusty eager early elder empty even exact faint fancy fast fierce firm flat
fond frank fresh frosty gentle glad golden grand grave green happy hardy hasty hollow honest humble icy idle keen kind
large late lean level light little lively lofty loud lucky mellow merry mild modest narrow neat noble odd old pale plain
polite proud quick quiet rapid rare ready rich ripe robust rough round royal rustic sandy sharp shiny silent simple
"""
_NOUNS = """
acorn alley anchor apron arrow attic badge bakery barn basket beacon bell bench blanket boat bottle branch bridge brook
bucket button cabin candle canyon carpet castle cellar chair cliff clock cloud coast cradle creek crown desk diary door
drum engine falcon farm feather fence ferry fiddle field flute forest fountain garden gate glacier hammer harbor hill
hinge island jacket jar kettle kite ladder lagoon lantern lemon library lizard lock magnet maple market meadow mirror
needle oak orchard otter paddle parcel pebble pencil pepper piano pillow planet pocket pond quarry rabbit river saddle
"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()

KEYS = len(ADJECTIVES) * len(NOUNS)
"""So many keys there are."""


def keys(random: Random, count: int) -> list[str]:
    """So many keys, ``adjective-noun``, no two alike.

    Raises:
        UsageError: if there are not so many.
    """
    if count > KEYS:
        raise UsageError(f"the length asks for {count:,} keys and there are {KEYS:,}; use a shorter --length")
    return [
        f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
        for number in random.sample(range(KEYS), count)
    ]


def numbers(random: Random, count: int, *, digits: int = 7) -> list[str]:
    """So many numbers with ``digits`` digits, no two alike."""
    return [str(number) for number in random.sample(range(10 ** (digits - 1), 10**digits), count)]


def uuids(random: Random, count: int) -> list[str]:
    """So many random UUIDs."""
    return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]
