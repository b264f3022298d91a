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
from qinfer.engine.choices import FixedRows
from qinfer.engine.graphs import GraphRunner
from qinfer.engine.guidance import guided
from qinfer.engine.rows import StepRows
from qinfer.engine.sampling import Logprobs, Row, SamplerState, SamplingParams, logprobs, sample, sample_table
from qinfer.engine.scoring import Scores, copying, take_scores
from qinfer.engine.sequence import Sequence, TokenLogprobs
from qinfer.kernels.feed import feed
from qinfer.models.batch import Batch, Piece, Room
from qinfer.models.decoder import Decoder
from qinfer.models.model import Model
from qinfer.models.rehearsal import rehearsal
from qinfer.parallel.comm import Communicator

Step: TypeAlias = list[tuple[Sequence, int]]


def _sizes(largest: int) -> list[int]:
    """Return numbers of tokens around the powers of two up to the largest, which is the last."""
    powers = [1 << power for power in range(largest.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1, power + 16) if size <= largest} | {largest})


def _piece(sequence: Sequence, count: int) -> Piece:
    """Return the next tokens of a sequence as a piece of a batch."""
    wanted = _wanted_logits(sequence, count)
    return Piece(sequence.pending(count), sequence.num_computed, sequence.pages, wanted, sequence.adapter)


def _streams(step: Step) -> list[Sequence]:
    """Return the sequences at the beginning of a step that compute one token, their newest."""
    count = next((place for place, (one, n) in enumerate(step) if n > 1 or one.num_pending > 1), len(step))
    return [sequence for sequence, _ in step[:count]]


