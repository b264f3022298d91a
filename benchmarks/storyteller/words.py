"""The words of the little world: names, kinds, places and things, with the properties that plots depend on."""
# Tables are filled like prose:
# fmt: off

from __future__ import annotations

from typing import NamedTuple

GIRLS = ["Mia", "Anna", "Lily", "Rosa", "Clara", "Nora", "Ella", "Ivy", "Ruby", "Maya", "Sara", "Tilda", "Wren",
         "Hazel", "Poppy", "Daisy", "Luna", "Nina", "Zoe", "Amy", "Lucy", "Molly", "Penny", "Tess", "Flora", "Greta",
         "Ida", "Juno", "Kira", "Lena", "Mabel", "Nell", "Olive", "Pearl", "Rita", "Sofia", "Stella", "Thea", "Una",
         "Vera", "Willa", "Yara", "Zara", "Alma", "Beth", "Cora", "Dora", "Elsa", "Fern", "Gwen", "Hana", "Iris",
         "Jade", "Kate", "Lola", "Mina", "Opal", "Petra", "Robin", "Sunny", "Tansy", "Violet", "Winnie", "Bella", "Ada",
         "Elly", "Marta", "Suki", "Leila"]
BOYS = ["Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Oscar", "Jack", "Theo", "Noah", "Hugo", "Emil", "Felix", "Otto",
        "Milo", "Arlo", "Bruno", "Casper", "Dan", "Eli", "Fritz", "Gus", "Henry", "Ivan", "Jonas", "Karl", "Luca",
        "Martin", "Nico", "Omar", "Paul", "Quinn", "Ravi", "Simon", "Toby", "Umar", "Victor", "Walter", "Yusuf", "Zack",
        "Albie", "Bo", "Charlie", "Dexter", "Edgar", "Frank", "Gil", "Harry", "Igor", "Jasper", "Kit", "Liam", "Moss",
        "Ned", "Oliver", "Pip", "Rex", "Sol", "Tim", "Ugo", "Vinny", "Will", "Bobby", "Alfie", "Barney", "Rufus",
        "Jamie", "Kenji", "Mateo"]
PETS = ["Bramble", "Nutmeg", "Pepper", "Biscuit", "Button", "Clover", "Acorn", "Maple", "Rusty", "Patch", "Dusty",
        "Pebble", "Thistle", "Bumble", "Cricket", "Mossy", "Tumble", "Whisker", "Twig", "Sprout", "Pickle", "Waffle",
        "Ginger", "Muffin", "Cinder", "Puddle", "Scout", "Teasel", "Bracken", "Sorrel", "Plum", "Tuppence", "Fidget",
        "Flick", "Dash", "Snowy", "Honey"]
STARTS = "Bri Ta Lo Me Ka Sil Tor Va Ne Fa Do Jo Ri Mo El Wi Pa Zo Ha Gre Ol Su Ber Ti Yo".split()  # noqa: SIM905
MIDDLES = "l r n v m s d k b ll nn rr t".split()  # noqa: SIM905
ENDS_HER = "a ia ina ela y ie ette issa ora una".split()  # noqa: SIM905
ENDS_HIM = "o in us en ock ard is el on ek".split()  # noqa: SIM905


class Kind(NamedTuple):
    noun: str
    can: str  # what it is good at: fly, climb, swim, dig, strong, small or quick
    young: str = ""  # how it may be called when it is a child of its kind


def _kinds(text: str) -> tuple[Kind, ...]:
    kinds = []
    for entry in text.split(","):
        noun, can = entry.strip().split(":")
        kinds.append(Kind(noun, can))
    return tuple(kinds)


class Setting(NamedTuple):
    where: tuple[str, ...]  # completes "lived ..."
    name: tuple[str, ...]  # "the forest"
    homes: tuple[str, ...]  # "a cozy burrow"
    trees: tuple[str, ...]
    waters: tuple[str, ...]
    spots: tuple[str, ...]  # where one may look for something
    marks: tuple[str, ...]  # landmarks on a path, without an article
    folk: tuple[Kind, ...]
    children: float  # share of heroes who are children


