"""Stories about going out: getting lost, rescuing, promising, being afraid, owning up, building together."""

# Prose is filled like prose:
# fmt: off
from __future__ import annotations

import words
from opening import begin, finish, one_day
from tale import Tale, a


def way_home(tale: Tale) -> None:
    """The hero follows something past three landmarks, and finds the way home by passing them in reverse order."""
    hero = tale.hero
    one, two, three = tale.sample(tale.setting.marks, 3)
    lure, did = tale.pick((("a blue butterfly", "fluttered"), ("a golden beetle", "hummed"),
                           ("a strange white bird", "flew"), ("a tiny sound of music", "drifted"),
                           ("a dandelion seed", "floated"), ("a green dragonfly", "darted")))
    begin(tale, tale.pick(("curious", "dreamy", "adventurous", "playful")),
          tale.pick(("loved to explore", "always wanted to know what was behind the next hill", "often forgot the time",
                     "liked to follow anything that moved")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} saw {lure} and followed it.".replace("saw a tiny sound", "heard a tiny sound"),
             f"{one_day(tale)}, {lure} {did} past, and {hero} ran after it.")
    tale.add(f"First they came to {a(one)}, then to {a(two)}, and at last to {a(three)}.".replace("they", hero.he),
             f"{hero.He} passed {a(one)}. {hero.He} passed {a(two)}. Then {hero.he} came to {a(three)}.",
             f"It led {hero.him} past {a(one)}, around {a(two)} and all the way to {a(three)}.")
    tale.add("There it was gone. The sun was going down, and everything looked strange.",
             "Suddenly it was gone, and a thick fog came up.", "Then it was gone, and it was getting dark.")
    tale.speak(hero, tale.pick(("Where am I?", "Which way is home?", "How do I get home?")), "ask",
               more=tale.pick(("", "I am lost.")))
    tale.paragraph()
    if tale.chance(0.5):
        friend = tale.friend(animal=True)
        tale.add(f"{a(friend.noun)} named {friend} heard {hero.him}.", f"{friend.full} came out of the shadows.")
        tale.speak(friend, "What did you pass last?", "ask",
                   more=tale.pick(("Go there first.", "Start with that.", "")))
        tale.speak(hero, f"The {three}.", "plain", more=f"Before that, the {two}, and before that, the {one}.")
        tale.speak(friend, "Then go back the same way.", "wise",
                   more=tale.pick(("I will walk with you.", "I will come along.")))
        tale.add(f"Together they walked from the {three} to the {two}, and from the {two} to the {one}.",
                 f"They found the {three}, then the {two}, and then the {one}.")
        end = f"{hero} thanked {friend} and waved until {friend.he} was gone."
    else:
        tale.add(f"{hero} wanted to cry, but then {hero.he} closed {hero.his} eyes and remembered the way.",
                 f"{hero} sat down and thought hard.")
        tale.speak(hero, f"The {three} came last.", "brave", more="So it must come first now.", pronoun=True)
        tale.add(f"From the {three} {hero.he} went back to the {two}. From the {two} {hero.he} went back to the {one}.",
                 f"Soon {hero.he} left the {three} behind and saw the {two}. A little later, there was the {one}.")
        end = f"{hero} was very proud that {hero.he} had found the way."
    parent = tale.pick(("mother", "father", "grandmother", "grandfather"))
    him = "him" if parent.endswith("father") else "her"
    tale.add(f"From the {one}, {hero} could see the light in the window.",
             f"Behind the {one}, {hero} saw the smoke of {hero.his} own chimney.")
    tale.paragraph()
    tale.add(end)
    tale.add(f"At home {hero.his} {parent} was waiting with {tale.pick(words.DISHES)}. {hero} told {him} everything.",
             f"{hero.His} {parent} hugged {hero.him} for a long time.")
    tale.speak(hero, "Next time I will look where I go.", "plain", pronoun=tale.chance(0.5))
    finish(tale, "Whoever remembers the way there will find the way back.",
           f"From then on, {hero} looked back at every corner.", "The best part of a journey is coming home.",
           f"{hero} still loved adventures, but {hero.he} never forgot the way home again.")


