"""Stories about company: sharing, welcoming, celebrating, competing, quarrelling, giving shelter."""

# Prose is filled like prose:
# fmt: off
from __future__ import annotations

import words
from opening import begin, finish, one_day
from tale import Tale, Who, a, count, plural


def hungry(tale: Tale) -> None:
    """The hero gives its food away, one piece at a time, and does not stay hungry."""
    hero = tale.hero
    fruit = tale.pick(words.FRUIT)
    number = tale.pick((2, 2, 3))
    begin(tale, tale.pick(("kind", "generous", "gentle", "friendly")),
          tale.pick((f"loved {plural(fruit)}", f"liked {plural(fruit)} more than any other food", "loved long walks",
                     "liked to have a picnic")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} put {count(number, fruit)} in a basket and set out for a picnic.",
             f"{one_day(tale)}, {hero} packed {count(number, fruit)} for lunch and went for a walk.")
    guests = [tale.friend() for _ in range(number)]
    spots = tale.sample(tale.setting.spots, number)
    for left, (guest, spot) in enumerate(zip(guests, spots, strict=True), start=1):
        _give(tale, guest, spot, fruit, number - left)
    tale.paragraph()
    tale.add(f"Now the basket was empty, and {hero} was hungry too. {hero.He} sat down under "
             f"{tale.pick(tale.setting.trees)}.", f"Then {hero.his} own stomach began to growl, but there was nothing "
             f"left. {hero} sat down and sighed.")
    both = " and ".join(guest.name for guest in guests) if number == 2 else f"{guests[0]}, {guests[1]} and {guests[2]}"
    dish = tale.pick(words.DISHES)
    tale.add(f"Soon {hero.he} heard footsteps. It was {both}, and they carried a big pot of {dish}." if "pie" not in
             dish and "bread" not in dish else f"Soon {hero.he} heard footsteps. It was {both}, and they carried a "
             f"basket that smelled of {dish}.", f"Just then {both} came back together. They had brought {dish}.")
    tale.speak(guests[0], tale.pick(("You shared with us.", "You gave us all you had.")), "kind",
               more=tale.pick(("Now we share with you.", "Now it is our turn.")))
    tale.add("They all ate together until the sun went down.", f"So {hero} had a picnic after all, and it was the best "
             "one ever.", f"There was enough for everyone, and {hero} ate two plates.")
    finish(tale, "What you give away comes back to you.", "A meal tastes best when it is shared.",
           f"{hero} had gone out with {count(number, fruit)} and come home with {count(number, 'friend')}.",
           f"From then on, they met every week, and someone always brought {plural(fruit)}.")


def _give(tale: Tale, guest: Who, spot: str, fruit: str, left: int) -> None:
    hero = tale.hero
    tale.add(f"{spot}, {hero.he} met {guest.full}, who looked tired and hungry.",
             f"{spot} sat {guest.full}, looking very sad.", f"{hero} had not gone far when {hero.he} saw {guest.full} "
             f"{spot}.", f"Then {guest.full} came by and looked at the basket.")
    if tale.chance(0.6):
        tale.speak(guest, tale.pick(("I have not eaten all day.", "I am so hungry.", "My stomach is empty.",
                                     "I forgot my lunch.")), "sad")
    else:
        tale.speak(guest, tale.pick((f"May I have {a(fruit)}?", f"Is that {a(fruit)}?", "What smells so good?")), "ask")
    rest = f"Now there {'was' if left == 1 else 'were'} {count(left, fruit)} left."
    tale.add(f"{hero} gave {guest.him} {a(fruit)}. {rest}", f"{hero} took out {a(fruit)} and gave it to {guest}. "
             f"{rest}")


