"""Endless short stories: `story(seed)` tells the story that belongs to a seed, always the same one.

Seeds below `HELD_OUT` are for evaluation only; training counts up from there.
"""

from __future__ import annotations

import argparse
from random import Random

import plots_friends
import plots_roads
import plots_things
from tale import Tale

HELD_OUT = 100_000

PLOTS = (
    plots_things.lost, plots_things.lost, plots_things.broken, plots_things.trade, plots_things.seed,
    plots_friends.hungry, plots_friends.newcomer, plots_friends.birthday, plots_friends.contest, plots_friends.quarrel,
    plots_friends.storm, plots_roads.way_home, plots_roads.rescue, plots_roads.promise, plots_roads.fear,
    plots_roads.noise, plots_roads.truth, plots_roads.bridge,
)  # fmt: skip


def story(seed: int, plot: str | None = None) -> str:
    """Tell the story of a seed; `plot` fixes which kind of story it is."""
    rng = Random(seed)
    tell = PLOTS[int(rng.random() * len(PLOTS))]
    if plot is not None:
        tell = next(candidate for candidate in PLOTS if candidate.__name__ == plot)
    tale = Tale(rng)
    tell(tale)
    return tale.text()


def main() -> None:
    """Print some stories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--plot", choices=sorted({plot.__name__ for plot in PLOTS}))
    args = parser.parse_args()
    for seed in range(args.seed, args.seed + args.count):
        print(story(seed, args.plot), end="\n\n----\n\n")


if __name__ == "__main__":
    main()