FOREST = Setting(("in a quiet forest", "at the edge of a green forest", "deep in the forest",
                  "in a forest full of tall trees"), ("the forest", "the woods"),
                 ("a cozy burrow", "a hollow tree", "a little house under the roots", "a small hut with a round door"),
                 ("the old oak", "the tall pine", "the crooked birch", "the great beech", "the chestnut tree"),
                 ("the stream", "the pond", "the brook", "the little lake"),
                 ("behind the mossy rocks", "under the ferns", "inside the hollow log", "in the clearing",
                  "among the blackberry bushes", "beside the old stone wall", "in the tall grass",
                  "under a heap of leaves"), ("fallen log", "ring of red mushrooms", "crooked birch", "stone bridge",
                                              "old well", "rock shaped like a bear", "patch of bluebells", "split pine",
                                              "wooden gate", "hollow stump"),
                 _kinds("fox:quick, rabbit:dig, hedgehog:small, mouse:small, owl:fly, squirrel:climb, badger:dig, "
                        "otter:swim, frog:swim, mole:dig, " "beaver:swim, raccoon:climb, deer:quick, sparrow:fly, "
                        "crow:fly, bear:strong, turtle:swim, robin:fly, hare:quick, moose:strong"), 0.15)
FARM = Setting(("on a small farm", "on a farm between two hills", "on an old farm at the end of the road",
                "on a farm with a red barn"), ("the farm",),
               ("a warm corner of the barn", "a little shed behind the barn", "a small house by the field",
                "a snug stable"),
               ("the apple tree", "the old pear tree", "the tall poplar", "the cherry tree", "the walnut tree"),
               ("the duck pond", "the creek", "the fish pond", "the stream behind the barn"),
               ("behind the barn", "in the hayloft", "under the wheelbarrow", "in the cornfield",
                "beside the chicken coop", "near the scarecrow", "between the pumpkins", "along the fence"),
               ("red barn", "scarecrow", "hay wagon", "windmill", "broken fence", "row of beehives", "stone trough",
                "white gate", "sunflower field", "old plow"),
               _kinds("cat:climb, dog:dig, goat:climb, pony:strong, duck:swim, pig:dig, calf:strong, goose:swim, "
                      "donkey:strong, mouse:small, " "lamb:quick, hen:small, swallow:fly, pigeon:fly, rabbit:dig, "
                      "sheepdog:quick"), 0.4)
VILLAGE = Setting(("in a small village", "in a village at the foot of a mountain", "in a sunny little town",
                   "in a village with one long street", "in a town with crooked roofs"), ("the village",),
                  ("a little house with a green door", "a small brick house", "a yellow house on the corner",
                   "a house above the bakery"),
                  ("the linden tree", "the tall maple", "the old chestnut tree", "the plum tree"),
                  ("the village pond", "the mill pond", "the canal", "the river"),
                  ("behind the bakery", "under the bench in the square", "beside the well", "in the school yard",
                   "near the church steps", "in the garden", "under the bridge", "by the market stalls"),
                  ("bakery", "clock tower", "stone well", "blue gate", "toy shop", "iron bridge", "post office",
                   "little chapel", "flower stall", "mill"),
                  _kinds("cat:climb, dog:dig, mouse:small, sparrow:fly, pigeon:fly, duck:swim, robot:strong, "
                         "pony:strong, squirrel:climb, hedgehog:small"), 0.8)
SEASIDE = Setting(("in a fishing village by the sea", "on a wide green bay", "on a little island",
                   "beside the sea", "in a white town above the harbor"), ("the beach", "the shore"),
                  ("a blue cottage", "an old boat turned upside down", "a hut made of driftwood",
                   "a little house near the lighthouse"),
                  ("the palm tree", "the bent pine on the cliff", "the fig tree", "the old willow"),
                  ("the bay", "the lagoon", "the harbor", "the inlet"),
                  ("under the rowing boat", "behind the dunes", "between the rocks", "on the pier",
                   "inside the old crate", "among the seashells", "beside the fishing nets", "near the lighthouse"),
                  ("lighthouse", "upturned boat", "heap of nets", "wooden pier", "flat black rock", "row of beach huts",
                   "rusty anchor", "tall dune", "driftwood fence", "little cave"),
                  _kinds("crab:small, gull:fly, seal:swim, otter:swim, turtle:swim, pelican:fly, cat:climb, dog:dig, "
                         "penguin:swim, puffin:fly, mouse:small, " "donkey:strong"), 0.6)