def _asked(sequences: Rows[Sequence], counts: Rows[int]) -> dict[int, int]:
    """Return the rows of sequences that want logprobs, and how many of the likeliest ids each wants to know."""
    asked, row = dict[int, int](), 0
    if all(sequence.params.logprobs is None for sequence in sequences):
        return asked
    for sequence, count in zip(sequences, counts, strict=True):
        wanted = sequence.params.logprobs
        if wanted is not None:
            asked.update(dict.fromkeys(range(row, row + count), wanted))
        row += count
    return asked


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

    sequences: list[Sequence]  # that get tokens, in the order of their rows
    counts: list[int]  # rows of each: one, and one more for each draft
    _ids: Tensor
    _asked: dict[int, int]  # how many of the likeliest ids rows want to know, where they want logprobs
    _logprobs: Logprobs | None
    _arrived: torch.cuda.Event | None
    _comm: Communicator
    scores: list[Scores]  # of prompts, once the ids are there

    def ids(self) -> list[int]:
        """Wait for the ids and return them, one per row, -1 where the logits were not finite.

        To be called before the next ids are sampled, which come to the same place.
        """
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
        columns = (part.tolist() for part in self._logprobs)
        for (row, count), chosen, ids, top in zip(self._asked.items(), *columns, strict=True):
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
        max_step_tokens: int,
    ) -> None:
        """Allocate the buffer that carries ids between steps.

        Args:
            model: The model.
            cache: The pages that its steps read and write.
            page_size: Tokens per page.
            max_batch: Most sequences in a step.
            table_width: Pages of the longest sequence.
            max_step_tokens: Most tokens in a step.
        """
        self._model = model
        self._cache = cache
        self._page_size = page_size
        self._table_width = table_width
        self._max_step_tokens = max_step_tokens
        self._rows: dict[Room, StepRows] = {}
        self._unread: StepRows | None = None  # whose last batch the device may not have read when the last event comes
        self._step: Step = []  # the last one
        self._streams: list[Sequence] = []  # the sequences at its beginning that compute one token
        self._chosen: list[Sequence] = []  # the sequences of the last step that were sampled
        self._fixed: FixedRows | None = None  # their rows, if all of those are fixed
        self._max_batch = max_batch
        self._on_gpu = model.device.type == "cuda"
        self._decoder = model.decoder  # whose steps are recorded
        self._rehearsal: Decoder | None = None  # of it
        self.graphs: GraphRunner | None = None
        if self._on_gpu:
            self.graphs = GraphRunner(
                self._forward,
                cache,
                rehearse=self._rehearse,
                max_batch=max_batch,
                table_width=table_width,
                max_step_tokens=max_step_tokens,
                recorded=model.comm.recorded,
            )
            self._sampled = self.graphs.ids  # where most ids are already
        else:
            self._sampled = torch.zeros(max_batch, dtype=torch.int64, device=model.device)

    @property
    def is_mixed(self) -> bool:
        """Whether the step launched last had pieces of prompts or drafts in it."""
        return len(self._streams) < len(self._step)

    def launch(self, step: Step) -> Launched:
        """Launch the forward pass of a step; sequences count its tokens as computed from now on.

        Args:
            step: Sequences with their number of tokens.
        """
        if step is not self._step:
            self._step, self._streams = step, _streams(step)
        streams, others = self._streams, step[len(self._streams) :]
        complete, scores = streams, list[Scores]()
        if others:
            pieces = [_piece(*other) for other in others]
            logits = self._mixed(streams, pieces)
            if any(sequence.unscored(count) for sequence, count in others):
                logits, scores = take_scores(step, [*(_piece(one, 1) for one in streams), *pieces], logits)
            complete = streams + [sequence for sequence, count in others if count >= sequence.num_pending]
        else:
            logits = self._decode(streams)
        for sequence, count in step:
            sequence.num_computed += count
        return Launched(complete, logits, scores)

    def sample(self, launched: Launched) -> Sampled | None:
        """Launch the choice of the next tokens and their way to the host; None when the step tells nothing."""
        scores = [own.to_host() for own in launched.scores] if self._on_gpu else launched.scores
        sequences, counts, said, drawn = self._choose(launched)
        if not sequences:
            nothing = torch.empty(0, dtype=torch.int64)
            return Sampled([], [], nothing, {}, None, self._arrival(), self._model.comm, scores) if scores else None
        # Rank 0 decides; the others would agree but for the order in which a library adds.
        ids = self._model.comm.broadcast(drawn)
        is_in_place = ids.data_ptr() == self._sampled.data_ptr()
        if not is_in_place:
            # Nobody reads them here when there were drafts: the host has to say first how many were right.
            kept = min(len(ids), len(self._sampled))
            self._sampled[:kept].copy_(ids[:kept])
        asked, told = _asked(sequences, counts) if self._fixed is None else {}, None
        if asked:
            index = torch.tensor([*asked]).to(ids.device, non_blocking=True)
            told = logprobs(said[index], ids[index], max(asked.values()))
        if not self._on_gpu or self.graphs is None:
            return Sampled(sequences, counts, ids, asked, told, None, self._model.comm, scores)
        host = self.graphs.host_ids[: len(ids)]
        if len(host) < len(ids):
            host = copying(ids)
        elif not is_in_place or self._model.comm.size > 1:
            host.copy_(ids, non_blocking=True)
        told = None if told is None else Logprobs(*map(copying, told))
        return Sampled(sequences, counts, host, asked, told, self._arrival(), self._model.comm, scores)

    def _choose(self, launched: Launched) -> tuple[list[Sequence], list[int], Tensor, Tensor]:
        """Sample the next tokens: who gets them, in how many rows, [R, V] what the model says there, and [R] ids."""
        sequences = launched.sequences
        if sequences is not self._chosen:
            is_fixed = all(sequence.sampler.is_fixed and not sequence.drafts for sequence in sequences)
            if not (sequences and is_fixed):
                self._fixed = None
            elif self._fixed is None or sequences != self._chosen:
                self._fixed = FixedRows([sequence.sampler for sequence in sequences])
            self._chosen = sequences
        if self._fixed is not None:
            for row, sequence in enumerate(sequences):
                sequence.source = row
            table = self._fixed.table([len(sequence.generated) for sequence in sequences])
            ids = None if self.graphs is None else self.graphs.choose(launched.logits, self._fixed.choice, table)
            if ids is None:
                ids = sample_table(launched.logits, table)
            return sequences, [1] * len(sequences), launched.logits, ids
        said, logits = guided(sequences, launched.logits)
        leaders = [sequence for sequence in sequences if sequence.id >= 0]
        rows, counts = list[Row](), list[int]()
        for sequence in leaders:
            sequence.await_sample(len(rows))
            if sequence.drafts:
                rows += (own := sequence.rows())
                counts.append(len(own))
            else:
                rows.append(sequence.row())
                counts.append(1)
        return leaders, counts, said, sample(logits, rows) if rows else logits.new_empty(0, dtype=torch.int64)

    def _arrival(self) -> torch.cuda.Event | None:
        """Return the event of what was launched last, for which the host can wait; None on a CPU."""
        if not self._on_gpu:
            return None
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self._model.device))
        if self._unread is not None:
            self._unread.launched(arrived.synchronize)
            self._unread = None
        return arrived

    def warm_up(self) -> None:
        """Compile and record all that steps can ask for; pages and requests stay as they are.

        What runs without a graph is compiled per kind of size: one token, a multiple of 16, and neither, around each
        power of two, for prompts alone and beside streams; and once per way and number of rows of sampling.
        """
        self._forget_moved_adapters()
        adapter = 0 if self._model.loras else -1
        # A whole last page may reach beyond the last position.
        room = min(self._table_width * self._page_size, self._model.config.max_positions)
        # What stands in the pages does not matter, and page 0 is there in any pool.
        single = Piece([0], 0, [0], "last")
        sampled = set[int]()
        for length in _sizes(min(self._max_step_tokens, room)):
            # Attention cuts keys into runs where a step has few programs for many keys.
            for start in {0, room - length}:
                pages = [0] * -(-(start + length) // self._page_size)
                prompt = Piece([0] * length, start, pages, "last", adapter)
                several = [prompt] * min(self._max_batch, self._max_step_tokens // length)
                for pieces in ([prompt], [prompt, single], [single] * (self._max_batch - 1) + [prompt], several):
                    batch = Batch.build(pieces, page_size=self._page_size, device=self._model.device)
                    batch.slots.fill_(-1)
                    logits = self._rehearse(batch, self._cache)
                    if len(logits) not in sampled:
                        sampled.add(len(logits))
                        self._warm_up_sampling(logits)
        # Last, since recording hands back what these steps took and few others will take.
        if self.graphs is not None:
            self.graphs.capture_all(has_adapters=adapter >= 0)
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

    def _rehearse(self, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Run no more of a step than launches every kernel of it; the logits mean nothing."""
        if self._rehearsal is None:
            self._rehearsal = rehearsal(self._decoder, cache)
        feed(batch.token_ids, self._sampled)
        return self._rehearsal(batch, cache)

    def _mixed(self, streams: list[Sequence], pieces: list[Piece]) -> Tensor:
        """Run a step of any pieces behind streams, through a recorded graph where it fits one."""
        used = Room.of_pieces(pieces, num_streams=len(streams))
        room = None if self.graphs is None else self.graphs.mixed_room(used)
        if self.graphs is None or room is None:
            pieces = [_piece(sequence, 1) for sequence in streams] + pieces
            return self._forward(Batch.build(pieces, page_size=self._page_size, device=self._model.device), self._cache)
        self._forget_moved_adapters()
        return self._replay(self.graphs, room, streams, pieces)[: used.logits]

    def _forget_moved_adapters(self) -> None:
        """Forget what was recorded with adapters whose buffers the model has replaced since."""
        if self._decoder is not self._model.decoder:
            self._decoder, self._rehearsal = self._model.decoder, None
            if self.graphs is not None:
                self.graphs.forget_adapters()

    def _decode(self, streams: list[Sequence]) -> Tensor:
        """Run a step of one token per sequence, through a recorded graph where there are graphs."""
        self._forget_moved_adapters()
        if self.graphs is None:
            return self._forward(self._rows_of(Room.of_rows(len(streams))).fill(streams), self._cache)
        room = Room.of_rows(self.graphs.bucket(len(streams)))
        return self._replay(self.graphs, room, streams, ())[: len(streams)]

    def _replay(self, graphs: GraphRunner, room: Room, streams: Rows[Sequence], pieces: Rows[Piece]) -> Tensor:
        """Run a step through a recorded graph."""
        if self._unread is not None:
            # Nobody waits for ids of the step before: it computed a part of a prompt, or is a draft model's.
            self._arrival()
        rows = self._rows_of(room)
        logits = graphs.run(rows.fill(streams, pieces))
        self._unread = rows
        return logits

    def _rows_of(self, room: Room) -> StepRows:
        """Return the buffers of a room, allocated now if there are none yet."""
        if room not in self._rows:
            self._rows[room] = StepRows(
                room, table_width=self._table_width, page_size=self._page_size, pin=self._on_gpu
            )
        return self._rows[room]
