"""The telling of one story: who is in it, where it plays, and the sentences so far.

Plots (plots_*.py) decide what happens; this module keeps names, pronouns and places straight and varies the wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

import words
from words import Kind, Setting, Thing

T = TypeVar("T")

SAID = {
    "plain": ("said", "said", "said", "answered"),
    "ask": ("asked",),
    "cry": ("cried", "called", "shouted"),
    "sad": ("sighed", "whispered", "said sadly", "said in a small voice", "sobbed"),
    "glad": ("laughed", "said happily", "said with a smile", "cheered"),
    "kind": ("said gently", "said kindly", "said softly", "said with a warm smile"),
    "shy": ("whispered", "said shyly", "said very quietly", "mumbled"),
    "proud": ("boasted", "bragged", "said proudly", "laughed"),
    "wise": ("said wisely", "said slowly", "said", "explained"),
    "brave": ("said bravely", "said firmly", "said"),
}
BEATS = {
    "plain": ("nodded", "looked up", "thought for a moment", "stopped"),
    "ask": ("tilted {his} head", "looked up", "was puzzled", "came closer"),
    "cry": ("jumped up", "waved", "opened {his} eyes wide"),
    "sad": ("hung {his} head", "wiped away a tear", "looked at the ground", "sniffed"),
    "glad": ("smiled", "laughed", "clapped", "beamed"),
    "kind": ("smiled", "came closer", "sat down beside {him}"),
    "shy": ("blushed", "looked at the ground", "hid {his} face"),
    "proud": ("held {his} head high", "laughed", "puffed out {his} chest"),
    "wise": ("nodded slowly", "thought for a while", "smiled"),
    "brave": ("took a deep breath", "stood up tall", "nodded"),
}
WITH_COMMA = {"said", "answered", "asked", "whispered", "cried", "called", "shouted", "sighed"}


def a(phrase: str) -> str:
    """Put the right indefinite article before a phrase."""
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "one")) else "a ") + phrase


def plural(noun: str) -> str:
    """Return the plural of one of the nouns of this world."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("ch", "sh", "s", "x")) else "s")


def count(number: int, noun: str) -> str:
    """Say a number of things in words: 'one plum', 'three plums'."""
    return f"{words.NUMBERS[number]} {noun if number == 1 else plural(noun)}"


