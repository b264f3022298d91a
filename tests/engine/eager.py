"""Steps padded as recorded ones are and computed without graphs: for a CPU, and for graphs to be held against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qinfer.engine.choices import CHOICES, choose
from qinfer.engine.graphs import GraphRunner, _Captured
from qinfer.models.batch import Room


@dataclass
class Replay:
    """What stands in for a graph: it computes again."""

    compute: Callable[[], Tensor]
    out: Tensor

    def replay(self) -> None:
        self.out.copy_(self.compute())


class Eager(GraphRunner):
    """The same padded steps without a graph."""

    def _capture(self, room: Room, *, has_adapters: bool) -> _Captured:
        batch = self._padding(room, has_adapters=has_adapters)
        logits = self._decoder(batch, self._cache)
        assert len(logits) == room.logits
        if not self._captured:
            # Ids that nobody has chosen yet would show.
            self.ids.fill_(-1)
        graph: Any = Replay(lambda: self._decoder(batch, self._cache), logits)
        table, ids = self._table[: room.logits], self.ids[: room.logits]
        choices: Any = {one: Replay(partial(choose, one, logits, table), ids) for one in CHOICES}
        return _Captured(graph, batch, logits, choices)

    @property
    def rooms(self) -> set[Room]:
        """Those that steps have had."""
        return {room for room, _ in self._captured}
