import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.models.batch import Batch, Piece, Room

FIELDS = ("token_ids", "positions", "slots", "query_starts", "context_lens", "logit_rows", "page_table")


def test_two_pieces_by_hand() -> None:
    chunk = Piece(token_ids=[11, 12, 13], start=3, pages=[7, 2], wants_logits="last")
    fresh = Piece(token_ids=[20, 21], start=0, pages=[5, 6], wants_logits="all")
    batch = Batch.build([chunk, fresh], page_size=4, device="cpu")
    assert batch.token_ids.tolist() == [11, 12, 13, 20, 21]
    assert batch.positions.tolist() == [3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4, 5 * 4 + 1]
    assert batch.query_starts.tolist() == [0, 3, 5]
    assert batch.context_lens.tolist() == [6, 2]
    assert batch.logit_rows.tolist() == [2, 3, 4]
    # The second page of the second piece is not needed yet, so it is not in the table.
    assert batch.page_table.tolist() == [[7, 2], [5, -1]]
    assert batch.max_query_len == 3
    assert all(getattr(batch, field).dtype == torch.int32 for field in FIELDS)


def test_fields_are_aligned_views_of_one_buffer() -> None:
    batch = Batch.build([Piece([1, 2, 3], 0, [0], "all")], page_size=16, device="cpu")
    start = batch.buffer.data_ptr()
    for field in FIELDS:
        view = getattr(batch, field)
        assert view.untyped_storage().data_ptr() == batch.buffer.untyped_storage().data_ptr()
        assert (view.data_ptr() - start) % 16 == 0
    sizes = {"T": 3, "B": 1, "W": 1, "R": 3}
    assert batch.buffer.shape == (Batch.buffer_length(**sizes),)


def test_copied_buffer_gives_the_same_batch() -> None:
    pieces = [Piece([4], 5, [3], "last"), Piece([6], 17, [1, 9], "last")]
    batch = Batch.build(pieces, page_size=16, device="cpu", pad_to=Room.of_rows(4), table_width=3)
    sizes = {"T": 4, "B": 4, "W": 3, "R": 4}
    static = Batch.views(torch.full((Batch.buffer_length(**sizes),), 99, dtype=torch.int32), **sizes, max_query_len=1)
    static.buffer.copy_(batch.buffer)
    for field in FIELDS:
        assert torch.equal(getattr(static, field), getattr(batch, field)), field


def test_padding_rows() -> None:
    batch = Batch.build([Piece([4], 5, [3], "last")], page_size=16, device="cpu", pad_to=Room.of_rows(3), table_width=2)
    assert batch.token_ids.tolist() == [4, 0, 0]
    assert batch.positions.tolist() == [5, 0, 0]
    assert batch.slots.tolist() == [53, -1, -1]
    assert batch.query_starts.tolist() == [0, 1, 2, 3]
    assert batch.context_lens.tolist() == [6, 0, 0]
    assert batch.logit_rows.tolist() == [0, 1, 2]
    assert batch.page_table.tolist() == [[3, -1], [-1, -1], [-1, -1]]


def test_room_for_a_mixed_step() -> None:
    pieces = [Piece([4], 5, [3], "last"), Piece([6, 7, 8], 0, [1], "none")]
    assert Room.of_pieces(pieces) == Room(4, 2, 1, 3)
    assert Room.of_pieces(pieces, num_streams=5) == Room(9, 7, 6, 3)
    batch = Batch.build(pieces, page_size=16, device="cpu", pad_to=Room(9, 4, 3, 8), table_width=2)
    assert batch.max_query_len == 8, "as for any step of this room"
    assert batch.token_ids.tolist() == [4, 6, 7, 8, 0, 0, 0, 0, 0]
    assert batch.slots.tolist() == [53, 16, 17, 18, -1, -1, -1, -1, -1]
    assert batch.query_starts.tolist() == [0, 1, 4, 5, 9], "the last sequence takes what padding is left"
    assert batch.context_lens.tolist() == [6, 3, 0, 0]
    assert batch.logit_rows.tolist() == [0, 4, 5]
    full = Batch.build(pieces, page_size=16, device="cpu", pad_to=Room(4, 4, 4, 3), table_width=2)
    assert (full.query_starts.tolist(), full.logit_rows.tolist()) == ([0, 1, 4, 4, 4], [0, 3, 3, 3])