TRAPS = {  # where somebody is stuck -> (how it is told, failing tries, working ways)
    "hole": (
        "at the bottom of a deep hole",
        (("a stick", "it was too short"), ("a vine", "it broke")),
        (
            "rolled stones into the hole, one after the other, until {x} could climb out",
            "let down a long rope and pulled with all {his} strength",
            "pushed a fallen branch into the hole, and {x} climbed up on it like on a ladder",
        ),
    ),
    "rock": (
        "on a rock in the middle of the rushing water",
        (("a stick", "it was too short"), ("a leaf for a boat", "it sank at once")),
        (
            "laid a long plank from the bank to the rock, and {x} walked across",
            "threw a rope across the water and pulled {x} to the bank on a log",
            "rolled big stones into the water until there was a path to the rock",
        ),
    ),
    "tree": (
        "at the very top of a tall tree",
        (("a stool", "it was too low"), ("a pile of leaves", "it was too soft to stand on")),
        (
            "put a long ladder against the trunk and climbed up to {x}",
            "held out a big blanket, and {x} jumped right into it",
            "tied a basket to a rope and let {x} down, little by little",
        ),
    ),
    "branch": (
        "under a heavy branch",
        (("a push", "it did not move"), ("a thin stick", "it snapped")),
        (
            "put a long pole under the branch and lifted it up",
            "called everyone who was near, and they lifted the branch all together",
            "dug the earth away until {x} could slip out",
        ),
    ),
}


def rescue(tale: Tale) -> None:
    """Somebody is stuck; the first tool fails for a reason, the second suits the place; later the favor is returned."""
    hero = tale.hero
    stuck = tale.friend(animal=True)
    escapes = {"fly": ("branch",), "climb": ("rock", "branch"), "swim": ("hole", "tree", "branch"),
               "dig": ("rock", "tree", "branch")}  # nobody is stuck where its own gift would help
    where, fails, ways = TRAPS[tale.pick(escapes.get(stuck.kind.can, tuple(TRAPS)))]
    (tool, why), way = tale.pick(fails), tale.pick(ways)
    way = way.replace("{x}", stuck.name).replace("{his}", hero.his)
    begin(tale, tale.pick(("brave", "helpful", "clever", "small but brave")),
          tale.pick(("was never afraid to try", "liked to help others", "always had a good idea",
                     "wanted to be a hero one day")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} heard somebody call for help. It was {stuck.full}, stuck {where}.",
             f"{one_day(tale)}, there was a cry for help. {hero} ran to look and found {stuck.full} {where}.")
    tale.speak(stuck, tale.pick(("Please help me!", "I can't get out!" if "top" not in where and "rock" not in where
                                 else "I can't get down!" if "top" in where else "I can't get back!",
                                 "Help me, please!")), "cry")
    tale.speak(hero, tale.pick(("Don't be afraid!", "Hold on!", "I am coming!", "Stay calm!")), "brave",
               more=tale.pick(("", "I will think of something.", "I will get you out.")))
    tale.add(f"First {hero.he} tried {tool}, but {why}.", f"{hero.He} tried {tool}. That did not work, because {why}.")
    tale.maybe(0.5, f"{stuck} began to cry.", f"It was getting late, and {stuck} was cold.", f"{hero} did not give up.")
    tale.paragraph()
    tale.add(f"Then {hero} had an idea. {hero.He} {way}.", f"{hero} looked around and thought. Then {hero.he} {way}.")
    tale.add(f"{stuck} was safe at last.", f"Soon {stuck} was safe.", f"It worked! {stuck} was free.")
    tale.speak(stuck, tale.pick(("Thank you!", "You saved me!", f"Thank you, {hero}!")), "glad",
               more=tale.pick(("One day I will help you, too.", "I will never forget this.", "")))
    if tale.chance(0.5):
        tale.paragraph()
        gift = {"fly": "flew up high and showed {him} the way", "climb": "climbed a tree and saw the way home",
                "swim": "swam through the water and brought it back", "dig": "dug a tunnel and let {him} out",
                "strong": "pushed the stone away", "small": "crept through the bars and brought the key",
                "quick": "ran for help as fast as the wind"}[stuck.kind.can].replace("{him}", hero.him)
        trouble = {"fly": "got lost in the fog", "climb": "lost the way",
                   "swim": f"dropped {hero.his} hat into the lake", "dig": "was locked in a cellar",
                   "strong": "could not get home because a big stone blocked the path",
                   "small": "was locked in a cage by mistake", "quick": "hurt a leg far from home"}[stuck.kind.can]
        tale.add(f"Some days later, {hero} {trouble}. Who came to help? It was {stuck}! {stuck.He} {gift}.",
                 f"Not long after that, {hero} {trouble}. Then {stuck} came and {gift}.")
        finish(tale, "One good turn deserves another.", f"Now {hero} and {stuck} were even, and they were the best of "
               "friends.", "Those who help are never alone.")
    else:
        tale.add(f"They went home together and ate {tale.pick(words.DISHES)}.",
                 f"{stuck} came to visit {hero} every week after that.")
        finish(tale, "If the first idea fails, try another one.", f"That is how {hero} and {stuck} became friends.",
               f"{hero} had always wanted to be a hero, and now {hero.he} was one.",
               "You don't have to be big to be a great help.")


