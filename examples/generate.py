"""Complete two prompts in one batch: greedy, then sampled with a seed."""

from qinfer import Generator, Model, SamplingParams
from qinfer.assets import STORYTELLER

model = Model.load(STORYTELLER)
generator = Generator(model, max_tokens=2048)
prompts = ["Once upon a time", "One day, a little fox"]

for completion in generator.generate(prompts, SamplingParams(temperature=0, max_new_tokens=60)):
    print(f"{completion.text!r} ({completion.finish_reason}, {len(completion.token_ids)} tokens)")

params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_new_tokens=60)
print(generator.generate(prompts[0], params).text)