MOUNTAIN = Setting(("high in the mountains", "in a green valley between two mountains",
                    "on the side of a tall mountain", "in a valley full of flowers"), ("the valley",),
                   ("a warm cave", "a stone hut", "a small cabin", "a cave behind the waterfall"),
                   ("the lonely fir", "the twisted pine", "the old larch", "the tall spruce"),
                   ("the mountain lake", "the blue lake", "the cold stream", "the river"),
                   ("behind the waterfall", "under the big boulder", "in the high meadow", "beside the goat path",
                    "among the thistles", "at the mouth of the cave", "between the stones", "near the rope bridge"),
                   ("rope bridge", "tall cairn", "waterfall", "white boulder", "shepherd's hut", "narrow cave",
                    "meadow of thistles", "lonely fir", "frozen spring", "goat path"),
                   _kinds("dragon:fly, goat:climb, bear:strong, eagle:fly, hare:quick, marmot:dig, yak:strong, "
                          "mouse:small, otter:swim, fox:quick, crow:fly, " "lynx:climb"), 0.3)
JUNGLE = Setting(("in a green jungle", "beside a wide jungle river", "in a jungle full of flowers",
                  "where the jungle meets the river"), ("the jungle",),
                 ("a nest of soft leaves", "a hut on stilts", "a cave behind the vines", "a house in the treetops"),
                 ("the mango tree", "the tall palm", "the banana tree", "the giant fig tree"),
                 ("the river", "the lagoon", "the water hole", "the muddy pool"),
                 ("under the big leaves", "behind the vines", "beside the termite hill", "among the reeds",
                  "on the river bank", "between the roots", "near the old temple", "inside the hollow trunk"),
                 ("old temple", "termite hill", "hanging bridge", "giant fig tree", "field of reeds", "red rock",
                  "bamboo grove", "little waterfall", "stone face", "muddy bank"),
                 _kinds("monkey:climb, elephant:strong, parrot:fly, tiger:quick, turtle:swim, frog:swim, toucan:fly, "
                        "crocodile:swim, lizard:small, " "armadillo:dig, sloth:climb, hippo:strong"), 0.15)
SETTINGS = (FOREST, FOREST, FARM, VILLAGE, VILLAGE, SEASIDE, MOUNTAIN, JUNGLE)


class Thing(NamedTuple):
    noun: str
    looks: tuple[str, ...]  # adjectives, one is chosen for the whole story
    moves: str  # how it gets lost: light (the wind), shiny (a magpie), rolls, small (a hole in a bag)
    floats: bool
    breaks: str  # torn, cracked, wheel, stuck, string or ""


