"""exllamav2_ext: what samples and what matches strings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.compat import exllamav2_ext as ext_c
from qinfer.compat import v2_sampler
from qinfer.compat.v2_sampler import Candidates

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "sampler.json").read_text())
META = torch.empty(0, device="meta")


@pytest.mark.parametrize("case", VECTORS["rep_penalty"], ids=lambda case: f"{case['sustain']} {case['decay']}")
def test_apply_rep_penalty(case: dict[str, Any]) -> None:
    logits = torch.tensor([case["logits"], case["logits"]])
    sequence = torch.tensor([case["sequence"], case["sequence"][::-1]])
    numbers = (case["penalty"], case["sustain"], case["decay"], case["freq"], case["presence"])
    ext_c.apply_rep_penalty(sequence, *numbers, logits)
    assert logits[0].tolist() == pytest.approx(case["out"], rel=1e-6)
    alone = torch.tensor([[case["logits"]]])
    ext_c.apply_rep_penalty(sequence[1:], *numbers, alone)
    assert torch.equal(alone[0, 0], logits[1])


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(-1, 6), st.integers(0, 5))
def test_apply_rep_penalty_walks_back(sequence: list[int], sustain: int, decay: int) -> None:
    """The same as a walk from the end with a counter that is looked at after each token."""
    penalty, frequency, presence, left = 1.5, 0.25, 0.5, sustain
    values = [2.0, -1.0, 0.5, -0.25, 1.0]
    expected, met = list(values), set()
    window = len(sequence) if sustain == -1 else sustain + decay
    for token in sequence[::-1][:window]:
        if token < 5:
            if token not in met:
                met.add(token)
                expected[token] = expected[token] / penalty if values[token] > 0 else expected[token] * penalty
                expected[token] -= presence
            expected[token] -= frequency
        left -= 1
        if left < 0 and sustain != -1 and decay:
            penalty, frequency, presence = penalty - 0.5 / decay, frequency - 0.25 / decay, presence - 0.5 / decay
    # A later occurrence's penalty applies to what frequency left in the walk; divisions come first there too, because a
    # token is met before it is counted again.
    logits = torch.tensor([values])
    ext_c.apply_rep_penalty(torch.tensor([sequence], dtype=torch.int64), 1.5, sustain, decay, 0.25, 0.5, logits)
    assert logits[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_apply_rep_penalty_refuses() -> None:
    sequence, logits = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="sequence must be int64"):
        ext_c.apply_rep_penalty(sequence.int(), 1.1, -1, 0, 0.0, 0.0, logits)
    with pytest.raises(RuntimeError, match=r"logits must be \[2, V\]"):
        ext_c.apply_rep_penalty(sequence, 1.1, -1, 0, 0.0, 0.0, logits[:1])
    with pytest.raises(ValueError, match="repetition_penalty must be finite and above 0"):
        ext_c.apply_rep_penalty(sequence, 0.0, -1, 0, 0.0, 0.0, logits)
    with pytest.raises(ValueError, match="sustain must be at least -1"):
        ext_c.apply_rep_penalty(sequence, 1.1, -2, 0, 0.0, 0.0, logits)
    with pytest.raises(ValueError, match="sequence must be on the CPU"):
        ext_c.apply_rep_penalty(sequence.to("meta"), 1.1, -1, 0, 0.0, 0.0, logits)


STAGES = {
    "top_p": lambda c, p: v2_sampler.keep_top_p(c, p["top_p"]),
    "tfs": lambda c, p: v2_sampler.keep_tail_free(c, p["tfs"]),
    "typical": lambda c, p: v2_sampler.keep_typical(c, p["typical"]),
    "min_p": lambda c, p: v2_sampler.keep_above(c, p["min_p"] * float(c.probabilities.max())),
    "top_a": lambda c, p: v2_sampler.keep_above(c, p["top_a"] * float(c.probabilities.max()) ** 2),
}


@pytest.mark.parametrize("case", VECTORS["filters"], ids=lambda case: f"{case['stage']} {case['params']}")
def test_stages(case: dict[str, Any]) -> None:
    probabilities = np.array(case["input"], np.float32)
    found = STAGES[case["stage"]](Candidates(np.arange(len(probabilities)), probabilities), case["params"])
    assert found.tokens.tolist() == case["kept"]
    assert found.probabilities == pytest.approx(np.array(case["probs"]) / sum(case["probs"]), rel=1e-5)


OFF = {
    "temperature": 1.0, "top_k": 0, "top_p": 0.0, "top_a": 0.0, "min_p": 0.0, "tfs": 0.0, "typical": 0.0,
    "random": 0.5, "mirostat": False, "mirostat_mu": [], "mirostat_tau": 1.5, "mirostat_eta": 0.1,
    "post_temperature": 1.0, "xtc_mask": META, "xtc_probability": 0.0, "xtc_threshold": 0.1, "min_temp": 0.0,
    "max_temp": 0.0, "temp_exponent": 1.0, "smoothing_factor": 0.0, "skew": 0.0,
}  # fmt: skip


def drawn(logits: torch.Tensor, top: int = 0, **changes: Any) -> dict[str, Any]:
    """Call `sample_basic` by position, as programs do."""
    n = OFF | {"logit_filter": META} | changes
    batch = logits.shape[0]
    tokens, probs = torch.full((batch, 1), -1), torch.full((batch, 1), math.nan)
    kprobs = torch.full((batch, 1, top), math.nan) if top else META
    ktokens = torch.full((batch, 1, top), -1) if top else META
    mu = ext_c.sample_basic(
        logits, n["temperature"], n["top_k"], n["top_p"], n["top_a"], n["min_p"], n["tfs"], n["typical"], n["random"],
        tokens, probs, kprobs, ktokens, n["logit_filter"], n["mirostat"], n["mirostat_mu"], n["mirostat_tau"],
        n["mirostat_eta"], n["post_temperature"], n["xtc_mask"], n["xtc_probability"], n["xtc_threshold"],
        n["min_temp"], n["max_temp"], n["temp_exponent"], n["smoothing_factor"], n["skew"],
    )  # fmt: skip
    return {"tokens": tokens[:, 0].tolist(), "probs": probs[:, 0].tolist(), "mu": mu, "kp": kprobs, "kt": ktokens}


P = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
LOGITS = P.log()[None, None]


def test_sample_basic() -> None:
    """The draw walks the candidates in their order; the last number before 1 still finds a token."""
    for random, token in ((0.0, 0), (0.39, 0), (0.41, 1), (0.66, 2), (0.9, 3), (0.999999, 5)):
        found = drawn(LOGITS, random=random)
        assert found["tokens"] == [token]
        assert found["probs"] == pytest.approx([P[token].item()], rel=1e-5)
    assert drawn(LOGITS, temperature=0.0, random=0.99)["tokens"] == [0]
    assert drawn(LOGITS, top_k=2, random=0.99)["tokens"] == [1]
    assert drawn(LOGITS, top_p=0.5, random=0.99)["tokens"] == [3]
    assert drawn(LOGITS, min_p=0.3, random=0.99)["tokens"] == [2]
    assert drawn(LOGITS, top_a=0.7, random=0.99)["tokens"] == [2]
    assert drawn(LOGITS, tfs=0.5, random=0.99)["tokens"] == [1]
    assert drawn(LOGITS, typical=0.6, random=0.99)["tokens"] == [2]
    assert drawn(LOGITS, skew=-2.0, random=0.7)["tokens"] == [0]


def test_sample_basic_top_tokens() -> None:
    found = drawn(LOGITS.flip(-1), top=4, top_k=3)
    assert found["kt"][0, 0].tolist() == [5, 4, 3, 0]
    assert found["kp"][0, 0].tolist() == pytest.approx([0.5, 0.3125, 0.1875, 0], rel=1e-5)


def test_sample_basic_filter_and_batch() -> None:
    logits = LOGITS.expand(3, -1, -1)
    allowed = torch.ones(3, 6, dtype=torch.bool)
    allowed[1, :3] = False
    found = drawn(logits, logit_filter=allowed, random=0.3)
    assert found["tokens"][0] == 0
    assert found["tokens"][1] >= 3
    second = v2_sampler.next_random(0.3)
    assert found["tokens"][2] == drawn(LOGITS, random=v2_sampler.next_random(second))["tokens"][0]
    assert 0 <= second < 1
    assert second != 0.3


def test_sample_basic_temperatures() -> None:
    cold = drawn(LOGITS, top=6, post_temperature=0.5)["kp"][0, 0]
    assert torch.allclose(cold, P**2 / (P**2).sum())
    assert torch.allclose(drawn(LOGITS, top=6, temperature=0.5)["kp"][0, 0], cold)
    entropy = float(-(P * P.log()).sum()) / math.log(6)
    dynamic = drawn(LOGITS, top=6, min_temp=0.5, max_temp=2.0, temp_exponent=2.0)["kp"][0, 0]
    power = P ** (1 / (0.5 + 1.5 * entropy**2))
    assert torch.allclose(dynamic, power / power.sum(), rtol=1e-4)
    smooth = drawn(LOGITS.expand(2, -1, -1), top=6, smoothing_factor=0.5, temperature=2.0)["kp"][:, 0]
    weights = torch.exp(-((LOGITS[0] - LOGITS.max()) ** 2) * 0.5 / 2)
    assert torch.allclose(smooth, (weights / weights.sum()).expand(2, -1))


def test_sample_basic_xtc() -> None:
    """Likely are 0.4, 0.25 and 0.15; the last of these is spared, and so is what the mask protects, in any order."""
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    found = drawn(LOGITS[..., order], top=6, xtc_probability=0.5, xtc_threshold=0.12)
    expected = torch.where(P > 0.2, P * 0.5, P * (1 + 0.5 * 0.65 / 0.35))
    probabilities = dict(zip(found["kt"][0, 0].tolist(), found["kp"][0, 0].tolist(), strict=True))
    assert [probabilities[i] for i in range(6)] == pytest.approx(expected[order].tolist(), rel=1e-5)
    mask = torch.tensor([True, False, True, True, True, True])
    found = drawn(LOGITS, top=6, xtc_probability=1.0, xtc_threshold=0.12, xtc_mask=mask)
    assert sorted(found["kp"][0, 0].tolist())[0] == 0
    assert found["kt"][0, 0, -1] == 0
    # The mask is looked up by token, also where top-k has left three in another order.
    mask = torch.tensor([True, True, True, True, False, True])
    found = drawn(LOGITS[..., order], top=3, top_k=3, xtc_probability=1.0, xtc_threshold=0.1, xtc_mask=mask)
    assert dict(zip(found["kt"][0, 0].tolist(), found["kp"][0, 0].tolist(), strict=True))[3] == 0
    assert found["kp"][0, 0, 0].item() == 1


def test_sample_basic_mirostat() -> None:
    found = drawn(LOGITS, mirostat=True, mirostat_mu=[0.0], mirostat_tau=1.01, mirostat_eta=0.5, random=0.99)
    # The bound begins at 2.02 bits: tokens of at least 1/4, of which the second is drawn.
    assert found["tokens"] == [1]
    surprise = -math.log2(0.25 / 0.65)
    assert found["mu"] == pytest.approx([2.02 + 0.5 * (1.01 - surprise)], rel=1e-5)
    assert drawn(LOGITS, mirostat_mu=[1.25])["mu"] == [1.25]


def test_sample_basic_refuses() -> None:
    with pytest.raises(RuntimeError, match="logits must be float32"):
        drawn(LOGITS.double())
    with pytest.raises(RuntimeError, match=r"logit_filter must be \[1, 6\]"):
        drawn(LOGITS, logit_filter=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="row 0 of logits has NaN"):
        drawn(torch.full((1, 1, 6), math.nan))
    with pytest.raises(ValueError, match="no token that may be drawn"):
        drawn(LOGITS, logit_filter=torch.zeros(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"random must be in \[0, 1\)"):
        drawn(LOGITS, random=1.0)
    with pytest.raises(ValueError, match="mirostat_mu must hold 1 numbers"):
        drawn(LOGITS, mirostat=True)
    with pytest.raises(ValueError, match="at most 6 tokens, got 7"):
        drawn(LOGITS, top=7)


def test_logit_filter_exclusive() -> None:
    allowed = torch.ones(2, 6, dtype=torch.bool)
    ext_c.logit_filter_exclusive(allowed, [[1, 3, 4], [0]])
    ext_c.logit_filter_exclusive(allowed, [[0, 3, 4, 5], [0, 1]])
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[3, 4], [0]]
    for bad in ([[1], []], [[1], [2, 2]], [[1], [3, 2]], [[1], [6]], [[1], [-1]]):
        with pytest.raises(RuntimeError, match=r"exclusive_lists\[1\] must hold ascending ids"):
            ext_c.logit_filter_exclusive(allowed, bad)
    with pytest.raises(RuntimeError, match=r"filter must be \[1, V\]"):
        ext_c.logit_filter_exclusive(allowed, [[1]])
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[3, 4], [0]]


def test_fast_fill_cpu_ones_bool() -> None:
    tensor = torch.zeros(3, 5, dtype=torch.bool)
    ext_c.fast_fill_cpu_ones_bool(tensor)
    assert tensor.all()
    with pytest.raises(RuntimeError, match="tensor must be bool"):
        ext_c.fast_fill_cpu_ones_bool(torch.zeros(3))


def test_fast_fadd_cpu() -> None:
    a, b = torch.arange(12.0).view(3, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    ext_c.fast_fadd_cpu(a, b)
    assert torch.equal(a, torch.arange(12.0).view(3, 4) + b)
    with pytest.raises(RuntimeError, match="a must hold a multiple of the 5 elements of b"):
        ext_c.fast_fadd_cpu(a, torch.zeros(5))
    with pytest.raises(RuntimeError, match="a must be contiguous"):
        ext_c.fast_fadd_cpu(torch.zeros(4, 8)[:, ::1][:, :4], b)
    with pytest.raises(RuntimeError, match="b must be float32"):
        ext_c.fast_fadd_cpu(a, b.double())


def test_fast_copy_cpu() -> None:
    target, source = torch.zeros(4, 3), torch.randn(3, 4).T
    ext_c.fast_copy_cpu(target, source)
    assert torch.equal(target, source)
    with pytest.raises(RuntimeError, match=r"src must be \[4, 3\]"):
        ext_c.fast_copy_cpu(target, source[:2])
    with pytest.raises(TypeError, match=r"src must be torch.float32"):
        ext_c.fast_copy_cpu(target, source.half())


def test_dump_profile_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert ext_c.dump_profile_results() is None
    assert capsys.readouterr() == ("", "")


def matched(text: str, strings: list[str]) -> int:
    """Call `partial_strings_match` with buffers of the kinds that programs use."""
    encoded = [string.encode("utf-32-le") for string in strings]
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return ext_c.partial_strings_match(
        np.frombuffer(text.encode("utf-32-le"), np.uint8), offsets, bytearray(b"".join(encoded))
    )


def test_partial_strings_match() -> None:
    for case in VECTORS["partial_strings_match"]:
        assert matched(case["text"], case["strings"]) == case["result"], case
    assert matched("né🙂x", ["🙂"]) == 2
    with pytest.raises(RuntimeError, match="offsets must ascend"):
        matched("abc", ["a", ""])
    with pytest.raises(RuntimeError, match="offsets must ascend in steps of 4 within the 4 bytes"):
        ext_c.partial_strings_match(b"", np.array([0, 8], np.int32), "a".encode("utf-32-le"))


@given(st.text("ab", max_size=7), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_partial_strings_match_means_what_it_says(text: str, strings: list[str]) -> None:
    expected = -1
    for string in strings:
        if string in text:
            expected = text.index(string)
        elif any(text.endswith(string[:length]) for length in range(1, len(string))):
            expected = -2
        if expected != -1:
            break
    assert matched(text, strings) == expected
