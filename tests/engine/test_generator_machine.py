from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qinfer.engine.job import Completion, Job
from qinfer.engine.sampling import SamplingParams
from qinfer.errors import NonFiniteLogits
from tests.engine.mock import TOKENIZER, MockModel, drain, expected, generator, is_idle, params


class GeneratorMachine(RuleBasedStateMachine):
    """Requests come, run, fail and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MockModel(tokenizer=TOKENIZER, eos_ids=[0, 1])
        self.gen = generator(self.model, max_tokens=48, max_batch=3, max_step_tokens=7)
        self.jobs: dict[int, tuple[Job, list[int], SamplingParams]] = {}
        self.texts: dict[int, str] = {}

    @rule(
        prompt=st.lists(st.integers(4, 5), min_size=1, max_size=20),
        one=params,
        negative=st.none() | st.lists(st.integers(4, 5), min_size=1, max_size=6),
    )
    def submit(self, prompt: list[int], one: SamplingParams, negative: list[int] | None) -> None:
        if negative is not None:
            one = replace(one, guidance_scale=2.0, negative_prompt=negative)
        job = self.gen.submit(prompt, one)
        self.jobs[job.id] = (job, prompt, one)
        self.texts[job.id] = ""

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))][0].cancel()

    @rule()
    def step(self) -> None:
        for event in self.gen.step():
            self.texts[event.job] += event.text
            if event.completion is not None:
                self.check(event.job, event.completion)

    @rule()
    def fail(self) -> None:
        self.model.fail_at = len(self.model.steps)
        raised = False
        try:
            self.step()
        except RuntimeError:
            raised = True
        # It does not raise where the ids that were on their way were the last ones.
        assert raised == (len(self.model.steps) > self.model.fail_at)
        self.model.fail_at = None

    def check(self, number: int, out: Completion) -> None:
        job, prompt, one = self.jobs.pop(number)
        whole = expected(prompt, one, [0, 1])
        assert job.completion is out
        assert out.text == self.texts[number]
        assert list(out.token_ids) == whole[: len(out.token_ids)]
        if out.finish_reason in ("stop", "length") or isinstance(out.error, NonFiniteLogits):
            assert len(out.token_ids) == len(whole)
        if out.finish_reason == "error" and not isinstance(out.error, NonFiniteLogits):
            assert "on fire" in str(out.error)

    @invariant()
    def pages_belong_to_running_requests(self) -> None:
        held = [page for sequence in self.gen.scheduler.running for one in sequence.members for page in one.pages]
        assert len(set(held)) == self.gen.pages.num_used
        assert all(self.gen.pages.references(page) == held.count(page) for page in set(held))

    def teardown(self) -> None:
        self.model.fail_at = None
        for event in drain(self.gen):
            self.texts[event.job] += event.text
            if event.completion is not None:
                self.check(event.job, event.completion)
        assert not self.jobs
        assert is_idle(self.gen)


TestGeneratorMachine = GeneratorMachine.TestCase