def newcomer(tale: Tale) -> None:
    """Somebody new is too shy to play, until something only the newcomer can do is needed."""
    hero, new = tale.hero, tale.friend()
    game = tale.pick(words.GAMES)
    do, _, doing, wonder = tale.pick(words.SKILLS)
    verb = {"sing": "sang", "draw": "drew", "juggle": "juggled", "whistle": "whistled", "tell stories": "told",
            "build towers": "built", "fold paper": "folded"}[do]
    begin(tale, tale.pick(("friendly", "lively", "cheerful", "kind")),
          tale.pick((f"loved to play {game}", f"played {game} with the others every day", "had many friends",
                     "knew everyone")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, somebody new came to {tale.place}. It was "
             f"{new.a if not new.child else f'{a(new.noun)} named {new}'}.",
             f"{one_day(tale)}, a new family moved to {tale.place}. They had a {'daughter' if new.female else 'son'} "
             f"named {new}." if new.child else f"{one_day(tale)}, {new.a} moved to {tale.place}.")
    tale.add(f"{new} was very shy. {new.He} sat {tale.pick(tale.setting.spots)} and watched the others play.",
             f"{new} did not know anyone. When the others played, {new.he} stood {tale.pick(tale.setting.spots)} and "
             "said nothing.")
    tale.speak(hero, tale.pick((f"Do you want to play {game} with us?", "Would you like to play with us?")), "ask")
    tale.add(f"But {new} only shook {new.his} head.", f"{new} looked at {new.his} feet and did not answer.",
             f"{new} turned red and ran away.")
    if tale.chance(0.5):
        tale.add(f"The next day {hero} tried again. {hero.He} brought {new} {a(fruit := tale.pick(words.FRUIT))}.")
        tale.speak(new, "Thank you.", "shy")
        tale.add("It was only two words, but it was a start.", f"Then {new} ate the {fruit} and almost smiled.")
    tale.paragraph()
    tale.add(f"Then, one {tale.pick(('evening', 'afternoon', 'morning'))}, {hero} heard something and looked around "
             "the corner. There was " f"{new}, {doing} all alone.", "A few days later it rained, and nobody could "
             f"play {game}. Everyone was bored. Then {hero} saw that {new} was {doing}.")
    tale.speak(hero, tale.pick(("That is wonderful!", "You are so good at that!", "How do you do that?",
                                "I wish I could do that!")), "cry")
    tale.speak(hero, tale.pick(("Will you show us?", "Can you show the others?", "Would you teach me?")), "ask",
               pronoun=True)
    tale.speak(new, tale.pick(("If you stay beside me.", "I can try.", "Do you think they will like it?")), "shy")
    tale.add(f"{hero} called all the others, and {new} {verb} {wonder}.",
             f"So {new} took a deep breath and {verb} {wonder}.")
    tale.add("Everyone clapped and cheered.", "Nobody said a word at first. Then everybody cheered.",
             "They all wanted to learn it.")
    tale.add(f"After that, {new} was not shy anymore, and {new.he} was the best of all at {game}.",
             f"{new} laughed out loud. The next day {new.he} played {game} with the others.",
             f"{new} taught {hero} {'how to ' + do}, and {hero} taught {new} {'how to play ' + game}.")
    finish(tale, "Some friends need a little time.", f"And whenever somebody new came to {tale.place}, {new} was the "
           "first to say hello.", "Everyone can do something special.",
           f"{hero} was glad that {hero.he} had asked again.")


HIDDEN = (("something round", "a big chocolate cake"), ("something long", "a wooden flute"),
          ("something red", "a red balloon"), ("something that jingled", "a string of little bells"),
          ("something soft", "a warm blue scarf"), ("something that smelled sweet", "a basket of honey cookies"),
          ("something flat", "a picture of all of them"), ("something that rattled", "a box of colored pencils"),
          ("something green", "a young rose bush in a pot"))


def birthday(tale: Tale) -> None:
    """Everybody is too busy for the hero's birthday and hides something; in the evening the hero learns what."""
    hero = tale.hero
    first, second = tale.friend(), tale.friend()
    (hint1, gift1), (hint2, gift2) = tale.sample(HIDDEN, 2)
    begin(tale, tale.pick(("cheerful", "merry", "friendly", "")),
          tale.pick((f"had two good friends, {first.full} and {second.full}",
                     f"was best friends with {first} and {second}", f"spent every day with {first} and {second}")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, {hero} woke up and jumped out of bed. It was {hero.his} birthday!",
             f"{'' if tale.started else 'Then '}{hero.his if not tale.started else hero.His} birthday came. {hero} was "
             "so excited that " f"{hero.he} forgot to eat breakfast." if not tale.started else
             f"It was {hero.his} birthday, and {hero} was very excited.")
    tale.add(f"{hero.He} ran to {first}, but {first} was hiding {hint1} behind {first.his} back.",
             f"First {hero.he} met {first}, who quickly hid {hint1} behind {first.his} back.")
    tale.speak(first, tale.pick(("I have no time today.", "I can't play now.", "I am very busy.")), "plain",
               more=tale.pick(("", "Maybe tomorrow.", "I must go.")))
    tale.add(f"Then {hero} went to {second}. {second} was carrying {hint2} under a cloth.",
             f"So {hero} went to see {second}, but {second} pushed {hint2} under the table.")
    tale.speak(second, tale.pick(("Not today!", "Please come back later!", "You can't come in now!")), "cry")
    tale.paragraph()
    tale.add(f"{hero} walked home slowly. Nobody remembered {hero.his} birthday.",
             f"{hero} sat {tale.pick(tale.setting.spots)} for a long time. A tear rolled down {hero.his} cheek.")
    tale.speak(hero, tale.pick(("They have all forgotten me.", "Nobody thought of me.")), "sad")
    tale.add(f"When the sun went down, {hero.he} opened the door. It was dark inside. Then a hundred little lights "
             "went on.", f"But when {hero.he} came home, there were lights in every window. {hero} pushed the door "
             "open.")
    tale.add(f'"Surprise!" shouted {first} and {second}.', f'"Happy birthday, {hero}!" called {first} and {second}.')
    tale.add(f"{first} gave {hero.him} {gift1}, and {second} gave {hero.him} {gift2}.",
             f"Now {hero} saw what {first} had hidden: it was {gift1}. And {second} had brought {gift2}.",
             f"{first}'s secret was {gift1}, and {second}'s secret was {gift2}.")
    tale.speak(hero, "I thought that you had forgotten me.", "glad")
    tale.speak(tale.pick((first, second)), tale.pick(("We could never forget you.", "How could we forget you?")),
               "kind")
    finish(tale, "It was the best birthday of all.", f"They danced and sang until {hero} could not keep {hero.his} "
           "eyes open.", f"That day, {hero} learned not to give up on {hero.his} friends too soon.",
           "Good friends can keep a secret.")


def contest(tale: Tale) -> None:
    """A proud rival stumbles over a flaw; the hero wins, or loses and is richer for it."""
    hero, rival = tale.hero, tale.friend()
    event, prize = tale.pick((("a race", "a golden cup"), ("a race around the hill", "a basket of apples"),
                              ("a cake contest", "a silver spoon"), ("a kite contest", "a blue ribbon"),
                              ("a boat race", "a little flag"), ("a singing contest", "a wreath of flowers")))
    begin(tale, tale.pick(("slow but patient", "hard-working", "quiet", "modest", "small but brave")),
          tale.pick((f"wanted to take part in {event}", f"dreamed of winning {event}")))
    tale.paragraph()
    boast = tale.pick(("I am the best of all.", "Nobody can beat me.", "The prize is as good as mine.",
                       "I don't need to practice."))
    tale.add(f"{rival.full} wanted to win, too.", f"But there was also {rival.full}, who had won the year before.")
    tale.speak(rival, boast, "proud")
    practice = {"a race": "ran up and down the hill", "a race around the hill": "ran around the hill",
                "a cake contest": "baked a small cake", "a kite contest": "flew a kite on the hill",
                "a boat race": "rowed across the water", "a singing contest": "sang to the birds"}[event]
    tale.add(f"{hero} said nothing, but every morning {hero.he} {practice}.",
             f"{hero} {practice} day after day, while {rival} slept in the shade.")
    tale.paragraph()
    tale.add(f"{one_day(tale) if not tale.started else 'A week later'}, it was time. Everyone had come to watch.",
             "At last the day of the contest came. There were flags everywhere.")
    fall, want = {"a race": ("ran so fast that {he} fell into a ditch", "My foot hurts"),
                  "a race around the hill": ("stopped halfway to wave at everyone and twisted {his} foot",
                                             "My foot hurts"),
                  "a cake contest": ("forgot {his} cake in the oven, and it burned", "My cake is black"),
                  "a kite contest": ("pulled so hard that {his} string broke", "My string is broken"),
                  "a boat race": ("rowed so wildly that {his} boat began to leak", "My boat is sinking"),
                  "a singing contest": ("sang so loudly that {he} lost {his} voice", "I can only whisper")}[event]
    fall = fall.replace("{he}", rival.he).replace("{his}", rival.his)
    tale.add(f"But {rival} {fall}.", f"Everything went well until {rival} {fall}.")
    tale.speak(rival, f"{want}!", "sad")
    if tale.chance(0.55):
        tale.add(f"{hero} could have won easily now. But {hero.he} stopped and went to help {rival}.",
                 f"{hero} looked at the prize, and then {hero.he} looked at {rival}. {hero.He} turned around and "
                 f"helped {rival.him}.")
        tale.speak(rival, tale.pick(("Why did you help me?", "Why didn't you go on and win?")), "ask")
        tale.speak(hero, tale.pick(("A prize can't laugh or play with me.", "You needed help.",
                                    "A friend is better than a prize.")), "kind")
        tale.add(f"In the end neither of them won, but the judge gave {hero} {prize} for a good heart.",
                 f"Somebody else won that day, but {rival} brought {hero} a prize of {rival.his} own: "
                 f"{tale.pick(words.DISHES)}.")
        finish(tale, f"From that day on, {rival} never boasted again.", "Kindness is the finest prize.",
               f"{hero} and {rival} practiced together every morning after that.")
    else:
        tale.add(f"{hero} went on calmly, just as {hero.he} had practiced, and won {prize}.",
                 f"{hero} did not hurry and made no mistakes. The judge gave {hero.him} {prize}.")
        tale.speak(rival, "You earned it.", "plain", more=tale.pick(("I should have practiced.", "Will you teach me?")))
        finish(tale, "Those who practice need not boast.", f"The next year, {hero} and {rival} practiced together.",
               f"{hero} kept {prize} for many years and let {rival} hold it whenever {rival.he} "
               "liked.".replace("kept a ", "kept the "))


def quarrel(tale: Tale) -> None:
    """Two friends want the same thing; alone it is no fun; they find a way that suits the thing."""
    hero, friend = tale.hero, tale.friend()
    thing, rule = tale.pick((("swing", "one pushed while the other one flew through the air"),
                             ("ball", "one threw it and the other one caught it"),
                             ("seesaw", "one went up when the other one went down"),
                             ("sled", "one sat in front and the other one sat behind"),
                             ("little boat", "one rowed while the other one steered"),
                             ("jump rope", "one turned the rope while the other one jumped"),
                             ("drum", "one drummed while the other one danced"),
                             ("wagon", "one pulled while the other one rode")))
    begin(tale, tale.pick(("stubborn", "lively", "cheerful", "")),
          tale.pick((f"had a best friend named {friend}", f"was best friends with {friend.full}",
                     f"played with {friend.full} every day")))
    tale.paragraph()
    tale.add(f"{one_day(tale)}, they found {a(thing)} {tale.pick(tale.setting.spots)}.",
             f"{one_day(tale)}, somebody gave them {a(thing)}.", f"{one_day(tale)}, the two of them made {a(thing)}.")
    tale.speak(hero, tale.pick(("I want it first!", "It is mine!", "I saw it first!")), "cry")
    tale.speak(friend, tale.pick(("No, it is mine!", "No, I want it!", "That is not fair!")), "cry")
    tale.add(f"They pulled and shouted until {friend} ran home in tears.",
             f"They shouted at each other, and {friend} went away angrily.",
             f"In the end {friend} turned around and went home without a word.")
    tale.add(f"Now {hero} had the {thing} all to {hero.himself}.")
    tale.paragraph()
    alone = {"swing": "there was nobody to push", "ball": "nobody threw it back",
             "seesaw": "it would not move with only one", "sled": "it was quiet and cold all alone",
             "little boat": "it only went around in circles", "jump rope": "there was nobody to turn it",
             "drum": "nobody danced to it", "wagon": "there was nobody to pull"}[thing]
    tale.add(f"{hero.He} tried to play, but {alone}. It was no fun at all.",
             f"But {alone}. Soon {hero.he} was bored and sad.")
    tale.speak(hero, tale.pick((f"I would rather have {friend} than a {thing}.", "What good is it without my friend?",
                                "I was not very nice.")), "sad", pronoun=True)
    tale.add(f"So {hero.he} went to {friend}'s house and knocked on the door.",
             f"{hero.He} went to look for {friend} and found {friend.him} {tale.pick(tale.setting.spots)}.")
    tale.speak(hero, "I am sorry.", "sad", more=tale.pick(("You can have it first.", f"The {thing} is for both of us.",
                                                           f"Let's share the {thing}.")), pronoun=tale.chance(0.5))
    tale.speak(friend, tale.pick(("I am sorry, too.", "I missed you.", "Let's go back together.")), "glad")
    tale.add(f"Now they took turns: {rule}.", f"From then on, {rule}, and then they changed places.")
    finish(tale, "That was twice as much fun.", f"A {thing} is only a {thing}, but a friend is a friend.",
           f"{hero} and {friend} never fought over the {thing} again.", "Shared joy is double joy.")


def storm(tale: Tale) -> None:
    """A storm fills a small house, guest by guest; afterwards the guests mend what it broke."""
    hero = tale.hero
    tale.weather = tale.pick(("gray", "windy"))
    dish = tale.pick(words.DISHES)
    wild = tale.pick((("storm", "rain", "The rain beat on the roof"),
                      ("storm", "wind", "The wind howled around the walls"),
                      ("snowstorm", "snow", "The snow fell thick and fast") if tale.setting is not words.JUNGLE else
                      ("thunderstorm", "rain", "The thunder rolled and the rain poured down")))
    begin(tale, tale.pick(("kind", "tidy", "quiet", "generous", "friendly")),
          tale.pick(("liked a warm, quiet evening", "had the coziest home of all", f"loved to cook {dish}")))
    guests = [tale.friend(animal=True) for _ in range(tale.pick((2, 2, 2, 3)))]
    tale.paragraph()
    tale.add(f"One evening, a terrible {wild[0]} began. {wild[2]}.",
             f"One night, there was a great {wild[0]}. {wild[2]}.")
    tale.add(f"{hero} was just about to eat when somebody knocked at the door.",
             "Knock, knock! Somebody was at the door.")
    asks = tale.sample(("My home is full of water.", "The roof of my house is gone.", "I am wet and cold.",
                        "I can't find my way home.", "It is so dark outside."), 3)
    for index, guest in enumerate(guests):
        if index:
            tale.add("Then there was another knock.", "Soon somebody else knocked.",
                     "A little later, there was a scratching at the door.")
        tale.add(f"It was {guest.full}.", f"Outside stood {guest.full}, shivering.", f"There stood {guest.full}.")
        tale.speak(guest, asks[index], "sad", more=tale.pick(("May I come in?", "Can I stay here?", "")))
        tale.speak(hero, tale.pick(("Come in!", "Come in quickly!", "Of course, come in!",
                                    "There is always room for one more!")), "kind")
        tale.maybe(0.6, f"Now there were {words.NUMBERS[index + 2]} of them in the little room.")
    tale.paragraph()
    tale.add(f"It was a tight fit, but it was warm. {hero} made {dish}, and they told stories all night.",
             f"{hero} shared {hero.his} {dish} and {hero.his} blankets with {'both' if len(guests) == 2 else 'all'} of "
             "them.", f"They ate {dish} and sang so loudly that nobody heard the {wild[1]} anymore.")
    helper = tale.pick(guests)
    tale.add(f"In the morning the {wild[0]} was over. But there was a hole in the roof of the house!",
             f"When the sun rose, the sky was blue. But the {wild[0]} had broken {hero.his} door.")
    flaw = "roof" if "roof" in tale.parts[-1] else "door"
    tale.speak(helper, tale.pick(("You helped us.", "You let us in.")), "plain",
               more=tale.pick(("Now we will help you.", "Now it is our turn to help.")))
    tale.add(f"Together they mended the {flaw} before noon.", f"They all worked together, and soon the {flaw} was "
             "better than before.")
    finish(tale, f"And whenever a storm came, {hero} put {words.NUMBERS[len(guests) + 1]} cups on the table.",
           "A small house is big enough for good friends.", "There is always room where there is a warm heart.",
           f"{hero} was never lonely again.")
