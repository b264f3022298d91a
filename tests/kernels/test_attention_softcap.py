"""paged_attention with capped scores, against Gemma 2's own attention, and what a cap has to leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from qinfer.kernels.attention import paged_attention
from qinfer.kernels.kv_codec import CODECS
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.kernels.test_attention import BODIES, Case, make_case

CAP = 2.0  # of scores with a standard deviation of about 4: the cap bends most of them
BATCH = ([1, 9, 1, 1], [33, 9, 1, 0])


def _steep(device: torch.device, **options: object) -> Case:
    """A batch whose scores reach far beyond the cap."""
    case = make_case(*BATCH, device, **options)
    case.q.mul_(4)
    return case


class _Module:
    """What Gemma's function asks of its layer."""

    def __init__(self, group: int) -> None:
        self.num_key_value_groups, self.training = group, False


def gemma(case: Case, softcap: float | None) -> Tensor:
    """The attention of transformers, one sequence at a time."""
    rows, starts = [], case.query_starts.tolist()
    for b, query_len in enumerate(case.query_lens):
        keys, values = (x[b].transpose(0, 1)[None].to(case.q.device) for x in (case.keys, case.values))
        queries = case.q[starts[b] : starts[b + 1]].transpose(0, 1)[None]
        context = keys.shape[2]
        if context == 0:
            rows.append(case.q.new_zeros(query_len, case.q[0].numel()))
            continue
        own = torch.arange(context - query_len, context, device=case.q.device)[:, None]
        mask = torch.zeros(query_len, context, device=case.q.device)
        mask.masked_fill_(torch.arange(context, device=case.q.device) > own, float("-inf"))
        module = _Module(case.q.shape[1] // keys.shape[1])
        scaling = case.q.shape[-1] ** -0.5
        out, _ = eager_attention_forward(
            module, queries, keys, values, mask[None, None], scaling=scaling, softcap=softcap
        )
        rows.append(out[0].flatten(1))
    return torch.cat(rows)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("softcap", [CAP, 50.0, None])
def test_is_what_gemma_computes(body, softcap, device):
    case = _steep(device)
    actual = body(*case.args, **case.options, softcap=softcap)
    assert_close(actual, gemma(case, softcap))


def test_the_cap_bends(device):
    """The cases above would not notice a cap that does nothing, unless it does something."""
    case = _steep(device)
    assert (gemma(case, CAP) - gemma(case, None)).abs().max() > 0.1


@pytest.mark.kernel
@pytest.mark.parametrize(("options", "splits"), [({"window": 7}, None), ({}, 3)])
def test_with_windows_and_runs(options, splits, device):
    case = _steep(device)
    actual = paged_attention.launch(*case.args, **case.options, **options, softcap=CAP, splits=splits)
    assert_close(actual, paged_attention.reference(*case.args, **case.options, **options, softcap=CAP))


@pytest.mark.kernel
def test_over_coded_pages(device):
    case = _steep(device)
    args = (case.q, coded(case.k_pages, CODECS["q8"]), coded(case.v_pages, CODECS["q4"]), *case.args[3:])
    actual = paged_attention.launch(*args, **case.options, softcap=CAP)
    assert_close(actual, paged_attention.reference(*args, **case.options, softcap=CAP))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's; the result is infinity
@pytest.mark.parametrize("body", BODIES)
def test_scores_far_beyond_the_cap_are_the_cap(body, device):
    """Scores of any size give finite results: all keys far above the cap weigh the same."""
    case = make_case([1], [5], device)
    case.q.mul_(0).add_(1e6)
    case.k_pages.copy_(torch.where(case.k_pages.isnan(), case.k_pages, 1.0))
    actual = body(*case.args, **case.options, softcap=30.0)
    mean = case.values[0].mean(0).repeat_interleave(2, 0).flatten()[None].to(device)
    assert_close(actual, mean)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_is_positive(softcap, device):
    case = make_case([1], [5], device)
    with pytest.raises(ValueError, match="softcap must be positive and finite"):
        paged_attention(*case.args, **case.options, softcap=softcap)
