"""Stories about things: lost, broken, traded, planted. What a thing is like decides what can happen to it."""

# Prose is filled like prose:
# fmt: off
from __future__ import annotations

import words
from opening import begin, finish, one_day
from tale import Tale, Who, a, count, plural
from words import Thing


def lost(tale: Tale) -> None:
    """A treasured thing gets lost in a way that suits it, and somebody with the right gift helps to get it back."""
    hero, thing = tale.hero, tale.pick(words.MOVING)
    look = tale.look(thing)
    giver = tale.pick(words.GIVERS)
    gave = tale.pick(("had given", "had made for")) if thing.moves in ("light", "rolls") else "had given"
    begin(tale, tale.pick(("kind", "cheerful", "curious", "careless", "merry", "gentle")),
          tale.pick((f"had {a(look)} that {hero.his} {giver} {gave} {hero.him}",
                     f"loved {hero.his} {look} more than anything else", f"had {a(look)} and took it everywhere",
                     f"never went anywhere without {hero.his} {look}")))
    place = _lose(tale, thing, look)
    tale.paragraph()
    if place == "nowhere":
        _search(tale, thing, look)
    else:
        _fetch(tale, thing, look, place)


def _lose(tale: Tale, thing: Thing, look: str) -> str:
    """Lose the thing; return where it went: tree, water, hole, or 'nowhere' when nobody saw it go."""
    hero, when = tale.hero, one_day(tale)
    tale.spot = tale.pick(tale.setting.trees)
    tale.pool = tale.pick(tale.setting.waters)
    go = tale.pick(("went for a walk", "was playing outside", "ran out to play", "was on the way home"))
    tale.paragraph()
    if thing.moves == "light":
        where = "tree" if tale.chance(0.6) or not thing.floats else "water"
        end = f"high up into {tale.spot}" if where == "tree" else f"right into the middle of {tale.pool}"
        tale.add(f"{when}, {hero} {go} with the {look}. Suddenly a strong wind came and carried it {end}.",
                 f"{when}, the wind blew very hard. It pulled the {look} away from {hero} and carried it {end}.",
                 f"{when}, {hero} {go}. Whoosh! A gust of wind took the {look} and dropped it {end}.")
        return where
    if thing.moves == "shiny":
        tale.bird = tale.pick(("magpie", "jackdaw", "raven"))
        tale.add(f"{when}, {hero} put the {look} on a stone to look at the clouds. A {tale.bird} saw it shine, picked "
                 "it up and " f"carried it to its nest at the top of {tale.spot}.",
                 f"{when}, while {hero} was resting, a {tale.bird} flew down, took the {look} in its beak and hid it "
                 "in a nest high " f"in {tale.spot}.")
        return "tree"
    if thing.moves == "rolls":
        where = tale.pick(("water", "hole")) if thing.floats else "hole"
        end = f"splashed into {tale.pool}" if where == "water" else "fell into a deep, narrow hole"
        tale.add(f"{when}, {hero} {go}. The {look} slipped away, rolled down the hill and {end}.",
                 f"{when}, {hero} tripped over a root. The {look} rolled and rolled, faster and faster, until it "
                 f"{end}.", f"{when}, {hero} was playing at the top of a hill. Down rolled the {look}, and before "
                 f"{hero.he} could catch it, it " f"{end}.")
        return where
    tale.add(f"{when}, {hero} {go}. When {hero.he} reached into {hero.his} bag, the {look} was gone!",
             f"{when}, {hero} came home and opened {hero.his} bag. It was empty. The {look} was gone!",
             f"{when}, {hero} wanted to show everyone the {look}, but it was not in {hero.his} bag anymore.")
    return "nowhere"


