"""How stories begin and end, whatever happens in between."""

from __future__ import annotations

import words
from tale import Tale, a

WALKS = ("walking", "wandering", "skipping", "strolling")


def _home(tale: Tale) -> str:
    hero = tale.hero
    if hero.child:
        fits = [home for home in tale.setting.homes if any(w in home for w in ("house", "cottage", "hut", "cabin"))]
        tale.home = tale.pick([home for home in fits if "roots" not in home])
    return tale.home


def begin(tale: Tale, trait: str, does: str) -> None:
    """Introduce the hero: who it is, where it lives, what it is like (`trait`) and what it has or loves (`does`)."""
    hero = tale.hero
    where, home = tale.pick(tale.setting.where), _home(tale)
    size = tale.pick(("little", "little", "young", ""))
    if "small" in trait:
        size = ""
    plain = a(f"{size} {hero.noun}".strip())
    known = a(f"{trait} {size} {hero.noun}".replace("  ", " ")) if trait else plain
    named = tale.pick(("named", "named", "named", "called"))
    he, his = hero.He, hero.his
    live = tale.pick(
        (f"lived {where}", f"lived in {home} {where}", f"lived with {his} family {where}", f"lived {where}")
    )
    once = tale.pick(
        ("Once upon a time", "Once upon a time", "Once upon a time", "Long ago", "A long time ago", "Once")
    )
    comma = "" if once == "Once" else ","
    very = tale.pick((f"was very {trait}", "was " + a(f"{trait} {hero.noun}"))) if trait else "was happy there"
    if " " in trait:
        very = f"was {trait}"
    shape = int(tale.random() * 14)
    if shape == 0 or shape == 1:
        tale.add(f"{once}{comma} there was {known} {named} {hero}.")
        tale.add(f"{he} {live}, and {hero.he} {does}.", f"{he} {live}. {he} {does}.")
    elif shape == 2:
        tale.add(f"{once}{comma} {where}, there lived {known} {named} {hero}.".replace("Once in", "Once, in"))
        tale.add(f"{he} {does}.")
    elif shape == 3:
        tale.add(f"{once}{comma} {known} {named} {hero} {live}.")
        tale.add(f"{he} {does}.")
    elif shape == 4 or shape == 5:
        tale.add(
            f"There was once {plain} {named} {hero} who {does}.", f"There once was {plain} {named} {hero} who {does}."
        )
        tale.add(f"{he} {live}, and {hero.he} {very}.", f"{hero} {live}. {he} {very}.")
    elif shape == 6:
        tale.add(f"{hero} was {known} who {live}.")
        tale.add(f"{he} {does}.")
    elif shape == 7:
        tale.add(f"{where} lived {known} {named} {hero}.", f"In {home} {where} lived {known} {named} {hero}.")
        tale.add(f"{he} {does}.")
    elif shape == 8:
        tale.add(f"{hero.full} {live}.")
        tale.add(f"{he} {very}, and {hero.he} {does}.")
    elif shape == 9:
        tale.add(f"This is the story of {hero}, {known} who {does}.")
        tale.add(f"{he} {live}.")
    elif shape == 10:
        tale.add(f"{hero.full} {does}.", f"{hero.full} {does}.")
        tale.add(f"{he} {live}, and {hero.he} {very}.", f"{he} was {known} who {live}.")
    elif shape == 11:
        tale.add(f"There lived {known} {named} {hero} {where}.", f"Once there lived {known} {named} {hero} {where}.")
        tale.add(f"{he} {does}.", f"Everyone knew that {hero} {does}.")
    else:
        _begin_with_a_day(tale, known, f"{named} {hero}")
        tale.add(f"{he} {live}, and {hero.he} {does}.", f"{he} {live}. {he} {does}.")


def _begin_with_a_day(tale: Tale, known: str, named: str) -> None:
    walk, where = tale.pick(WALKS), tale.pick(tale.setting.trees + tale.setting.waters)
    tale.add(
        f"{_day(tale)}, {known} {named} was {walk} near {where}.",
        f"One day, {known} {named} was {walk} near {where}.",
        f"{_day(tale)}, {known} {named} woke up early and went outside.",
        f"One day, {known} {named} went out to play near {where}.",
        f"It was a {tale.pick(words.WEATHER[tale.weather])} day, and {known} {named} was {walk} near {where}.",
    )
    tale.started = True


def _day(tale: Tale) -> str:
    return f"One {tale.pick(words.WEATHER[tale.weather])} {tale.pick(('morning', 'day', 'afternoon', 'morning'))}"


def one_day(tale: Tale) -> str:
    """Place the first event in time: 'One windy morning', or 'That day' when the day has begun already."""
    if tale.started:
        return tale.pick(("That day", "On that day", "That very day"))
    if tale.chance(0.25):
        return "One day"
    return _day(tale)


def finish(tale: Tale, *morals: str) -> None:
    """Close the story with one of the morals, sometimes after a quiet picture of the evening."""
    hero = tale.hero
    if tale.chance(0.2):
        tale.add(
            f"That night, {hero} fell asleep with a smile.",
            f"When the stars came out, {hero} was already fast asleep.",
            f"That night, the moon shone over {tale.place}, and {hero} slept soundly.",
        )
    tale.add(*morals)
    tale.maybe(0.07, "The end.")