THINGS = (Thing("kite", ("red", "yellow", "paper", "striped"), "light", True, "torn"),
          Thing("scarf", ("blue", "green", "woolen", "striped"), "light", True, "torn"),
          Thing("hat", ("straw", "pointed", "yellow", "blue"), "light", True, "torn"),
          Thing("balloon", ("red", "silver", "green"), "light", True, ""),
          Thing("handkerchief", ("white", "silk", "spotted"), "light", True, "torn"),
          Thing("flag", ("red", "little", "striped"), "light", True, "torn"),
          Thing("feather", ("golden", "white", "long blue"), "light", True, ""),
          Thing("bell", ("silver", "little", "brass"), "shiny", False, "cracked"),
          Thing("key", ("golden", "brass", "tiny"), "shiny", False, ""),
          Thing("ring", ("silver", "golden", "copper"), "shiny", False, ""),
          Thing("spoon", ("silver", "tiny", "shiny"), "shiny", False, ""),
          Thing("locket", ("silver", "golden", "round"), "shiny", False, "stuck"),
          Thing("necklace", ("glass", "coral", "silver"), "shiny", False, "string"),
          Thing("marble", ("blue", "glass", "green"), "rolls", False, "cracked"),
          Thing("ball", ("red", "rubber", "bouncy", "striped"), "rolls", True, ""),
          Thing("hoop", ("wooden", "painted"), "rolls", True, "cracked"),
          Thing("cart", ("little", "wooden", "red"), "rolls", True, "wheel"),
          Thing("toy train", ("red", "wooden", "little"), "rolls", True, "wheel"),
          Thing("button", ("wooden", "shiny", "brass"), "small", False, ""),
          Thing("whistle", ("tin", "wooden", "silver"), "small", False, "stuck"),
          Thing("compass", ("brass", "old", "little"), "small", False, "stuck"),
          Thing("seashell", ("pink", "white", "tiny"), "small", False, "cracked"),
          Thing("coin", ("old", "golden", "copper"), "small", False, ""),
          Thing("flute", ("wooden", "little", "bamboo"), "small", True, "cracked"),
          Thing("music box", ("little", "painted", "old"), "", False, "stuck"),
          Thing("clock", ("little", "old", "wooden"), "", False, "stuck"),
          Thing("teddy bear", ("brown", "soft", "old"), "", True, "torn"),
          Thing("drum", ("red", "little", "round"), "rolls", True, "torn"),
          Thing("puppet", ("wooden", "funny", "little"), "", True, "string"),
          Thing("umbrella", ("yellow", "red", "big"), "light", True, "torn"),
          Thing("lantern", ("paper", "tin", "little"), "", False, "torn"),
          Thing("teapot", ("blue", "white", "flowered"), "", False, "cracked"),
          Thing("guitar", ("little", "old", "brown"), "", True, "string"),
          Thing("wagon", ("red", "wooden", "green"), "rolls", True, "wheel"))
MOVING = tuple(thing for thing in THINGS if thing.moves)
BREAKING = tuple(thing for thing in THINGS if thing.breaks)
PLAYTHINGS = tuple(thing for thing in THINGS if thing.noun in
                   ("kite", "ball", "drum", "toy train", "wagon", "hoop", "puppet", "umbrella", "cart", "flute",
                    "guitar", "balloon"))

FRUIT = ("apple", "pear", "plum", "peach", "carrot", "bun", "cookie", "pancake", "honey cake", "muffin", "orange",
         "turnip")
DISHES = ("vegetable soup", "pumpkin soup", "apple pie", "warm porridge", "berry pie", "hot stew", "honey bread",
          "mushroom soup")
GIVERS = ("grandmother", "grandfather", "father", "mother", "aunt", "uncle")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
MISFITS = ("an old boot", "a rusty nail", "a broken cup", "some dry leaves", "a pine cone", "a sleepy beetle",
           "a lost mitten", "a smooth gray stone", "a worm", "an empty jar", "a bent spoon", "a puzzled snail",
           "two ants and a crumb")
EXPERTS = ("tailor", "clockmaker", "carpenter", "potter", "toymaker")
GAMES = ("hide-and-seek", "tag", "leapfrog", "catch", "hopscotch", "follow-the-leader")
SKILLS = (("sing", "sang", "singing", "a song so lovely that even the birds stopped to listen"),
          ("draw", "drew", "drawing", "a picture of everyone laughing together"),
          ("juggle", "juggled", "juggling", "five pine cones at once without dropping any"),
          ("whistle", "whistled", "whistling", "a merry tune that made everyone tap their feet"),
          ("tell stories", "told", "telling stories", "a story about a whale that wanted to see the moon"),
          ("build towers", "built", "building towers", "a tower of stones taller than any of them"),
          ("fold paper", "folded", "folding paper", "a paper bird that really flew"))
WEATHER = {"sunny": ("sunny", "bright", "warm", "fine"), "windy": ("windy", "gusty", "blustery"),
           "gray": ("gray", "cloudy", "foggy"), "cold": ("cold", "frosty", "chilly")}