def _fetch(tale: Tale, thing: Thing, look: str, place: str) -> None:
    """Try in vain, then get help from somebody who can do what it takes."""
    hero, noun = tale.hero, thing.noun
    tale.speak(hero,
               tale.pick((f"Oh no, my {noun}!", f"Come back, {noun}!", f"My poor {noun}!", f"Oh dear, my {look}!")),
               "cry", pronoun=tale.chance(0.4))
    can = {"tree": ("climb", "fly"), "water": ("swim",), "hole": ("dig", "small")}[place]
    can = tuple(gift for gift in can if gift != hero.kind.can) if hero.kind.can not in can else ("",)
    if place == "tree":
        tale.add(f"{hero.He} jumped as high as {hero.he} could, but the branch was much too high.",
                 f"{hero.He} threw a stick at the branches, but the {noun} did not move.",
                 f"{hero.He} shook the trunk with all {hero.his} strength, but nothing fell down except a few leaves.")
    elif place == "water":
        tale.add(f"{hero.He} tried to reach it with a stick, but the stick was too short.",
                 f"{hero.He} stepped into the water, but it was too cold and too deep.",
                 f"{hero.He} waited for it to come back to the bank, but it floated farther and farther away.")
    else:
        tale.add(f"{hero.He} put {hero.his} arm into the hole, but it was too deep.",
                 f"{hero.He} lay down and looked into the hole. It was dark, and the {noun} was far, far down.",
                 f"{hero.He} poked in the hole with a twig, but the {noun} only slid deeper.")
    if can == ("",):
        _alone(tale, look, place)
        return
    friend = tale.friend(tale.pick(can), animal=True)
    tale.add(f"Just then {friend.full} came along.", f"{hero} ran to find {hero.his} friend {friend}, "
             f"{a(friend.noun)}.", f"A {friend.noun} named {friend} heard the noise and came to look." if friend.noun[0]
             not in "aeiou" else f"An {friend.noun} named {friend} heard the noise and came to look.")
    tale.speak(friend, tale.pick(("What is the matter?", "Why are you so sad?", "What happened?", "Can I help you?")),
               "ask")
    tale.speak(hero, {"tree": f"My {noun} is up in the tree.", "water": f"My {noun} is in the water.",
                      "hole": f"My {noun} fell into this hole."}[place], "sad",
               more=tale.pick(("", "I can't get it back.")))
    gift = {"climb": "I am good at climbing.", "fly": "I have wings.", "swim": "I love to swim.",
            "dig": "Nobody digs faster than I do.", "small": "I am small enough to fit in there."}[friend.kind.can]
    tale.speak(friend, gift, "kind", more=tale.pick(("I will help you.", "Wait here!", "Let me try.")))
    tale.paragraph()
    _bring(tale, friend, look, place)
    _thank(tale, friend, thing, look)


def _alone(tale: Tale, look: str, place: str) -> None:
    """Let the hero remember a gift of its own."""
    hero, friend = tale.hero, tale.friend()
    deed = {"climb": f"climbed up {tale.spot}, branch by branch,", "fly": f"flew up to the top of {tale.spot}",
            "swim": f"jumped into {tale.pool}, swam as fast as {hero.he} could",
            "dig": "dug and dug until the hole was wide enough",
            "small": f"made {hero.himself} very thin, crept into the " "hole"}[hero.kind.can]
    skill = "creep into tiny places" if hero.kind.can == "small" else hero.kind.can
    tale.add(f"{hero.His} friend {friend} saw it all.", f"{hero} sat down and began to cry. Then {friend} came by.")
    tale.speak(friend, f"Why don't you {skill}?", "ask",
               more=tale.pick((f"You are {a(hero.noun)}!", "You are so good at it!")))
    tale.speak(hero, tale.pick(("Of course!", "How could I forget that!", "You are right!")), "glad")
    tale.paragraph()
    tale.add(f"So {hero.he} {deed} and got the {look} back.", f"{hero} {deed} and came back with the {look}.")
    tale.add(f"{hero} and {friend} danced with joy.", f"{friend} cheered, and {hero} bowed like a king." if not
             hero.female else f"{friend} cheered, and {hero} bowed like a queen.",
             f"{hero} hugged {friend} and thanked {friend.him}.")
    finish(tale, "When you are upset, it is easy to forget what you can do.",
           f"{hero} had been so upset that {hero.he} had forgotten what {hero.he} could do. {hero.He} never forgot it "
           "again.", "Sometimes a friend only has to remind us how strong we are.")