def promise(tale: Tale) -> None:
    """A promise until sunset, and two temptations: kept or broken according to the hero's character."""
    hero, friend = tale.hero, tale.friend()
    keeps = tale.chance(0.55)
    trait = tale.pick(("faithful", "honest", "reliable")) if keeps else tale.pick(("forgetful", "playful", "dreamy"))
    elder = tale.pick(("old Mrs. Plum", "old Mr. Finch", "the old miller", "the old lighthouse keeper" if tale.setting
                       is words.SEASIDE else "the old shepherd", f"{hero.his} grandmother", f"{hero.his} grandfather"))
    him = "her" if elder.endswith(("Plum", "grandmother")) else "him"
    load = tale.pick(("a bottle of medicine", "a letter", "a loaf of bread", "a basket of firewood", "a warm coat",
                      "a pot of soup"))
    that = load.split(" ", 1)[1]
    begin(tale, trait, tale.pick((f"often visited {elder}", f"liked {elder} very much", f"sometimes helped {elder}")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {elder} needed {load}.", f"{one_day(tale)}, {elder} was ill and needed {load}.")
    tale.speak(hero, "I will bring it to you before the sun goes down.", "plain",
               more=tale.pick(("I promise!", "That is a promise.")))
    tale.add(f"{hero} took the {that} and set out.", f"So {hero} packed the {that} and went on {hero.his} way.")
    game = tale.pick(words.GAMES)
    tale.add(f"On the way {hero.he} met {friend.full}, who was playing {game}.",
             f"Near {tale.pick(tale.setting.trees)} stood {friend.full}.")
    tale.speak(friend, tale.pick((f"Come and play {game} with me!", "Stay and play!", "The water is so warm today!")),
               "cry")
    tale.paragraph()
    if keeps:
        tale.speak(hero, tale.pick(("I would love to, but I made a promise.", "Not now.", "I can't stop.")), "plain",
                   more=tale.pick(("I must go on.", "Somebody is waiting for me.")))
        tale.add(f"A little later {hero.he} saw "
                 f"{tale.pick(('a puppet show', 'ripe berries', 'a merry dance', 'a rainbow'))}, but {hero.he} "
                 f"walked on.", "Then it began to rain, but " + f"{hero.he} only walked faster.")
        tale.add(f"The sun was touching the hills when {hero} knocked on the door.",
                 f"Just before the sun went down, {hero} was there.")
        tale.speak(elder, "You kept your word.", "kind",
                   more=tale.pick(("I knew you would come.", "Thank you, my dear.")))
        tale.add(f"The next day {hero} and {friend} played {game} from morning till night.",
                 f"As a thank-you, {hero} got {tale.pick(('a shiny coin', 'a big hug', 'a bag of cookies'))} and "
                 "shared the joy with "
                 f"{friend}.".replace("a big hug and shared the joy", "a bag of nuts and shared it")
                 .replace("a shiny coin and shared the joy", "a bag of cherries and shared it")
                 .replace("and shared the joy", "and shared them"))
        finish(tale, "A promise is a promise.", f"Everyone knew that they could trust {hero}.",
               "Play can wait, but a promise cannot.")
        return
    tale.speak(hero, tale.pick(("Only for a minute.", "A short game can't hurt.")), "plain",
               more=tale.pick(("", "It is still early.")))
    tale.add(f"{hero.He} put the {that} under a bush and began to play. One game became two, and two became "
             f"{tale.pick(('five', 'six', 'ten'))}.", f"They played {game} until the first star came out. Then {hero} "
             f"remembered the {that}!")
    tale.add(f"When {hero} came to the house, it was dark. {elder[0].upper() + elder[1:]} had waited all day.",
             f"It was night when {hero} knocked on the door at last.")
    tale.speak(hero, "I broke my promise.", "sad", more=tale.pick(("I am so sorry.", "Please forgive me.")))
    tale.speak(elder, tale.pick(("I was worried about you.", "A promise is like a bridge.")), "kind", more="" if
               tale.chance(0.3) else tale.pick(("Tomorrow is a new day.", "Do better next time.")))
    tale.add(f"The next morning {hero} was there before the sun was up, and {hero.he} helped {him} all day long.",
             f"The next day {hero} came early, and {friend} came along to help.")
    finish(tale, f"{hero} never forgot a promise again.", "It is easy to make a promise. The art is to keep it.",
           f"From then on, {hero} tied a knot in a string for every promise.")


FEARS = {  # what the hero fears -> how it shows, what must be done, small step, what was learned
    "the dark": (
        "never went out at night",
        "walk through the dark {tunnel}",
        "counted {his} steps out loud",
        "The dark is only the day with its eyes closed.",
    ),
    "thunder": (
        "hid under the bed whenever it thundered",
        "run outside in the middle of a thunderstorm",
        "sang a song louder than the thunder",
        "Thunder is loud, but it only makes noise.",
    ),
    "deep water": (
        "never went near {pool}",
        "cross {pool} on a raft",
        "looked only at the other side and not at the water",
        "The water carried {him} like a friend.",
    ),
    "high places": (
        "never climbed anything taller than a chair",
        "climb to the top of {tree}",
        "looked only at the next branch",
        "From up there the whole world looked beautiful.",
    ),
    "big dogs": (
        "always crossed the road when a dog came",
        "walk past the big dog at the gate",
        "held out a hand and spoke softly",
        "The big dog only wanted to play.",
    ),
}


def fear(tale: Tale) -> None:
    """The hero is afraid of one thing, and a friend in need is on the other side of it."""
    hero, friend = tale.hero, tale.friend(animal=tale.chance(0.5))
    fears = [name for name in FEARS if not (name == "high places" and hero.kind.can in ("fly", "climb")) and not
             (name == "deep water" and hero.kind.can == "swim") and not (name == "big dogs" and "dog" in hero.noun)]
    name = tale.pick(fears)
    shows, must, step, learned = FEARS[name]
    tunnel, pool, tree = (tale.pick(("tunnel", "cave", "forest path")), tale.pick(tale.setting.waters),
                          tale.pick(tale.setting.trees))

    def fill(text: str) -> str:
        return (text.replace("{tunnel}", tunnel) .replace("{pool}", pool) .replace("{tree}", tree)
                .replace("{his}", hero.his) .replace("{him}", hero.him))

    begin(tale, tale.pick(("timid", "gentle", "careful", "shy")),
          tale.pick((f"was afraid of {name}", f"was very much afraid of {name}")))
    tale.add(f"{hero.He} {fill(shows)}.")
    tale.add(f"The others laughed at {hero.him}, but {hero.his} friend {friend} never did.",
             f"Only {hero.his} friend {friend} knew about it.")
    tale.paragraph()
    when = "That night" if name == "thunder" else one_day(tale)
    if name == "thunder":
        tale.add("One night, black clouds covered the sky, and a storm came up.",
                 "One night, the wind howled, and it began to rain.")
    tale.add(f"{when}, {friend} was in trouble. {friend.He} had hurt {friend.his} foot, and nobody else was "
             "near.", f"{when}, {hero} heard {friend} call for help from far away.",
             f"{when}, {friend} did not come home. Then {hero} heard {friend.him} call from far away.")
    tale.add(f"To reach {friend.him}, {hero} had to {fill(must)}.", f"There was only one way to get to {friend}: "
             f"{hero} had to {fill(must)}.")
    tale.add(f"{hero.His} knees shook, and {hero.his} heart beat fast.", f"{hero} trembled from head to toe.")
    tale.speak(hero, tale.pick(("I can't do it.", "I am so scared.")), "shy", more=f"But {friend} needs me.",
               pronoun=tale.chance(0.5))
    tale.paragraph()
    tale.add(f"{hero.He} took a deep breath. Then {hero.he} {fill(step)}.",
             f"So {hero} {fill(step)} and went on, little by little.", f"{hero} {fill(step)}. It helped.")
    tale.add(f"And then {hero.he} was there!", f"Before {hero.he} knew it, {hero.he} had done it.",
             "It was not as bad as it had seemed.")
    tale.speak(friend, tale.pick(("You came!", "I knew you would come!", f"{hero}, is it really you?")), "cry")
    tale.speak(friend, f"But you are afraid of {name}.", "plain", pronoun=friend.he != hero.he)
    tale.speak(hero, tale.pick(("I was more afraid of losing you.", "I still am, a little.", "Not as much as before.")),
               "kind")
    tale.add(f"{hero} helped {friend} home, and on the way they even laughed.",
             "Together they went home, hand in hand.")
    finish(tale, learned.replace("{him}", hero.him), "To be brave does not mean to have no fear. It means to go on all "
           "the same.", f"After that, {hero} was not so afraid of {name} anymore.",
           f"Nobody ever laughed at {hero} again.")


def noise(tale: Tale) -> None:
    """A strange noise at night grows in the dark into a monster, and in the light into somebody small."""
    hero, guest = tale.hero, tale.friend(tale.pick(("small", "fly", "climb", "swim", "dig")))
    sound, reason = tale.pick((("Tap, tap, tap", "was knocking because {he} had lost {his} way"),
                               ("Scratch, scratch", "was looking for a warm place to sleep"),
                               ("Rumble, rumble", "had such an empty stomach that it rumbled"),
                               ("Hoo, hoo", "was crying because {he} missed {his} mother"),
                               ("Crunch, crunch", "was nibbling on an old crust of bread"),
                               ("Sniff, sniff", "had caught a bad cold")))
    reason = reason.replace("{he}", guest.he).replace("{his}", guest.his)
    monster = tale.pick(("a monster with green eyes", "a giant with heavy boots", "a ghost",
                         "a dragon with sharp teeth", "a witch"))
    monster = monster if hero.noun != "dragon" and guest.noun != "dragon" else "a ghost"
    begin(tale, tale.pick(("careful", "sleepy", "curious", "brave")),
          tale.pick(("liked to sleep late", "had a soft bed under the window", "always slept with one eye open",
                     "loved quiet nights")))
    tale.paragraph()
    tale.add(f"One night, a noise woke {hero} up. {sound}! It came from outside.",
             f"{sound}! One night, {hero} sat up in bed. What was that?")
    tale.speak(hero, f"It must be {monster}.", "shy", pronoun=tale.chance(0.5))
    tale.add(f"{hero.He} pulled the blanket over {hero.his} head. But there it was again: {sound.lower()}!",
             f"{hero.He} held {hero.his} breath. {sound}! Now it was even louder.")
    light = tale.pick(("a lantern", "a candle", "a little lamp"))
    tale.add(f"At last {hero} took {light} and opened the door, very slowly.",
             f"Then {hero} lit {light} and tiptoed to the door.")
    tale.paragraph()
    tale.add(f"There was no {monster.split(' ')[1]}. There was only {guest.full}, who {reason}.",
             f"In the light sat {a('little ' + guest.noun)}. It was not {monster} at all. It was {guest}, who "
             f"{reason}.")
    tale.speak(guest, tale.pick(("I did not want to scare you.", "Please don't be angry.",
                                 "I thought there was a monster in there.")), "shy")
    tale.add(f"{hero} began to laugh, and then {guest} laughed, too.", f"{hero} had to laugh at {hero.himself}.")
    tale.speak(hero, tale.pick(("Come in and warm up.", "Come in.", "You can stay with me tonight.")), "kind",
               more=tale.pick((f"There is still some {tale.pick(words.DISHES)}.", "My bed is big enough for two.", "")))
    tale.add("Soon they were both asleep, and the night was quiet again.",
             f"{guest} stayed until the morning, and they became friends.")
    finish(tale, "In the light, most monsters are very small.", f"When {hero} heard a noise again, {hero.he} only "
           "smiled and put on the kettle.", "It is better to look than to be afraid.",
           f"From then on, {hero} kept {light} beside the bed, in case a friend came by.")


def truth(tale: Tale) -> None:
    """Something of a parent's breaks; hiding it weighs more than telling."""
    hero = tale.hero
    parent = tale.pick(("mother", "father", "grandmother", "grandfather"))
    he = "she" if parent.endswith("mother") else "he"
    item, cause = tale.pick((("blue vase", "kicked a ball through the room"), ("big mirror", "danced with a broom"),
                             ("favorite cup", "jumped on the table"), ("glass bowl", "ran around the corner too fast"),
                             ("old clock", "climbed on the shelf"), ("flower pot", "chased a fly")))
    hide = tale.pick(("under the bed", "behind the curtain", "in the garden", "under a heap of leaves",
                      "in an old box"))
    blame = tale.pick(("the wind", "the cat", "a bird", "nobody"))
    begin(tale, tale.pick(("wild", "lively", "cheerful", "playful")),
          tale.pick((f"loved {hero.his} {parent}", "could never sit still", "liked to jump and run")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} {cause}. Crash! {hero.His} {parent}'s {item} lay in pieces on the floor.",
             f"{one_day(tale)}, {hero} {cause} and broke the {item} that {hero.his} {parent} loved so much.")
    tale.add(f"{hero.He} quickly hid the pieces {hide}.", f"Nobody had seen it, so {hero.he} put the pieces {hide}.")
    tale.speak(f"{hero.his} {parent}", f"Where is my {item}?", "ask")
    if blame == "nobody":
        tale.speak(hero, "I don't know.", "shy")
    else:
        tale.speak(hero, f"I think it was {blame}.", "shy")
    tale.paragraph()
    tale.add(f"But that night {hero} could not sleep. The lie lay on {hero.his} heart like a stone.",
             f"After that, nothing was fun anymore. Even {tale.pick(words.DISHES)} did not taste good.")
    tale.maybe(0.6, f"{hero.He} thought of the pieces {hide}.", f"Every time {hero.he} closed {hero.his} eyes, "
               f"{hero.he} saw the {item}.")
    tale.add(f"In the morning {hero} went to {hero.his} {parent} with the pieces in {hero.his} hands.",
             f"At last {hero} got up, fetched the pieces from their hiding place and went to {hero.his} {parent}.")
    blamed = "" if blame == "nobody" else f"It was not {blame}."
    tale.speak(hero, "I broke it.", "sad",
               more=f"{blamed} {tale.pick(('It was me.', 'I am sorry.', 'I should have told you.'))}".strip())
    tale.add(f"{hero.His} {parent} was quiet for a moment. Then {he} hugged {hero.him}.",
             f"{hero} waited for angry words, but {hero.his} {parent} smiled.")
    tale.speak(f"{hero.his} {parent}", tale.pick((f"A {item} can be replaced.", "Thank you for telling me.",
                                                  "That took courage.")).replace("A old", "An old"), "kind",
               more=tale.pick(("The truth is worth much more.", "You are more important to me.", "")))
    tale.add(f"Together they glued the pieces, and {hero} felt as light as a feather.",
             f"They swept up the rest together, and {hero} promised to play outside from now on.")
    finish(tale, "A lie is heavy, and the truth makes you light.", f"That night, {hero} slept better than ever before.",
           f"From that day on, {hero} always told the truth, even when it was hard.",
           "Everyone breaks something once. What counts is what you do next.")


BUILDERS = {"fly": "carried the ropes across", "climb": "tied the ropes high up in the trees",
            "swim": "pushed the logs through the water", "dig": "dug holes for the posts",
            "strong": "carried the heaviest logs", "small": "tied the smallest knots",
            "quick": "ran back and forth with the tools"}


def bridge(tale: Tale) -> None:
    """Two neighbors alone cannot do it; each gift is needed to build what connects them."""
    hero = tale.hero
    first, second = tale.friend(animal=True), tale.friend(animal=True)
    tries = 0
    while second.kind.can == first.kind.can and tries < 4:
        tale.names.discard(second.name)
        tale.nouns.discard(second.noun)
        second, tries = tale.friend(animal=True), tries + 1
    water = tale.pick(("river", "stream", "creek"))
    far = tale.pick(("the berry bushes", "the school", "the market", "the sunny meadow",
                     "the other half of the village"))
    begin(tale, tale.pick(("clever", "busy", "friendly", "helpful")),
          tale.pick((f"had two neighbors, {first.full} and {second.full}", f"knew {first.full} and {second.full} well",
                     f"was a friend of {first.full} and {second.full}")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, a flood washed away the bridge over the {water}. Now nobody could get to {far}.",
             f"{one_day(tale)}, the old bridge over the {water} broke. {far[0].upper() + far[1:]} lay on the other "
             "side.")
    tale.speak(first, "I will build a new bridge all alone.", "proud")
    tale.add(f"But {first.he} soon got tired, and the first log floated away.",
             f"{first.He} worked until noon, but then everything fell into the water.")
    tale.speak(second, "Let me do it.", "proud", more="I am much better at this.")
    tale.add(f"But that did not work, either. {second} sat down on the bank, wet from head to toe.",
             f"But {second.he} did not get any farther than {first}.")
    tale.paragraph()
    tale.speak(hero, tale.pick(("Each of you can do something.", "Nobody can do everything.")), "wise",
               more=tale.pick(("Let's do it together.", "What if we all work together?")))
    tale.add(f"So {first} {BUILDERS[first.kind.can]}, {second} {BUILDERS[second.kind.can]}, and {hero} told everyone "
             "what came next.", f"{first} {BUILDERS[first.kind.can]}. {second} {BUILDERS[second.kind.can]}. And {hero} "
             "laid the planks, one by one.")
    tale.add(f"After {tale.pick(('two', 'three', 'four'))} days the new bridge was ready.",
             "By evening the new bridge stood strong and straight.")
    tale.add(f"{hero}, {first} and {second} walked across it side by side.",
             f"They crossed it all together and had a feast at {far}." if "village" not in far and "school" not in far
             else f"They crossed it all together, and {hero} cheered.")
    tale.speak(tale.pick((first, second)), tale.pick(("Alone I could never have done it.", "This is our bridge.")),
               "glad")
    finish(tale, "Many hands make light work.", "Together they could do what nobody could do alone.",
           f"They called it the Bridge of Friends, and it still stands over the {water} today.",
           f"Since then, {first} and {second} have never worked alone again.")
