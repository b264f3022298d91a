"""The functions of `exllamav2_ext` that sample and that match strings; all of them work on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qinfer.compat import v2_sampler
from qinfer.compat.binding import check_tensor, extension, optional
from qinfer.engine.params import SamplingParams
from qinfer.engine.penalties import repetition, weighted

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[np.generic]


def _check_cpu(**tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor that is given lives on a CPU."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")


@extension
def apply_rep_penalty(
    sequence: Tensor,
    penalty_max: float,
    sustain: int,
    decay: int,
    alpha_frequency: float,
    alpha_presence: float,
    logits: Tensor,
) -> None:
    """Penalize the tokens of a sequence, the latest ones most.

    The penalties hold in full for the last `sustain` tokens, or `sustain + 1` where `decay` is above 0, and from there
    fall linearly over `decay` tokens. The logit of a token seen is divided by the penalty of its latest occurrence, if
    it is positive, and else multiplied by it; the presence penalty of that occurrence and the frequency penalties of
    all of them are subtracted. Ids beyond the logits are skipped.

    Args:
        sequence: [b, L] int64.
        penalty_max: Repetition penalty, above 0; 1 changes nothing.
        sustain: How many of the last tokens are penalized in full; -1 for all.
        decay: Over how many tokens before those the penalties fade.
        alpha_frequency: Frequency penalty.
        alpha_presence: Presence penalty.
        logits: [b, V] or [b, 1, V] fp32, changed in place.

    Raises:
        RuntimeError: a dtype, a shape, a device or a value does not fit.
    """
    _check_cpu(sequence=sequence, logits=logits)
    check_tensor("sequence", sequence, torch.int64, ("b", "L"))
    middle = (1,) * (logits.dim() - 2)
    check_tensor("logits", logits, torch.float32, (sequence.shape[0], *middle, "V"))
    if sustain < -1 or decay < 0:
        raise ValueError(f"sustain must be at least -1 and decay at least 0, got {sustain} and {decay}")
    if sequence.numel() and int(sequence.min()) < 0:
        raise ValueError(f"sequence must hold ids that are at least 0, got {int(sequence.min())}")
    params = SamplingParams(
        repetition_penalty=penalty_max, frequency_penalty=alpha_frequency, presence_penalty=alpha_presence
    )
    length = sequence.shape[1]
    window = length if sustain == -1 else min(length, sustain + decay)
    distance = np.arange(window)
    shares = np.ones(window) if sustain == -1 or decay == 0 else 1 - np.maximum(0, distance - sustain) / decay
    for row, ids in enumerate(sequence.numpy()[:, ::-1][:, :window]):
        known = ids < logits.shape[-1]
        tokens, latest, total = weighted(ids[known], shares[known])
        up, down, offset = (torch.from_numpy(part) for part in repetition(latest, total, params))
        target, index = logits[row].view(-1), torch.from_numpy(tokens).long()
        values = target[index].double()
        target[index] = (values * torch.where(values > 0, up, down) + offset).float()


@extension
def sample_basic(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    top_a: float,
    min_p: float,
    tfs: float,
    typical: float,
    random: float,
    output_tokens: Tensor,
    output_probs: Tensor,
    output_kprobs: Tensor | None,
    output_ktokens: Tensor | None,
    logit_filter: Tensor | None,
    mirostat: bool,
    mirostat_mu: Sequence[float],
    mirostat_tau: float,
    mirostat_eta: float,
    post_temperature: float,
    xtc_mask: Tensor | None,
    xtc_probability: float,
    xtc_threshold: float,
    min_temp: float,
    max_temp: float,
    temp_exponent: float,
    smoothing_factor: float,
    skew: float,
) -> list[float]:
    """Draw a token per row through the stages of ExLlamaV2's sampler (`v2_sampler.py`), in its order.

    Temperature and smoothing, top-k, top-p, top-a, min-p, tail-free, typical, mirostat, last or dynamic temperature,
    XTC, skew and the draw. A temperature below 0.01 takes the likeliest token.

    Args:
        logits: [b, V] or [b, 1, V] fp32.
        temperature: Divides the logits.
        top_k: Keeps so many tokens.
        top_p: Keeps tokens that sum to at most this.
        top_a: Keeps probabilities of at least this times the square of the largest.
        min_p: Keeps probabilities of at least this times the largest.
        tfs: Cuts the tail at this share of the curvature.
        typical: Keeps the most typical tokens that sum to less than this. 0 turns any of these filters off.
        random: In [0, 1); the rows after the first get numbers derived from it.
        output_tokens: [b, 1] int64, written.
        output_probs: [b, 1] fp32, written.
        output_kprobs: [b, 1, n] fp32, written with the likeliest candidates; meta or None for none.
        output_ktokens: [b, 1, n] int64, written, filled with ids of probability 0.
        logit_filter: [b, V] bool, True where a token may be drawn; meta or None allows all.
        mirostat: Whether to bound the surprise.
        mirostat_mu: One bound per row in bits; 0 begins with 2 * mirostat_tau.
        mirostat_tau: The surprise to hold.
        mirostat_eta: How fast the bound follows.
        post_temperature: Temperature applied last; 1 for none.
        xtc_mask: [V] bool, True where XTC may exclude a token; meta or None means everywhere.
        xtc_probability: How often likely tokens are excluded.
        xtc_threshold: From which probability a token is likely.
        min_temp: Temperature without entropy.
        max_temp: Temperature at full entropy; above min_temp, the temperature is dynamic.
        temp_exponent: Bends the way between the two.
        smoothing_factor: Quadratic smoothing; 0 for none.
        skew: Raises the random number to exp(-skew).

    Returns:
        The bounds of mirostat for the next step; those given where it is off.

    Raises:
        RuntimeError: a dtype, a shape, a device or a value does not fit, or a row has no token to draw.
    """
    kprobs, ktokens, allowed, unprotected = map(optional, (output_kprobs, output_ktokens, logit_filter, xtc_mask))
    batch, vocabulary = logits.shape[0], logits.shape[-1]
    _check_outputs(logits, output_tokens, output_probs, kprobs, ktokens)
    _check_masks(logits, allowed, unprotected)
    if not 0 <= random < 1 or temperature < 0:
        raise ValueError(f"random must be in [0, 1) and temperature at least 0, got {random} and {temperature}")
    if mirostat and len(mirostat_mu) != batch:
        raise ValueError(f"mirostat_mu must hold {batch} numbers, one per row, got {len(mirostat_mu)}")
    stages = v2_sampler.Stages(
        temperature, top_k, top_p, top_a, min_p, tfs, typical, mirostat, mirostat_tau, mirostat_eta, post_temperature,
        xtc_probability, xtc_threshold, min_temp, max_temp, temp_exponent, smoothing_factor, skew,
    )  # fmt: skip
    bounds = [float(mu) for mu in mirostat_mu]
    spared = None if unprotected is None else unprotected.numpy()
    for row in range(batch):
        most = (bounds[row] or 2 * mirostat_tau) if mirostat else 0.0
        found = _candidates(logits, allowed, row, stages, spared, most)
        if kprobs is not None or skew != 0:
            found = found.descending()
        place = v2_sampler.place(found, random, skew)
        output_tokens[row, 0], output_probs[row, 0] = int(found.tokens[place]), float(found.probabilities[place])
        if kprobs is not None and ktokens is not None:
            _write_likeliest(found, vocabulary, kprobs[row, 0], ktokens[row, 0])
        if mirostat:
            surprise = -float(np.log2(found.probabilities[place]))
            bounds[row] = most + mirostat_eta * (mirostat_tau - surprise)
        random = v2_sampler.next_random(random)
    return bounds


def _candidates(
    logits: Tensor,
    allowed: Tensor | None,
    row: int,
    stages: v2_sampler.Stages,
    unprotected: v2_sampler.Bools | None,
    most: float,
) -> v2_sampler.Candidates:
    """Return what the stages leave of a row.

    Raises:
        ValueError: There is nothing to draw.
    """
    values = logits[row].reshape(-1).numpy()
    permitted = None if allowed is None else allowed[row].numpy()
    if not np.isfinite(values.max()) or (permitted is not None and not permitted.any()):
        raise ValueError(f"row {row} of logits has NaN, +inf or no token that may be drawn")
    return v2_sampler.candidates(values, stages, permitted, unprotected, most)


def _check_outputs(
    logits: Tensor, tokens: Tensor, probs: Tensor, kprobs: Tensor | None, ktokens: Tensor | None
) -> None:
    """Raise unless the tensors of `sample_basic` fit together."""
    _check_cpu(logits=logits, output_tokens=tokens, output_probs=probs, output_kprobs=kprobs, output_ktokens=ktokens)
    batch, middle = logits.shape[0], (1,) * (logits.dim() - 2)
    check_tensor("logits", logits, torch.float32, ("b", *middle, "V"))
    check_tensor("output_tokens", tokens, torch.int64, (batch, 1))
    check_tensor("output_probs", probs, torch.float32, (batch, 1))
    if (kprobs is None) != (ktokens is None):
        raise ValueError("output_kprobs and output_ktokens must be given together")
    if kprobs is not None and ktokens is not None:
        check_tensor("output_kprobs", kprobs, torch.float32, (batch, 1, "n"))
        check_tensor("output_ktokens", ktokens, torch.int64, (batch, 1, kprobs.shape[2]))
        if kprobs.shape[2] > logits.shape[-1]:
            raise ValueError(f"output_kprobs must ask for at most {logits.shape[-1]} tokens, got {kprobs.shape[2]}")


def _check_masks(logits: Tensor, allowed: Tensor | None, unprotected: Tensor | None) -> None:
    """Raise unless the masks of `sample_basic` fit the logits."""
    _check_cpu(logit_filter=allowed, xtc_mask=unprotected)
    if allowed is not None:
        check_tensor("logit_filter", allowed, torch.bool, (logits.shape[0], logits.shape[-1]))
    if unprotected is not None:
        check_tensor("xtc_mask", unprotected, torch.bool, (logits.shape[-1],))


def _write_likeliest(found: v2_sampler.Candidates, vocabulary: int, kprobs: Tensor, ktokens: Tensor) -> None:
    """Write the first candidates, and after them ids that are none, with probability zero."""
    wanted = len(kprobs)
    tokens, probabilities = found.tokens[:wanted], found.probabilities[:wanted]
    missing = wanted - len(tokens)
    if missing:
        others = np.setdiff1d(np.arange(min(vocabulary, wanted + len(tokens))), tokens)[:missing]
        tokens = np.concatenate([tokens, others])
        probabilities = np.concatenate([probabilities, np.zeros(missing, np.float32)])
    ktokens.copy_(torch.from_numpy(np.ascontiguousarray(tokens)))
    kprobs.copy_(torch.from_numpy(np.ascontiguousarray(probabilities)))


@extension
def logit_filter_exclusive(filter: Tensor, exclusive_lists: Sequence[Sequence[int]]) -> None:
    """Clear every entry of a row that its list does not name; nothing is set.

    Args:
        filter: [b, V] bool, changed in place.
        exclusive_lists: One list of ids per row: ascending, all different, at least one.

    Raises:
        RuntimeError: a dtype, a shape, a device or a list does not fit.
    """
    _check_cpu(filter=filter)
    check_tensor("filter", filter, torch.bool, (len(exclusive_lists), "V"))
    masks = torch.zeros_like(filter)
    for row, ids in enumerate(exclusive_lists):
        ascending = all(a < b for a, b in pairwise(ids))
        if not ids or not ascending or ids[0] < 0 or ids[-1] >= filter.shape[1]:
            rule = f"hold ascending ids below {filter.shape[1]}, at least one"
            raise ValueError(f"exclusive_lists[{row}] must {rule}, got {list(ids)[:8]}")
        masks[row, torch.tensor(ids)] = True
    filter &= masks


@extension
def fast_fill_cpu_ones_bool(tensor: Tensor) -> None:
    """Set every element of a bool tensor.

    Args:
        tensor: bool, any shape, written.

    Raises:
        RuntimeError: the dtype or the device does not fit.
    """
    _check_cpu(tensor=tensor)
    check_tensor("tensor", tensor, torch.bool, ("any",) * tensor.dim())
    tensor.fill_(True)


@extension
def fast_fadd_cpu(a: Tensor, b: Tensor) -> None:
    """Add b to a, repeated as often as it fits.

    Args:
        a: fp32, contiguous, changed in place.
        b: fp32, contiguous, with a number of elements that divides that of a.

    Raises:
        RuntimeError: a dtype, a size or a device does not fit.
    """
    _check_cpu(a=a, b=b)
    for name, tensor in (("a", a), ("b", b)):
        check_tensor(name, tensor, torch.float32, ("any",) * tensor.dim())
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if not b.numel() or a.numel() % b.numel():
        raise ValueError(f"a must hold a multiple of the {b.numel()} elements of b, got {a.numel()}")
    a.view(-1, b.numel()).add_(b.view(-1))


@extension
def fast_copy_cpu(dst: Tensor, src: Tensor) -> None:
    """Copy one tensor into another of the same shape and dtype, whatever their strides.

    Args:
        dst: Any dtype and shape, written.
        src: The same dtype and shape.

    Raises:
        RuntimeError: the dtypes, the shapes or a device do not fit.
    """
    _check_cpu(dst=dst, src=src)
    if dst.dtype != src.dtype:
        raise TypeError(f"src must be {dst.dtype} as dst is, got {src.dtype}")
    if dst.shape != src.shape:
        raise ValueError(f"src must be {list(dst.shape)} as dst is, got {list(src.shape)}")
    dst.copy_(src)


@extension
def dump_profile_results() -> None:
    """Do nothing, as the compiled module does unless it was built with timers: there is no profile to show."""


@extension
def partial_strings_match(match: Buffer, offsets: Buffer, strings: Buffer) -> int:
    """Find the first string that a text contains or that its end may begin.

    The strings are tried in their order, so the beginning of an earlier one hides a later one that is there entirely.

    Args:
        match: Buffer with the text in UTF-32-LE.
        offsets: Buffer of n + 1 int32: where each of n strings begins in `strings`, in bytes, and where the last ends.
        strings: Buffer with the strings in UTF-32-LE, one after the other.

    Returns:
        Where the string begins in the text, in characters; -2 if the end of the text may begin it; -1 for neither.

    Raises:
        RuntimeError: the offsets do not fit, or a string is empty.
    """
    text, joined = (np.frombuffer(part, "<u4") for part in (match, strings))
    starts = np.frombuffer(offsets, "<i4")
    steps = np.diff(starts)
    if not len(starts) or starts[0] < 0 or starts[-1] > joined.nbytes or (starts % 4).any() or (steps <= 0).any():
        rule = f"ascend in steps of 4 within the {joined.nbytes} bytes of strings"
        raise ValueError(f"offsets must {rule}, got {starts.tolist()[:8]}")
    for start, end in zip(starts[:-1] // 4, starts[1:] // 4, strict=True):
        needle = joined[start:end]
        for position in range(len(text)):
            there = text[position : position + len(needle)]
            if (there == needle[: len(there)]).all():
                return position if len(there) == len(needle) else -2
    return -1