def _bring(tale: Tale, friend: Who, look: str, place: str) -> None:
    """Tell how the friend gets the thing."""
    if friend.kind.can == "fly":
        tale.add(f"{friend} flapped {friend.his} wings, flew up to the branch and came back with the {look}.",
                 f"{friend} flew to the very top of {tale.spot}, took the {look} and brought it down.")
    elif friend.kind.can == "climb":
        tale.add(f"{friend} climbed up {tale.spot}, higher and higher, and carefully brought the {look} down.",
                 f"Up went {friend}, from branch to branch. Soon {friend.he} was back with the {look}.")
    elif friend.kind.can == "swim":
        tale.add(f"{friend} dived into {tale.pool}, swam to the {look} and pushed it to the bank.",
                 f"Splash! {friend} swam out to the middle of {tale.pool} and came back with the {look}. It was wet "
                 "but not broken.")
    elif friend.kind.can == "dig":
        tale.add(f"{friend} dug so fast that the earth flew in all directions. Soon the hole was wide, and there was "
                 f"the {look}.", f"{friend} dug and dug, and after a while {friend.he} pulled out the {look}. It was "
                 "dirty but not broken.")
    else:
        tale.add(f"{friend} crept into the hole. It was dark inside, but soon {friend.he} pushed the {look} out into "
                 "the light.", f"{friend} squeezed into the hole, tied a string to the {look}, and together they "
                 "pulled it out.")


def _thank(tale: Tale, friend: Who, thing: Thing, look: str) -> None:
    hero, noun = tale.hero, thing.noun
    tale.speak(hero, tale.pick((f"Thank you, {friend}!", f"Oh, {friend}, thank you!", "You are a true friend!")),
               "glad")
    tale.add(f"{hero} shared {hero.his} {tale.pick(('lunch', 'cookies', 'berries', 'sandwich'))} with {friend}, and "
             "they played " f"until the sun went down.", f"Then {hero} and {friend} played together all afternoon.",
             f"{hero} let {friend} hold the {noun} all the way home.", f"{hero} gave {friend} a big hug.")
    if thing.moves == "light":
        end = f"From then on, {hero} always held the {noun} tight when the wind blew."
    elif thing.moves == "shiny":
        end = f"After that, {hero} never left the {noun} lying where a {tale.bird} could see it."
    elif thing.moves == "rolls":
        end = f"After that, {hero} never took the {noun} to the top of a hill again."
    else:
        end = f"{hero} never lost the {noun} again."
    finish(tale, end, end, f"{hero} had the {look} back, and a new friend too.",
           "What one cannot do alone, two can do together.", f"Every time {hero} looked at the {noun}, {hero.he} "
           f"thought of {friend}.")


def _search(tale: Tale, thing: Thing, look: str) -> None:
    """Nobody saw it go: look in wrong places, find the reason, walk back the same way."""
    hero, noun = tale.hero, thing.noun
    friend = tale.friend()
    first, second, last = tale.sample(tale.setting.spots, 3)
    odd, odder = tale.sample(words.MISFITS, 2)
    tale.speak(hero, tale.pick((f"Where is my {noun}?", f"I have lost my {noun}!", f"My {noun} is gone!")), "cry",
               pronoun=tale.chance(0.4))
    tale.add(f"{hero.He} looked {first}, but there was only {odd}.", f"First {hero.he} looked {first}. {hero.He} found "
             f"{odd}, but no {noun}.")
    tale.add(f"{hero.He} looked {second} and found {odder}, but not the {noun}.",
             f"Then {hero.he} looked {second}. There was nothing there but {odder}.")
    tale.paragraph()
    tale.add(f"{hero.His} friend {friend} wanted to help.", f"Then {hero} met {friend}, who was a good friend.",
             f"{friend.full} saw {hero} and came over.")
    tale.speak(friend, "Show me your bag.", "kind")
    tale.add(f"{friend} held the bag up to the light.", f"{friend} turned the bag over.")
    tale.speak(friend, "Look, there is a hole in it!", "cry",
               more=tale.pick(("Your treasure fell out.", "Where did you walk today?")))
    tale.add(f"So they went back the same way, step by step, and there, {last}, lay the {look}!",
             f"Together they walked back the way {hero} had come. There, {last}, something caught {hero.his} eye. "
             f"It was the {look}!")
    tale.add(f"{hero} was so happy that {hero.he} danced.", f"{hero} laughed and hugged {friend}.",
             f"{hero} picked it up and held it close.")
    tale.add(f"At home, they sewed up the hole with strong {tale.pick(('red', 'blue', 'green', 'black'))} thread.",
             f"That evening, {hero} and {friend} sewed up the hole in the bag.")
    finish(tale, f"{hero} never lost the {noun} again.", f"Now the {noun} was safe, and {hero} knew that {friend} was "
           "a friend to keep.", "A small hole can lose a big treasure.",
           "It is always good to look twice, and even better to look together.")


