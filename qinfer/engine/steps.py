"""Steps on the device: the next one is launched before the ids of the last one are on the host.

A token that the last step sampled is known to the device first. The host names it by its row, as the id -1 - row, and
the device puts the id in its place before the embedding is read (`feed`). Meanwhile the ids travel to the host, which
reads them while the next step runs:

    device   … │ forward n │ sample n │ forward n + 1           │ sample n + 1 │ …
    host           launch forward n + 1, wait for ids n, launch sample n + 1, text and events of n, schedule n + 2

Sampling is launched after the ids of the step before are known, so a sampler sees the whole history.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.graphs import GraphRunner
from qinfer.engine.guidance import guided
from qinfer.engine.rows import DecodeRows
from qinfer.engine.sampling import Logprobs, Row, SamplerState, SamplingParams, logprobs, sample
from qinfer.engine.scoring import Scores, copying, take_scores
from qinfer.engine.sequence import Sequence, TokenLogprobs
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.model import Model
from qinfer.parallel.comm import Communicator

Step: TypeAlias = list[tuple[Sequence, int]]


def feed(token_ids: Tensor, sampled: Tensor) -> None:
    """Put sampled[r] in the place of every id -1 - r; other ids stay.

    Args:
        token_ids: [T] int32, changed in place.
        sampled: [R] int32 ids, -1 where sampling failed; such a token is computed as id 0, and thrown away later.
    """
    is_known = token_ids >= 0
    rows = token_ids.bitwise_not().masked_fill_(is_known, 0)
    torch.where(is_known, token_ids, sampled.index_select(0, rows).clamp_(min=0), out=token_ids)


def _sizes(largest: int) -> list[int]:
    """Return numbers of tokens around the powers of two up to the largest, which is the last."""
    powers = [1 << power for power in range(largest.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1, power + 16) if size <= largest} | {largest})


def _wanted_logits(sequence: Sequence, count: int) -> Literal["all", "last", "none"]:
    """Say which logits a piece wants: none when tokens stay pending, all for drafts and where a prompt is scored."""
    surplus = count - sequence.num_pending
    if sequence.unscored(count):
        return "all"
    return "none" if surplus < 0 else "all" if surplus else "last"


@dataclass(frozen=True)
class Launched:
    """A step whose logits the device has, or will have."""

    sequences: list[Sequence]  # whose next token the step gives, in the order of the logits
    logits: Tensor  # [R, V], valid until the next launch
    scores: list[Scores]  # of prompts


@dataclass(frozen=True)
class Sampled:
    """A step whose ids are on their way to the host."""

    rows: list[Sequence]  # one after the other; those with drafts have several
    _ids: Tensor
    _asked: list[int]  # rows that want to know their logprobs
    _logprobs: Logprobs | None
    _arrived: torch.cuda.Event | None
    _comm: Communicator
    scores: list[Scores]  # of prompts, once the ids are there

    @property
    def sequences(self) -> list[Sequence]:
        """All that the step told something about."""
        return self.rows + [scores.sequence for scores in self.scores]

    def ids(self) -> list[int]:
        """Wait for the ids and return them, one per row, -1 where the logits were not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids: list[int] = self._ids.tolist()
        # Ids that came through a collective that was aborted may be anything.
        self._comm.check()
        return ids

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Return what the rows that asked for it want to know, once the ids are there."""
        if self._logprobs is None:
            return {}
        told = {}
        for row, chosen, ids, top in zip(self._asked, *(part.tolist() for part in self._logprobs), strict=True):
            count = self.rows[row].params.logprobs
            told[row] = TokenLogprobs(chosen, tuple(zip(ids, top, strict=True))[:count])
        return told


class StepRunner:
    """Runs steps of a model over its pages."""

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        *,
        page_size: int,
        max_batch: int,
        table_width: int,
        max_mixed_tokens: int,
    ) -> None:
        """Allocate the buffers that carry ids between steps and to the host.

        Args:
            model: The model.
            cache: The pages that its steps read and write.
            page_size: Tokens per page.
            max_batch: Most sequences in a step.
            table_width: Pages of the longest sequence.
            max_mixed_tokens: Most prompt tokens in a step in which other sequences decode.
        """
        self._model = model
        self._cache = cache
        self._page_size = page_size
        self._table_width = table_width
        self._decode_rows: dict[int, DecodeRows] = {}
        self._sampled = torch.zeros(max_batch, dtype=torch.int32, device=model.device)
        self._on_gpu = model.device.type == "cuda"
        # Two, because the ids of one step are read after the copy of the next may have been launched.
        self._host_ids = [torch.empty(max_batch, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)]
        self._decoder = model.decoder  # whose steps are recorded
        self.graphs: GraphRunner | None = None
        if self._on_gpu:
            self.graphs = GraphRunner(
                self._forward,
                cache,
                max_batch=max_batch,
                table_width=table_width,
                max_mixed_tokens=max_mixed_tokens + max_batch,
                recorded=model.comm.recorded,
            )

    def launch(self, step: Step) -> Launched:
        """Launch the forward pass of a step; sequences count its tokens as computed from now on.

        Args:
            step: Sequences with their number of tokens.
        """
        complete = [sequence for sequence, count in step if count >= sequence.num_pending]
        scores = list[Scores]()
        if len(complete) == len(step) == sum(count for _, count in step):
            logits = self._decode(complete)
        else:
            pieces = [Piece(s.pending(n), s.num_computed, s.pages, _wanted_logits(s, n), s.adapter) for s, n in step]
            logits = self._mixed(pieces, is_beside_streams=any(s.num_computed >= len(s.prompt) for s, _ in step))
            if any(sequence.unscored(count) for sequence, count in step):
                logits, scores = take_scores(step, pieces, logits)
        for sequence, count in step:
            sequence.num_computed += count
        return Launched(complete, logits, scores)

    def sample(self, launched: Launched) -> Sampled | None:
        """Launch the choice of the next tokens and their way to the host; None when the step tells nothing."""
        rows, options = list[Sequence](), list[Row]()
        said, logits = guided(launched.sequences, launched.logits)
        for sequence in launched.sequences:
            if sequence.is_shadow:
                continue
            sequence.await_sample(len(rows))
            options += (own := sequence.rows())
            rows += [sequence] * len(own)
        scores = [own.to_host() for own in launched.scores] if self._on_gpu else launched.scores
        if not rows:
            nothing = torch.empty(0, dtype=torch.int64)
            return Sampled(rows, nothing, [], None, self._arrival(), self._model.comm, scores) if scores else None
        # Rank 0 decides; the others would agree but for the order in which a library adds.
        ids = self._model.comm.broadcast(sample(logits, options))
        # Nobody reads them here when there were drafts: the host has to say first how many were right.
        kept = min(len(rows), len(self._sampled))
        self._sampled[:kept].copy_(ids[:kept])
        asked = [row for row, sequence in enumerate(rows) if sequence.params.logprobs is not None]
        told = None
        if asked:
            top_n = max(sequence.params.logprobs or 0 for sequence in rows)
            index = torch.tensor(asked).to(ids.device, non_blocking=True)
            told = logprobs(said[index], ids[index], top_n)
        if not self._on_gpu:
            return Sampled(rows, ids, asked, told, None, self._model.comm, scores)
        self._host_ids.reverse()
        room = self._host_ids[0][: len(rows)]
        host = room.copy_(ids, non_blocking=True) if len(room) == len(rows) else copying(ids)
        told = None if told is None else Logprobs(*map(copying, told))
        return Sampled(rows, host, asked, told, self._arrival(), self._model.comm, scores)

    def _arrival(self) -> torch.cuda.Event | None:
        """Return the event of what was launched last, for which the host can wait; None on a CPU."""
        if not self._on_gpu:
            return None
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._model.device))
        return arrived

    def warm_up(self, max_step_tokens: int) -> None:
        """Compile and record all that steps of so many tokens can ask for; pages and requests stay as they are.

        Kernels are compiled per kind of size: one token, a multiple of 16, and neither, around each power of two, for
        prompts alone and beside streams; and once per way of sampling.
        """
        adapter = 0 if self._model.loras else -1
        if self.graphs is not None:
            self._forget_moved_adapters()
            self.graphs.capture_all(has_adapters=adapter >= 0)
        # A whole last page may reach beyond the last position.
        room = min(self._table_width * self._page_size, self._model.config.max_positions)
        max_batch = len(self._sampled)
        # What stands in the pages does not matter, and page 0 is there in any pool.
        single = Piece([0], 0, [0], "last")
        for length in _sizes(min(max_step_tokens, room)):
            # Attention cuts keys into runs where a step has few programs for many keys.
            for start in {0, room - length}:
                pages = [0] * -(-(start + length) // self._page_size)
                prompt = Piece([0] * length, start, pages, "last", adapter)
                several = [prompt] * min(max_batch, max_step_tokens // length)
                for pieces in ([prompt], [prompt, single], [single] * (max_batch - 1) + [prompt], several):
                    batch = Batch.build(pieces, page_size=self._page_size, device=self._model.device)
                    batch.slots.fill_(-1)
                    self._warm_up_sampling(self._forward(batch, self._cache))
        if self._on_gpu:
            torch.cuda.synchronize(self._model.device)

    def _warm_up_sampling(self, logits: Tensor) -> None:
        """Choose tokens in every way that compiles a kernel of its own."""
        for params in (
            SamplingParams(temperature=0),
            SamplingParams(seed=0),
            SamplingParams(seed=0, top_p=0.9, banned_ids=[0]),
        ):
            sample(logits, [SamplerState(params, ()).row(())] * len(logits))

    def _forward(self, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Fill in the ids that only the device knows, and run the decoder."""
        feed(batch.token_ids, self._sampled)
        return self._model.decoder(batch, cache)

    def _mixed(self, pieces: Rows[Piece], *, is_beside_streams: bool) -> Tensor:
        """Run a step of any pieces, through a recorded graph where streams wait for it and it fits."""
        used = Room.of_pieces(pieces)
        room = self.graphs.mixed_room(used) if self.graphs is not None and is_beside_streams else None
        if self.graphs is None or room is None:
            batch = Batch.build(pieces, page_size=self._page_size, device=self._model.device)
            return self._forward(batch, self._cache)
        batch = Batch.build(
            pieces,
            page_size=self._page_size,
            device=self._model.device,
            pad_to=room,
            table_width=self._table_width,
        )
        self._forget_moved_adapters()
        return self.graphs.run(batch)[: used.logits]

    def _forget_moved_adapters(self) -> None:
        """Forget what was recorded with adapters whose buffers the model has replaced since."""
        if self.graphs is not None and self._decoder is not self._model.decoder:
            self._decoder = self._model.decoder
            self.graphs.forget_adapters()

    def _decode(self, sequences: Rows[Sequence]) -> Tensor:
        """Run a step of one token per sequence, through a recorded graph where there are graphs."""
        size = len(sequences) if self.graphs is None else self.graphs.bucket(len(sequences))
        if size not in self._decode_rows:
            self._decode_rows[size] = DecodeRows(
                size, table_width=self._table_width, page_size=self._page_size, pin=self._on_gpu
            )
        batch = self._decode_rows[size].fill(sequences)
        self._forget_moved_adapters()
        logits = self._forward(batch, self._cache) if self.graphs is None else self.graphs.run(batch)
        return logits[: len(sequences)]
