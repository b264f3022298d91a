import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.engine.rows import StepRows
from qinfer.engine.sampling import SamplerState, SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.models.batch import Batch, Piece, Room

PAGE, WIDTH, ROWS = 4, 5, 4
READ = ("token_ids", "positions", "slots", "query_starts", "context_lens", "logit_rows")


def sequence(number: int, computed: int, pages: list[int]) -> Sequence:
    one = Sequence(
        number, tuple(range(computed + 1)), SamplingParams(), SamplerState(SamplingParams(), ()), pages=pages
    )
    one.num_computed = computed
    return one


@st.composite
def steps(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Which of six sequences sit in the rows of each step, and with which allocation of pages."""
    row = st.tuples(st.integers(0, 5), st.integers(0, 1))
    rows = st.lists(row, min_size=1, max_size=ROWS, unique_by=lambda pair: pair[0])
    return draw(st.lists(rows, min_size=1, max_size=6))


@given(steps(), st.data())
def test_refilled_rows_are_those_of_a_fresh_batch(plan: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    rows = StepRows(Room.of_rows(ROWS), table_width=WIDTH, page_size=PAGE, pin=False)
    for step in plan:
        sequences = []
        for number, allocation in step:
            computed = data.draw(st.integers(0, WIDTH * PAGE - 1))
            # One allocation of a sequence only ever grows.
            pages = [100 * number + 10 * allocation + i for i in range(computed // PAGE + 1)]
            one = sequence(number, computed, pages)
            one.allocation = allocation
            sequences.append(one)
        got = rows.fill(sequences)
        pieces = [Piece(one.pending(1), one.num_computed, one.pages, "last") for one in sequences]
        want = Batch.build(pieces, page_size=PAGE, device="cpu", pad_to=Room.of_rows(ROWS), table_width=WIDTH)
        for name in READ:
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for row, one in enumerate(sequences):
            assert torch.equal(got.page_table[row, : len(one.pages)], want.page_table[row, : len(one.pages)])


@given(steps(), st.data())
def test_streams_and_pieces_are_those_of_a_fresh_batch(plan: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    room = Room(24, ROWS + 3, ROWS + 2, 24)
    rows = StepRows(room, table_width=WIDTH, page_size=PAGE, pin=False)
    for step in plan:
        streams = [sequence(number, data.draw(st.integers(0, 19)), [*range(10 * number, 10 * number + 5)])
                   for number, _ in step]  # fmt: skip
        prompts = data.draw(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), max_size=2))
        pages = [[100 * (row + 1) + i for i in range(WIDTH)] for row in range(2)]
        pieces = [Piece([*range(5, 5 + count)], start, pages[row], data.draw(st.sampled_from(["last", "none"])))
                  for row, (count, start) in enumerate(prompts)]  # fmt: skip
        got = rows.fill(streams, pieces)
        whole = [Piece(one.pending(1), one.num_computed, one.pages, "last") for one in streams] + pieces
        want = Batch.build(whole, page_size=PAGE, device="cpu", pad_to=room, table_width=WIDTH)
        for name in READ:
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for row, piece in enumerate(whole):
            count = -(-(piece.start + len(piece.token_ids)) // PAGE)
            assert torch.equal(got.page_table[row, :count], want.page_table[row, :count])


def test_the_same_streams_again_are_filled_with_their_new_positions() -> None:
    rows = StepRows(Room.of_rows(2), table_width=WIDTH, page_size=PAGE, pin=False)
    streams = [sequence(0, 3, [7, 8]), sequence(1, 5, [9, 10, 11])]
    for step in range(4):
        got = rows.fill(streams)
        assert got.positions.tolist() == [3 + step, 5 + step]
        assert got.context_lens.tolist() == [4 + step, 6 + step]
        assert got.slots.tolist() == [31 + step, 41 + step]
        for one in streams:
            one.generated.append(step)
            one.num_computed += 1


def test_batch_stays_while_the_next_one_is_filled() -> None:
    rows = StepRows(Room.of_rows(1), table_width=WIDTH, page_size=PAGE, pin=False)
    first = rows.fill([sequence(0, 3, [7])])
    rows.fill([sequence(1, 2, [9])])
    assert (first.token_ids.tolist(), first.slots.tolist()) == ([3], [31])


def test_newest_token_may_be_known_to_the_device_alone() -> None:
    one = sequence(0, 3, [7])
    one.num_computed, one.source = 4, 2
    assert (one.newest, one.num_pending, list(one.pending(1))) == (-3, 1, [-3])
    one.generated, one.source, one.num_computed = [50, 60], 0, 3
    assert list(one.pending(4)) == [3, 50, 60, -1]


def test_a_buffer_is_filled_again_once_it_was_read() -> None:
    rows = StepRows(Room.of_rows(ROWS), table_width=WIDTH, page_size=PAGE, pin=False)
    read: list[tuple[int, list[int]]] = []
    for step in range(5):
        batch = rows.fill([sequence(0, step, [0, 1])])

        def wait(step: int = step, batch: Batch = batch) -> None:
            read.append((step, batch.positions.tolist()))

        rows.launched(wait)
    assert read == [(step, [step, 0, 0, 0]) for step in range(3)]