# what is wrong, the flaw, poor ways to mend it and why they fail, who knows better, the right way, what stays visible
MENDS = {"torn": ("tore", "a long tear", (("sticky mud", "the mud dried and fell off"),
                                          ("a leaf", "the leaf blew away"),
                                          ("honey", "the honey only made a sticky mess")), "tailor",
                  "a needle and strong thread", "a patch in the shape of a star", "sewed"),
         "cracked": ("cracked", "a big crack", (("mud", "the mud was washed away by the first drop of rain"),
                                                ("a ribbon", "the ribbon slipped off"),
                                                ("tree sap", "the sap would not dry")), "potter", "good glue",
                     "a thin golden line", "glued"),
         "wheel": ("lost a wheel", "a broken axle", (("a potato for a wheel", "the potato was not round enough"),
                                                     ("a piece of string", "the string broke"),
                                                     ("a cookie for a wheel", "the cookie crumbled")), "carpenter",
                   "a round piece of wood and a nail", "one wheel that was lighter than the others", "fixed"),
         "stuck": ("stopped working", "a tiny broken spring",
                   (("a loud sneeze", "nothing moved"), ("butter", "the butter only made it slippery"),
                    ("a good shake", "it only rattled")), "clockmaker", "a drop of oil and a new spring",
                   "one small new screw", "repaired"),
         "string": ("broke its strings", "a broken string", (("grass", "the grass was too weak"),
                                                             ("a noodle", "the noodle snapped"),
                                                             ("spider silk", "the spider silk was too thin")),
                    "toymaker", "a new string", "one string that was bright red", "mended")}