class Who:
    """A character: a name, a kind and the pronouns that go with them."""

    __slots__ = ("He", "Him", "His", "child", "he", "him", "himself", "his", "kind", "name", "noun", "shown")

    def __init__(self, name: str, kind: Kind, *, female: bool, child: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.noun = kind.noun
        self.child = child
        self.shown = False
        if female:
            self.he, self.him, self.his, self.himself = "she", "her", "her", "herself"
            self.He, self.His, self.Him = "She", "Her", "Her"
        else:
            self.he, self.him, self.his, self.himself = "he", "him", "his", "himself"
            self.He, self.His, self.Him = "He", "His", "Him"

    def __str__(self) -> str:
        return self.name

    @property
    def female(self) -> bool:
        return self.he == "she"

    @property
    def a(self) -> str:
        """'a fox named Pip'."""
        return f"{a(self.noun)} named {self.name}"

    @property
    def the(self) -> str:
        """'the fox', or 'the girl'."""
        return f"the {self.noun}"

    @property
    def full(self) -> str:
        """'Pip the fox'; children are called by their names alone."""
        return self.name if self.child else f"{self.name} the {self.noun}"


class Tale:
    """One story being told."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.random = rng.random
        self.parts: list[str] = []
        self.names: set[str] = set()
        self.nouns: set[str] = set()
        self.started = False  # the opening has already named the day
        self.setting: Setting = self.pick(words.SETTINGS)
        cold = () if self.setting is words.JUNGLE else ("cold",)
        self.weather = self.pick(("sunny", "sunny", "windy", "gray", *cold))
        self.place = self.pick(self.setting.name)
        self.home = self.pick(self.setting.homes)
        self.hero = self.make_hero()

    def pick(self, options: Sequence[T]) -> T:
        """Choose one of the options."""
        return options[int(self.random() * len(options))]

    def sample(self, options: Sequence[T], number: int) -> list[T]:
        """Choose several different options, in random order."""
        return self.rng.sample(options, number)

    def chance(self, probability: float) -> bool:
        """Say yes with the given probability."""
        return self.random() < probability

    def make_name(self, *, female: bool, child: bool) -> str:
        """Find a name that nobody has yet; one in eight is made of syllables, so that names are copied, not known."""
        while True:
            draw = self.random()
            if draw < 0.12:
                name = self.pick(words.STARTS)
                name += self.pick(words.MIDDLES) if name[-1] in "aeiou" else ""
                name += self.pick(words.ENDS_HER if female else words.ENDS_HIM)
            elif draw < 0.55 and not child:
                name = self.pick(words.PETS)
            else:
                name = self.pick(words.GIRLS if female else words.BOYS)
            if name not in self.names and all(name[0] != other[0] for other in self.names):
                self.names.add(name)
                return name

    def make_hero(self) -> Who:
        """Make the main character of the story, a child or an animal of the place."""
        female = self.chance(0.5)
        child = self.chance(self.setting.children)
        kind = Kind("girl" if female else "boy", "") if child else self.pick(self.setting.folk)
        self.nouns.add(kind.noun)
        return Who(self.make_name(female=female, child=child), kind, female=female, child=child)

    def friend(self, can: str = "", *, other: Who | None = None, animal: bool = False) -> Who:
        """Make another character, most often of the other gender than `other`, able to do `can` if that is given."""
        other = other or self.hero
        female = other.female ^ self.chance(0.8)
        if not can and not animal and self.chance(self.setting.children * 0.7):
            kind = Kind("girl" if female else "boy", "")
            return Who(self.make_name(female=female, child=True), kind, female=female, child=True)
        fits = [kind for kind in self.setting.folk if kind.noun not in self.nouns and (not can or kind.can == can)]
        if not fits:
            fits = [kind for kind in words.FOREST.folk if kind.noun not in self.nouns and (not can or kind.can == can)]
        kind = self.pick(fits)
        self.nouns.add(kind.noun)
        return Who(self.make_name(female=female, child=False), kind, female=female)

    @property
    def at(self) -> str:
        """'in the forest', 'on the farm'."""
        return ("on " if self.setting in (words.FARM, words.SEASIDE) else "in ") + self.place

    def look(self, thing: Thing) -> str:
        """Fix the looks of a thing for the whole story: 'red kite'."""
        return f"{self.pick(thing.looks)} {thing.noun}"

    def add(self, *options: str) -> None:
        """Tell one of the options; its first letter becomes a capital."""
        text = self.pick(options)
        self.parts.append(text[0].upper() + text[1:])

    def maybe(self, probability: float, *options: str) -> None:
        """Tell one of the options, or leave it."""
        if self.random() < probability:
            self.add(*options)

    def paragraph(self) -> None:
        """Start a new paragraph."""
        self.parts.append("\n\n")

    def speak(self, who: Who | str, text: str, mood: str = "plain", *, more: str = "", pronoun: bool = False) -> None:
        """Let somebody say something: 'text' ends with . ? or !, 'more' is what follows after the speaker is named."""
        name = who if isinstance(who, str) else (who.he if pronoun else who.name)
        verb = self.pick(SAID[mood])
        draw = self.random()
        after_speech = bool(self.parts) and self.parts[-1][-1] == '"'
        if after_speech and verb not in WITH_COMMA:
            verb = "said"
        if after_speech or (draw < 0.2 and verb in WITH_COMMA):
            spoken = f'{name} {verb}, "{text}{" " + more if more else ""}"'
        elif draw < 0.4 and isinstance(who, Who) and "{him}" not in (beat := self.pick(BEATS[mood])):
            beat = beat.replace("{his}", who.his)
            spoken = f'{name} {beat}. "{text}{" " + more if more else ""}"'
            if not more:
                spoken = f'{name} {beat}. "{text}" {who.he} {verb}.' if text[-1] != "." and self.chance(0.4) else spoken
        else:
            inner = text[:-1] + "," if text[-1] == "." else text
            tag = f"{verb} {name}" if not pronoun and " " not in verb and self.chance(0.6) else f"{name} {verb}"
            spoken = f'"{inner}" {tag}.' + (f' "{more}"' if more else "")
        self.parts.append(spoken[0].upper() + spoken[1:])

    def text(self) -> str:
        """Join the sentences told so far."""
        return " ".join(self.parts).replace(" \n\n ", "\n\n").strip()
