"""Stream two requests side by side: submit, step, print each event as it comes."""

from qinfer import Generator, Model, SamplingParams
from qinfer.assets import STORYTELLER

generator = Generator(Model.load(STORYTELLER), max_tokens=2048)
prompts = ["There was once a girl named Mia", "Once upon a time"]
jobs = {generator.submit(text, SamplingParams(max_new_tokens=40, seed=1)).id: text for text in prompts}

while jobs:
    for event in generator.step():
        print(f"[{event.job}] {event.text!r}")
        if event.completion is not None:
            print(f"[{event.job}] {jobs.pop(event.job)}{event.completion.text}")
