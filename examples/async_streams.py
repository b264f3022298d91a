"""Several asyncio tasks share one generator: each reads the events of its own request while all run in one batch."""

import asyncio

from qinfer import Generator, Model, SamplingParams
from qinfer.assets import STORYTELLER

generator = Generator(Model.load(STORYTELLER), max_tokens=2048)


async def tell(prompt: str) -> str:
    text = prompt
    async for event in generator.astream(prompt, SamplingParams(max_new_tokens=40, seed=1)):
        text += event.text
    return text


async def main() -> None:
    for story in await asyncio.gather(*(tell(prompt) for prompt in ("There was once a girl", "Once upon a time"))):
        print(story, end="\n\n")


asyncio.run(main())
