"""What a request asks for: how its tokens are chosen and when it stops. `docs/sampling.md` explains every option."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qinfer.engine.constraints import Constraint

# Field -> (smallest value, largest value, whether the smallest is excluded, what the bounds mean).
_RANGES: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0, math.inf, False, "finite and at least 0"),
    "min_temperature": (0, math.inf, False, "finite and at least 0"),
    "max_temperature": (0, math.inf, False, "finite and at least 0, where 0 leaves the temperature fixed"),
    "temperature_exponent": (0, math.inf, True, "finite and above 0"),
    "smoothing_factor": (0, math.inf, False, "finite and at least 0, where 0 changes nothing"),
    "top_k": (0, math.inf, False, "at least 0, where 0 keeps all tokens"),
    "top_p": (0, 1, True, "above 0 and at most 1, where 1 keeps all tokens"),
    "top_a": (0, 1, False, "between 0 and 1, where 0 keeps all tokens"),
    "min_p": (0, 1, False, "between 0 and 1, where 0 keeps all tokens"),
    "tfs": (0, 1, True, "above 0 and at most 1, where 1 keeps all tokens"),
    "typical": (0, 1, True, "above 0 and at most 1, where 1 keeps all tokens"),
    "mirostat_tau": (0, math.inf, False, "finite and at least 0, where 0 turns mirostat off"),
    "mirostat_eta": (0, 1, False, "between 0 and 1"),
    "xtc_probability": (0, 1, False, "between 0 and 1, where 0 turns XTC off"),
    "xtc_threshold": (0, 1, True, "above 0 and at most 1"),
    "skew": (-20, 20, False, "between -20 and 20, where 0 changes nothing"),
    "repetition_penalty": (0, math.inf, True, "finite and above 0, where 1 changes nothing"),
    "repetition_decay": (0, math.inf, False, "at least 0"),
    "frequency_penalty": (-math.inf, math.inf, True, "finite"),
    "presence_penalty": (-math.inf, math.inf, True, "finite"),
    "dry_multiplier": (0, math.inf, False, "finite and at least 0, where 0 turns DRY off"),
    "dry_base": (1, math.inf, False, "finite and at least 1"),
    "dry_allowed_length": (1, math.inf, False, "at least 1"),
    "guidance_scale": (-math.inf, math.inf, True, "finite, where 1 does not guide"),
    "max_new_tokens": (1, math.inf, False, "at least 1"),
    "min_new_tokens": (0, math.inf, False, "at least 0"),
}
_COUNTS = ("top_k", "repetition_decay", "dry_allowed_length", "max_new_tokens", "min_new_tokens")
# Field -> the smallest value it may have where it is not None.
_OPTIONAL_COUNTS = {"seed": 0, "repetition_range": 0, "dry_range": 2, "logprobs": 0, "prompt_logprobs": 0}
_IDS = ("stop_ids", "banned_ids", "xtc_protected", "dry_breakers", "allowed_ids")
_TEXTS = ("stop", "banned_strings")


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops.

    Args:
        temperature: Divides the logits; 0 takes the likeliest token, ties to the lowest id.
        temperature_last: Whether the filters see the probabilities at temperature 1.
        min_temperature: Temperature where the choice is certain; see max_temperature.
        max_temperature: Temperature where all candidates are equally likely; above min_temperature, it replaces
            `temperature` by one that follows the entropy of the candidates.
        temperature_exponent: Bends the way from min_temperature to max_temperature.
        smoothing_factor: Replaces the distance to the largest logit by its square times this; 0 does not.
        top_k: Keeps the k likeliest tokens; 0 keeps all.
        top_p: Keeps the fewest likeliest tokens whose probabilities reach top_p together; 1 keeps all.
        top_a: Keeps tokens with a probability of at least top_a times the square of the largest; 0 keeps all.
        min_p: Keeps tokens at least min_p times as likely as the likeliest; 0 keeps all.
        tfs: Cuts where this share of the curvature of the sorted probabilities is reached (tail-free); 1 keeps all.
        typical: Keeps the fewest tokens of typical surprise that reach this probability together; 1 keeps all.
        mirostat_tau: Surprise in bits that mirostat holds on average; 0 turns mirostat off.
        mirostat_eta: How fast mirostat reacts.
        xtc_probability: Chance that all likely tokens but the least likely of them are excluded; 0 turns XTC off.
        xtc_threshold: Probability from which a token is a likely one for XTC.
        xtc_protected: Ids that XTC never excludes.
        skew: Favours likely tokens below 0 and unlikely ones above.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
        repetition_range: How many of the latest ids the penalties look at; None means prompt and text entirely.
        repetition_decay: Over how many earlier ids the penalties fade out.
        frequency_penalty: Subtracted from a logit for every time the token was seen.
        presence_penalty: Subtracted from a logit once if the token was seen.
        dry_multiplier: Penalty of a token that would prolong a repetition; 0 turns DRY off.
        dry_base: Factor of that penalty for each token by which the repetition is longer than allowed.
        dry_allowed_length: Repetitions of fewer tokens are free.
        dry_range: How many of the latest ids DRY looks at; None means all.
        dry_breakers: Ids across which a repetition does not count.
        logit_bias: Id -> what is added to its logit; -inf bans it.
        banned_ids: Ids that are never drawn.
        allowed_ids: The only ids that may be drawn; None allows all.
        guidance_scale: How far the text moves from what would follow the negative prompt: logits become negative +
            guidance_scale * (positive - negative); 1 leaves the negative prompt out.
        negative_prompt: Text or token ids that stand in the place of the prompt to see what is not wanted.
        seed: Same request and seed, same tokens, alone or in a batch; None draws a fresh seed.
        logprobs: How many of the likeliest tokens to report at each step besides the chosen one; None reports nothing.
        prompt_logprobs: The same for the tokens of the prompt.
        max_new_tokens: Most tokens to generate.
        min_new_tokens: How many tokens come before a stop id or an end-of-sequence id may.
        stop: A string, or several, that end the text; the text is cut before them.
        stop_ids: Token ids that end the text besides the model's own; their text is not emitted.
        banned_strings: A string, or several, that the text never contains.
        token_healing: Whether the last token of the prompt may be replaced by a longer one that begins like it.
        ignore_eos: Whether to go on after the model's own end-of-sequence ids.
        constraint: What the text has to look like, such as a JSON schema (`qinfer.engine.grammar`); None: anything.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a value has the wrong type.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    temperature_last: bool = False
    min_temperature: float = 0.0
    max_temperature: float = 0.0
    temperature_exponent: float = 1.0
    smoothing_factor: float = 0.0
    top_a: float = 0.0
    tfs: float = 1.0
    typical: float = 1.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_protected: Sequence[int] = ()
    skew: float = 0.0
    repetition_penalty: float = 1.0
    repetition_range: int | None = None
    repetition_decay: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int | None = None
    dry_breakers: Sequence[int] = ()
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    banned_ids: Sequence[int] = ()
    allowed_ids: Sequence[int] | None = None
    logprobs: int | None = None
    min_new_tokens: int = 0
    banned_strings: str | Sequence[str] = ()
    token_healing: bool = False
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    guidance_scale: float = 1.0
    negative_prompt: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check every field; lists become tuples."""
        for field in _TEXTS:
            object.__setattr__(self, field, _texts(field, getattr(self, field)))
        for field in _IDS:
            ids = getattr(self, field)
            if ids is not None:
                object.__setattr__(self, field, _ids(field, ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            object.__setattr__(self, "negative_prompt", _ids("negative_prompt", self.negative_prompt))
        for field in _COUNTS:
            _integers(field, (getattr(self, field),))
        for field, lowest in _OPTIONAL_COUNTS.items():
            value = getattr(self, field)
            if value is not None:
                _integers(field, (value,))
                _require(field, value, value >= lowest, f"None or at least {lowest}")
        _require("seed", self.seed, self.seed is None or self.seed < 1 << 64, "None or in 0..2**64 - 1")
        for field, (low, high, open_below, rule) in _RANGES.items():
            value = _number(field, getattr(self, field))
            _require(field, value, (low < value if open_below else low <= value) and value <= high, rule)
            _require(field, value, value < math.inf, rule)
        self._check_together()

    def _check_together(self) -> None:
        """Raise a ValueError where one field makes another meaningless."""
        low, high = self.min_temperature, self.max_temperature
        _require("max_temperature", high, high == low == 0 or high > low, f"above min_temperature={low}, or both 0")
        fades = self.repetition_decay == 0 or self.repetition_range is not None
        _require("repetition_decay", self.repetition_decay, fades, "0 without repetition_range, after which it begins")
        _require("allowed_ids", self.allowed_ids, self.allowed_ids != (), "None or hold at least one id")
        if self.allowed_ids is not None:
            left = set(self.allowed_ids).difference(self.banned_ids)
            _require("banned_ids", self.banned_ids, bool(left), "without at least one of allowed_ids")
        rule = f"at most max_new_tokens={self.max_new_tokens}"
        _require("min_new_tokens", self.min_new_tokens, self.min_new_tokens <= self.max_new_tokens, rule)
        has_negative = self.negative_prompt is not None
        _require(
            "guidance_scale", self.guidance_scale, has_negative or self.guidance_scale == 1, "1 without negative_prompt"
        )
        if self.is_guided:
            # Its first token may begin with text of the prompt, which the negative one does not end with.
            _require("token_healing", self.token_healing, not self.token_healing, "False beside a negative_prompt")
        if self.constraint is not None:
            if not hasattr(self.constraint, "begin"):
                raise TypeError(f"constraint must have begin(), as json_schema(...) has, got {self.constraint!r}")
            # The first token would begin with text of the prompt, which the constraint does not know.
            _require("token_healing", self.token_healing, not self.token_healing, "False beside a constraint")

    @property
    def uses_history(self) -> bool:
        """Whether the choice of a token depends on which ids came before it, other than through the model."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or self.dry_multiplier > 0

    @property
    def is_guided(self) -> bool:
        """Whether logits are those of two prompts."""
        return self.guidance_scale != 1 and self.negative_prompt is not None

    @property
    def is_plain(self) -> bool:
        """Whether temperature, top-k, top-p and min-p are all there is to the draw: what `kernels.draw` does."""
        return self.temperature == 0 or not (
            self.temperature_last
            or self.max_temperature > 0
            or self.smoothing_factor > 0
            or self.top_a > 0
            or self.tfs < 1
            or self.typical < 1
            or self.mirostat_tau > 0
            or self.xtc_probability > 0
            or self.skew != 0
        )

    @property
    def is_fixed(self) -> bool:
        """Whether rows of logits differ in their random number alone, and nobody asks what they say."""
        looks_at_ids = self.uses_history or self.min_new_tokens > 0 or self.banned_strings or self.token_healing
        changes = self.logit_bias or self.banned_ids or self.allowed_ids is not None or self.constraint is not None
        return self.is_plain and self.logprobs is None and not (looks_at_ids or changes or self.is_guided)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a ValueError that names the field whose ids a model of this vocabulary does not have."""
        biased = tuple(dict(self.logit_bias))
        for field, ids in (*((field, getattr(self, field) or ()) for field in _IDS), ("logit_bias", biased)):
            beyond = [token_id for token_id in ids if token_id >= vocab_size]
            if beyond:
                raise ValueError(f"{field} must hold ids below {vocab_size}, the model's vocabulary, got {beyond[0]}")
        for field in ("logprobs", "prompt_logprobs"):
            most = getattr(self, field) or 0
            _require(field, most, most <= vocab_size, f"at most {vocab_size}, the model's vocabulary")


def _number(field: str, value: object) -> float:
    """Return a number as it is, or raise a TypeError that names the field."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{field} must be a number, got {value!r}")
    return value  # type: ignore[return-value]


def _integers(field: str, values: Iterable[object]) -> tuple[int, ...]:
    """Return the values as ints, or raise a TypeError that names the field."""
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{field} must hold integers, got {value!r}")
    return tuple(operator.index(value) for value in values)  # type: ignore[arg-type]


def _ids(field: str, values: Iterable[object]) -> tuple[int, ...]:
    """Return token ids as a tuple, or raise an error that names the field."""
    ids = _integers(field, values)
    _require(field, ids, all(i >= 0 for i in ids), "made of ids that are at least 0")
    return ids


def _texts(field: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several strings as a tuple, or raise an error that names the field."""
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{field} must be a string or a list of strings, got {value!r}")
    _require(field, value, "" not in texts, "made of strings that are not empty")
    return texts


def _biases(value: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return pairs of id and bias in the order of the ids."""
    pairs = dict(value.items() if isinstance(value, Mapping) else value)
    ids = _ids("logit_bias", pairs)
    numbers = [float(_number("logit_bias", number)) for number in pairs.values()]
    _require("logit_bias", value, all(number < math.inf for number in numbers), "finite or -inf")
    return tuple(sorted(zip(ids, numbers, strict=True)))


def _require(field: str, value: object, legal: bool, rule: str) -> None:
    """Raise a ValueError that names the field and what is legal."""
    if not legal:
        raise ValueError(f"{field} must be {rule}, got {value!r}")