def broken(tale: Tale) -> None:
    """A borrowed thing breaks; the quick repair fails, the honest one works."""
    hero, thing = tale.hero, tale.pick(words.BREAKING)
    look, noun = tale.look(thing), thing.noun
    owner = tale.friend()
    broke, flaw, tries, expert, tool, mark, mended = MENDS[thing.breaks]
    the_mark = "the " + mark.split(" ", 1)[1]
    trait = tale.pick(("careless", "wild", "hasty", "clumsy"))
    begin(tale, trait, tale.pick((f"had a good friend named {owner}", f"loved to play with {hero.his} friend {owner}",
                                  f"often played with {owner.full}")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {owner} lent {hero} {owner.his} {look}.",
             f"{one_day(tale)}, {owner} let {hero} play with {owner.his} {look}.")
    tale.speak(owner, "Please be careful with it.", "kind",
               more=tale.pick((f"My {tale.pick(words.GIVERS)} gave it to me.", "It is the only one I have.", "")))
    was = "" if thing.breaks == "string" else f" {tale.pick(('Crack!', 'Oh no!', 'Bump!'))}"
    tale.add(f"But {hero} ran too fast and fell.{was} The {noun} "
             f"{broke}.".replace("broke its strings", "had a broken string"),
             f"But {hero} was not careful at all, and soon the {noun} "
             f"{broke}.".replace("broke its strings", "had a broken string"))
    poor, why = tale.pick(tries)
    tale.speak(hero, tale.pick(("Oh no, what have I done?", f"What will {owner} say?", "I must mend it quickly!")),
               "sad", pronoun=True)
    tale.add(f"{hero.He} tried to mend it with {poor}, but {why}.")
    tale.paragraph()
    tale.add(f"So {hero} took the {noun} to the old {expert}.", f"At last {hero} went to see the {expert}.")
    tale.speak(f"the {expert}", f"I see {flaw}." if flaw[0] == "a" else flaw, "wise",
               more="I will show you how to mend it, but you must do the work yourself.")
    tale.add(f"With {tool}, {hero} {mended} the {noun} slowly and carefully.",
             f"The {expert} gave {hero.him} {tool}. {hero} worked all afternoon and did not hurry once.")
    tale.add(f"When it was done, it was as good as new, except for {mark}.",
             f"In the end only {mark} showed where it had been broken.")
    tale.paragraph()
    tale.add(f"Then {hero} went to {owner} and told {owner.him} everything.",
             f"{hero} could have kept it secret, but {hero.he} told {owner} the truth.")
    tale.speak(hero, f"I am sorry that I broke your {noun}.", "sad")
    tale.add(f"{owner} looked at {the_mark} for a long time.")
    tale.speak(owner, tale.pick(("I like it even better now.", "You told the truth, and you mended it.",
                                 "Thank you for telling me.")), "kind",
               more=tale.pick(("", "We are still friends.", "Let's play together.")))
    finish(tale, f"From that day on, {hero} was careful with other people's things.",
           "A mistake can be mended, if you tell the truth.", f"Whenever {hero} saw {the_mark}, {hero.he} remembered "
           "to slow down.", f"{hero} was never so {trait} again.")


TRADES = (  # who, what they give, where it is kept, what they say they lack
    ("baker", "a bag of flour", "flour"),
    ("farmer", "a jug of milk", "milk"),
    ("beekeeper", "a jar of honey", "honey"),
    ("weaver", "a warm blanket", "cloth"),
    ("fisherman", "a strong net", "fish"),
    ("miller", "a sack of grain", "grain"),
    ("gardener", "a basket of pears", "fruit"),
    ("carpenter", "a sturdy stool", "wood"),
    ("shepherd", "a bundle of wool", "wool"),
    ("candle maker", "a tall candle", "candles"),
    ("potter", "a round pot", "clay"),
    ("basket maker", "a big basket", "baskets"),
)
GOALS = (("bake a cake for {his} {giver}", "cake"), ("make a present for {his} {giver}", "present"),
         ("surprise {his} {giver}", "surprise"))


def trade(tale: Tale) -> None:
    """To get one thing the hero needs another, and for that a third: the chain is walked there and back."""
    hero = tale.hero
    giver = tale.pick(words.GIVERS)
    (first, first_gift, _), (second, second_gift, _), (third, third_gift, _) = tale.sample(TRADES, 3)
    begin(tale, tale.pick(("patient", "helpful", "cheerful", "clever", "stubborn")),
          tale.pick((f"loved {hero.his} {giver} very much", f"wanted to give {hero.his} {giver} a birthday present",
                     f"always helped {hero.his} {giver}")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} went to the {first} because {hero.his} {giver} needed {first_gift}.",
             f"{one_day(tale)}, {hero.his} {giver} was ill and needed {first_gift}, so {hero} went to the {first}.")
    tale.speak(hero, f"May I have {first_gift}, please?", "ask", pronoun=True)
    tale.speak(f"the {first}", f"I will give it to you if you bring me {second_gift}.", "plain")
    tale.add(f"So {hero} went to the {second}.", f"{hero} thanked the {first} and walked to the {second}'s house.")
    tale.speak(f"the {second}", f"You can have {second_gift}, but first bring me {third_gift}.", "plain")
    tale.add(f"So {hero} walked on to the {third}.", f"{hero} sighed, but {hero.he} did not give up. {hero.He} went to "
             f"the {third}.")
    job = tale.pick((("sweep my floor", "swept the floor"), ("carry in the firewood", "carried in the firewood"),
                     ("wash my windows", "washed the windows"), ("find my glasses", "found the glasses under the bed"),
                     ("feed my chickens", "fed the chickens"), ("water my flowers", "watered all the flowers"),
                     ("chase the crows from my field", "chased the crows away")))
    tale.speak(f"the {third}", f"Could you {job[0]}?", "ask", more=tale.pick(("", f"Then you can have {third_gift}.")))
    tale.paragraph()
    tale.add(f"{hero} {job[1]} at once, and the {third} gave {hero.him} {third_gift}.",
             f"That was easy. {hero} {job[1]}, and the {third} happily gave {hero.him} {third_gift}.")
    that = third_gift.split(" ", 1)[1]
    tale.add(f"{hero.He} brought the {that} to the {second} and got {second_gift}.",
             f"The {second} was glad to have the {that} and gave {hero.him} {second_gift}.")
    that = second_gift.split(" ", 1)[1]
    tale.add(f"{hero.He} brought the {that} to the {first}, and at last {hero.he} had {first_gift}.",
             f"Then the {first} took the {that} and gave {hero} {first_gift}.")
    that = first_gift.split(" ", 1)[1]
    tale.add(f"{hero} ran home and gave the {that} to {hero.his} {giver}.",
             f"It was almost evening when {hero} came home with the {that}.")
    tale.speak(f"{hero.his} {giver}", "How did you get it?", "ask")
    tale.speak(hero, "Step by step.", "glad")
    finish(tale, "A long way is only many short steps.", f"That day, {hero} had helped three neighbors and made "
           f"{hero.his} {giver} happy.", "If you keep going, you will get there in the end.",
           f"{hero.His} {giver} was the happiest {giver} {tale.at}.")


def seed(tale: Tale) -> None:
    """A seed needs time; somebody laughs, somebody waits, and in the end there is enough for everyone."""
    hero, friend = tale.hero, tale.friend()
    plant, fruit, grown = tale.pick((("a pumpkin seed", "pumpkin", "the biggest pumpkin anyone had ever seen"),
                                     ("a sunflower seed", "sunflower", "a sunflower taller than a house"),
                                     ("an apple seed", "tree", "a young tree full of red apples"),
                                     ("a strange blue seed", "flower", "a blue flower that shone in the dark"),
                                     ("a melon seed", "melon", "a melon as round as the moon"),
                                     ("a bean", "beanstalk", "a beanstalk that reached up to the roof")))
    begin(tale, "patient",
          tale.pick(("loved everything that grows", "liked to watch things grow", "had a little garden")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} found {plant} and planted it "
             f"{tale.pick(('in front of the door', 'in a sunny spot', 'near the path'))}.",
             f"{one_day(tale)}, an old {tale.pick(('woman', 'man', 'crow', 'peddler'))} gave {hero} {plant}. {hero.He} "
             "planted it that same " f"day.")
    tale.add(f"{hero.His} neighbor {friend.full} saw it and shook {friend.his} head.",
             f"{friend.full}, who lived next door, came to look.", f"{hero.His} friend {friend} stopped at the fence.")
    tale.speak(friend,
               tale.pick(("Nothing will ever grow there.", "That is only a tiny seed.", "Why do you water the mud?")),
               "proud")
    tale.speak(hero, tale.pick(("Wait and see.", "Every big thing was small once.", "It just needs time.")), "plain")
    tale.paragraph()
    tale.add(f"{hero} watered it every morning. After {count(tale.pick((2, 3, 4, 5)), 'day')} there was still nothing "
             "to see.", f"On the first day nothing happened. On the second day nothing happened. But {hero} watered it "
             "all the same.")
    tale.add(f"Some days it was hot, and {hero} carried water from the well.",
             f"When the wind was cold, {hero} covered the spot with leaves.",
             f"Even {friend} began to look at the spot every day, when nobody was watching.")
    tale.add("Then, one morning, a little green tip came out of the ground.",
             "Then it rained, and the next day there was a tiny green leaf.")
    tale.add(f"It grew and grew. By the end of the summer it was {grown}.",
             f"Week after week it grew, until there stood {grown}." if "melon" not in grown and "pumpkin" not in grown
             else f"Week after week it grew, until there lay {grown}.")
    tale.speak(friend, "I was wrong.", "sad",
               more=tale.pick((f"Your {fruit} is wonderful.", "I should not have laughed.")))
    if fruit in ("pumpkin", "melon", "tree", "beanstalk"):
        dish = {"pumpkin": "pumpkin soup", "melon": "sweet slices of melon", "tree": "apple pie",
                "beanstalk": "bean stew"}[fruit]
        tale.add(f"{hero} was not angry. {hero.He} invited everyone {tale.at}, and they all ate {dish}.",
                 f"{hero} only smiled and shared {dish} with {friend} and all the neighbors.")
    else:
        tale.add(f"{hero} was not angry. {hero.He} gave {friend} {tale.pick(('three', 'five', 'a handful of'))} new "
                 "seeds.", f"{hero} only smiled, and the two of them sat beside the {fruit} until the evening.")
    finish(tale, f"From then on, {friend} never laughed at small things again.", "Good things take time.",
           f"And the next spring, {hero} and {friend} planted new {plural('seed')} together.",
           f"It had all begun with {plant} and a little patience.")
