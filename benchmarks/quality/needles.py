"""The form of a needle: a function with a unique name that returns a word, and stands once more farther down.

`retrieval.py` asks a model for the word where the function stands again, `train.py` mixes rows that are full of such
functions into its steps. A model of this size and of a few minutes does not find a needle otherwise: source text rarely
asks for something a thousand tokens back.

What is tested is not trained on: a name has a number, and every seventh number belongs to the test, as do its words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WORDS = [
    "anchor",
    "basket",
    "candle",
    "dragon",
    "engine",
    "falcon",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
]
BORDER = "\n\n\n"
TESTED_EVERY = 7
PIECE = re.compile("[a-z]{3,}")  # of a tokenizer's vocabulary, a part of a word
SMALLEST = 8  # tokens that a function has at least
# Of a row with needles: the share of it that they take, and how often each stands there. Few far apart are the test,
# many at all distances are what it is learned from.
FILLED = (0.02, 0.9)
STANDS = (2, 5)

Encode = Callable[[str], list[int]]


def numbers(*, tested: bool) -> list[int]:
    """Return the numbers of names that the test asks for, or those that it leaves to training."""
    return [number for number in range(1000, 10000) if (number % TESTED_EVERY == 0) is tested]


def question(number: int) -> str:
    """Return a function up to its word."""
    return f'def name_{number}():\n    return "'


def answer(word: str) -> str:
    """Return what stands behind a question."""
    return f'{word}"'


@dataclass(frozen=True)
class Planter:
    """Puts functions to train on into rows of ids."""

    questions: list[list[int]]
    answers: list[list[int]]
    border: list[int]

    @classmethod
    def of(cls, encode: Encode, vocabulary: Iterable[str]) -> Planter:
        """Encode everything once; words are pieces of the vocabulary, and as many pairs of pieces."""
        pieces, rng = sorted(filter(PIECE.fullmatch, vocabulary)), random.Random(0)
        words = [*pieces, *(rng.choice(pieces) + rng.choice(pieces) for _ in pieces)]
        return cls(
            [encode(question(number)) for number in numbers(tested=False)],
            [encode(answer(word)) for word in words if word not in WORDS],
            encode(BORDER),
        )

    def plant(self, hay: list[int], rng: random.Random) -> list[int]:
        """Return as many ids as the hay has: functions at random places, each several times, and hay between."""
        wanted, stands, functions, length = rng.uniform(*FILLED) * len(hay), rng.randint(*STANDS), list[list[int]](), 0
        for asked in rng.sample(self.questions, len(hay) // SMALLEST):
            functions += stands * [[*self.border, *asked, *rng.choice(self.answers), *self.border]]
            length += stands * len(functions[-1])
            if length >= wanted:
                break
        rng.shuffle(functions)
        room = max(0, len(hay) - length)
        places = sorted(rng.randint(0, room) for _ in functions)
        planted = list[int]()
        for start, stop, function in zip([0, *places], places, functions, strict=False):
            planted += [*hay[start:stop], *function]
        return [*planted, *hay[places[-1] : room]][: len(hay)]