def test_no_logits_gives_no_rows() -> None:
    batch = Batch.build([Piece([4, 5], 0, [0], "none")], page_size=16, device="cpu")
    assert batch.logit_rows.shape == (0,)


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([], {}, "at least one piece"),
        ([Piece([], 0, [0], "last")], {}, "piece 0 must have at least one token"),
        ([Piece([1], 0, [0], "last"), Piece([1], -1, [0], "last")], {}, "piece 1 must start at 0 or later, got -1"),
        ([Piece([1, 2], 15, [0], "last")], {}, "must have 2 pages of 16 tokens for 17 tokens, got 1"),
        (
            [Piece([1], 16, [0, -1], "last")],
            {},
            r"piece 0 must be at least 0, or -1 before its first .*, got \[0, -1\]",
        ),
        ([Piece([1], 0, [0], "some")], {}, "got 'some'"),
        (
            [Piece([1], 0, [0], "last")] * 3,
            {"pad_to": Room.of_rows(2)},
            r"room for Room\(tokens=3, sequences=3, logits=3, longest=1\)",
        ),
        (
            [Piece([1, 2], 0, [0], "last")],
            {"pad_to": Room(1, 2, 2, 2)},
            r"room for Room\(tokens=2, .* got Room\(tokens=1",
        ),
        ([Piece([1, 2], 0, [0], "all")], {"pad_to": Room(2, 2, 1, 2)}, r"room for Room\(.* logits=2, longest=2\), got"),
        ([Piece([1, 2], 0, [0], "last")], {"pad_to": Room(5, 1, 1, 5)}, "must have a sequence for 3 tokens of padding"),
        ([Piece([1], 16, [0, 1], "last")], {"table_width": 1}, "table_width must be at least 2"),
    ],
)
def test_bad_pieces(pieces: list[Piece], options: dict[str, Room | int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.build(pieces, page_size=16, device="cpu", **options)


@pytest.mark.parametrize("buffer", [torch.zeros(3, dtype=torch.int32), torch.zeros(32, dtype=torch.int64)])
def test_views_refuse_another_buffer(buffer: torch.Tensor) -> None:
    assert Batch.buffer_length(T=1, B=1, W=1, R=1) == 32
    with pytest.raises(ValueError, match=r"buffer must be \[32\] int32"):
        Batch.views(buffer, T=1, B=1, W=1, R=1, max_query_len=1)


@given(
    page_size=st.sampled_from([1, 4, 16]),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_token_has_its_own_slot_in_its_own_page(
    page_size: int, spans: list[tuple[int, int]], data: st.DataObject
) -> None:
    counts = [-(-(start + length) // page_size) for start, length in spans]
    pool = data.draw(st.permutations(range(sum(counts))))
    pieces = []
    for (start, length), count in zip(spans, counts, strict=True):
        pages, pool = pool[:count], pool[count:]
        pieces.append(Piece(list(range(length)), start, pages, "last"))
    batch = Batch.build(pieces, page_size=page_size, device="cpu")
    assert len(set(batch.slots.tolist())) == len(batch.slots)
    for row, piece in enumerate(pieces):
        first, last = batch.query_starts[row : row + 2].tolist()
        for token in range(first, last):
            position = piece.start + token - first
            assert batch.positions[token] == position
            page, offset = divmod(int(batch.slots[token]), page_size)
            assert page == piece.pages[position // page_size] == batch.page_table[row, position // page_size]
            assert offset == position % page_size
        assert batch.context_lens[row] == piece.start + len(piece.token_ids)
        assert batch.logit_rows[row] == last - 1
