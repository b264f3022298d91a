from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from qinfer.engine.bans import TokenTexts
from qinfer.engine.text import UNFINISHED, Detokenizer, StopMatcher
from tests.engine.mock import VOCAB, Adapter, byte_level

CORPUS = [
    "The fox said hello to the owl, and the owl said hello to the fox.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "東京 京都 大阪 🦊🦉🦊 naïve café — “quoted”",
]


def word_pieces() -> Adapter:
    """A tokenizer in the style of Llama 2: '▁' is a space, the first one is dropped, unknown bytes are tokens."""
    pieces = ["<unk>", "<s>", "▁", "▁the", "▁owl", "fox", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Adapter(tokenizer)


BYTE_LEVEL, WORD_PIECES = byte_level(CORPUS), word_pieces()
BYTE_IDS = [2 + index for index in range(256)]
any_ids = st.lists(st.one_of(st.integers(0, VOCAB - 1), st.sampled_from(BYTE_IDS), st.integers(0, 1)), max_size=60)


def pushed(tokenizer: Adapter, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


# --- detokenizer


def test_vocabulary_has_the_bytes_where_the_tests_expect_them() -> None:
    assert BYTE_LEVEL.tokenizer.get_vocab_size() == VOCAB
    assert all(len(BYTE_LEVEL.tokenizer.id_to_token(token)) == 1 for token in BYTE_IDS)


@given(any_ids)
def test_pieces_join_to_the_whole(ids: list[int]) -> None:
    assert "".join(pushed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=12), any_ids)
def test_pieces_join_to_the_whole_after_a_prompt(prompt: list[int], ids: list[int]) -> None:
    before = BYTE_LEVEL.decode(prompt).rstrip(UNFINISHED)
    assert before + "".join(pushed(BYTE_LEVEL, ids, prompt)) == BYTE_LEVEL.decode(prompt + ids)


class Unsure(Adapter):
    """The same tokenizer, which knows of no id that its text does not depend on its neighbours."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter.tokenizer)
        self.own_texts = defaultdict(lambda: None)


word_ids = st.lists(st.one_of(st.integers(0, 5), st.integers(0, WORD_PIECES.vocab_size - 1)), max_size=60)


@given(any_ids, any_ids)
def test_texts_that_are_kept_are_those_that_would_be_decoded(prompt: list[int], ids: list[int]) -> None:
    assert pushed(BYTE_LEVEL, ids, prompt[:8]) == pushed(Unsure(BYTE_LEVEL), ids, prompt[:8])


@given(word_ids, word_ids)
def test_texts_that_are_kept_drop_no_space(prompt: list[int], ids: list[int]) -> None:
    assert pushed(WORD_PIECES, ids, prompt[:8]) == pushed(Unsure(WORD_PIECES), ids, prompt[:8])


def test_known_texts_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = BYTE_LEVEL.encode(CORPUS[0] * 3)
    detokenizer = Detokenizer(BYTE_LEVEL)
    told = [detokenizer.push(token) for token in ids]
    detokenizer = Detokenizer(BYTE_LEVEL, ids[:1])
    assert detokenizer.push(ids[1]) == told[1]
    monkeypatch.setattr(detokenizer, "_decode", None)
    assert [detokenizer.push(token) for token in ids[2:]] == told[2:]


def test_decoders_that_look_at_neighbours_keep_nothing() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL.tokenizer.to_str())
    for decoder in (decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC(), decoders.Strip(" ", 0, 1)):
        tokenizer.decoder = decoder
        assert Adapter(tokenizer).own_texts[BYTE_IDS[40]] is None
    assert BYTE_LEVEL.own_texts[BYTE_IDS[40]] is not None
    assert BYTE_LEVEL.own_texts[0] is None, "a special token"


@given(st.text(max_size=30))
def test_pieces_of_text_are_whole_characters(text: str) -> None:
    pieces = pushed(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(pieces) == text
    assert UNFINISHED in text or not any(UNFINISHED in piece for piece in pieces)


@pytest.mark.parametrize("byte", ["Ł", "¤", "ð"])  # a lone continuation byte, and the first bytes of 3 and 4
def test_window_stays_short_in_a_run_of_broken_bytes(byte: str) -> None:
    token = BYTE_LEVEL.tokenizer.token_to_id(byte)
    BYTE_LEVEL.longest = 0
    pieces = pushed(BYTE_LEVEL, [token] * 300)
    assert BYTE_LEVEL.longest < 20
    assert "".join(pieces) == BYTE_LEVEL.decode([token] * 300)


@pytest.mark.parametrize("length", range(8, 40))
def test_characters_behind_a_run_of_broken_bytes(length: int) -> None:
    stray, *fox = (BYTE_LEVEL.tokenizer.token_to_id(byte) for byte in ("Ł", "ð", "Ł", "¦", "Ĭ"))
    ids = [stray] * length + fox * 3
    assert "".join(pushed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == "\ufffd" * length + "🦊🦊🦊"


def test_window_stays_short_in_text_and_among_special_tokens() -> None:
    ids = BYTE_LEVEL.encode(CORPUS[0]) + [0] * 100 + BYTE_LEVEL.encode(CORPUS[2]) * 5
    expected = BYTE_LEVEL.decode(ids)
    BYTE_LEVEL.longest = 0
    assert "".join(pushed(BYTE_LEVEL, ids)) == expected
    assert BYTE_LEVEL.longest < 20


def test_special_tokens_are_silent() -> None:
    hello = BYTE_LEVEL.encode("hello")
    assert "".join(pushed(BYTE_LEVEL, [0, *hello, 1, 1, *hello, 0])) == "hellohello"


def test_special_tokens_between_the_bytes_of_a_character() -> None:
    first, second, third = (BYTE_LEVEL.tokenizer.token_to_id(byte) for byte in ("â", "Ĥ", "¬"))
    ids = [first, *[0] * 50, second, *[1] * 50, third]
    BYTE_LEVEL.longest = 0
    assert "".join(pushed(BYTE_LEVEL, ids)) == "€"
    assert BYTE_LEVEL.longest < 20


def test_leading_space_belongs_to_the_text_after_a_prompt() -> None:
    the, owl, start, space = (WORD_PIECES.tokenizer.token_to_id(piece) for piece in ("▁the", "▁owl", "<s>", "▁"))
    assert pushed(WORD_PIECES, [owl, the, owl], [start, the]) == [" owl", " the", " owl", ""]
    assert pushed(WORD_PIECES, [the, owl]) == ["the", " owl", ""]
    assert pushed(WORD_PIECES, [the, start, owl]) == ["the", "", " owl", ""]
    assert "".join(pushed(WORD_PIECES, [space, the, space, owl])) == WORD_PIECES.decode([space, the, space, owl])


def test_characters_from_byte_tokens() -> None:
    fox = [WORD_PIECES.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🦊é🦊".encode()]
    assert [piece for piece in pushed(WORD_PIECES, fox) if piece] == ["🦊", "é", "🦊"]


def test_character_that_the_prompt_leaves_unfinished() -> None:
    first, second = (BYTE_LEVEL.tokenizer.token_to_id(byte) for byte in ("Ã", "©"))
    assert pushed(BYTE_LEVEL, [second], [first]) == ["é", ""]


# --- stop strings


def feed(stops: Sequence[str], chunks: Sequence[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    return "".join([*(matcher.push(chunk) for chunk in chunks), matcher.flush()]), matcher.matched


def test_stop_across_borders() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(chunk) for chunk in ("xE", "N", "xEN", "Dy", "z")] == ["x", "", "ENx", "", ""]
    assert matcher.matched
    assert matcher.flush() == ""


def test_withheld_text_comes_at_the_end() -> None:
    assert feed(["END"], ["so EN"]) == ("so EN", False)


def test_first_complete_stop_wins_and_the_longest_of_those() -> None:
    assert feed(["bc", "abcd"], ["xabcd"]) == ("xa", True)
    assert feed(["bc", "abc"], ["xabc"]) == ("x", True)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first complete stop, one character at a time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


ab = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(ab, max_size=3))
def test_result_does_not_depend_on_the_chunks(chunks: list[str], stops: list[str]) -> None:
    text = "".join(chunks)
    assert feed(stops, chunks) == feed(stops, list(text)) == cut(text, stops)


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(ab, min_size=1, max_size=3))
def test_no_more_is_withheld_than_a_stop_needs(chunks: list[str], stops: list[str]) -> None:
    matcher, shown, seen = StopMatcher(stops), "", ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        seen += chunk
        if not matcher.matched:
            held = seen[len(shown) :]
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


# --- healing


def test_healed_text_is_not_told_again() -> None:
    ids = BYTE_LEVEL.encode("the owl said hello")
    text = BYTE_LEVEL.decode(ids)
    for cut in range(1, len(ids)):
        # The last token of the prompt comes again, and then as another one that begins like it.
        detokenizer = Detokenizer(BYTE_LEVEL, ids[:cut], ids[cut : cut + 1])
        told = "".join(detokenizer.push(token) for token in ids[cut:]) + detokenizer.flush()
        assert BYTE_LEVEL.decode(ids[: cut + 1]) + told == text
    space, word = BYTE_LEVEL.encode(" "), BYTE_LEVEL.encode(" owl")
    assert Detokenizer(BYTE_LEVEL, BYTE_LEVEL.encode("the"), space).push(word[0]) == BYTE_LEVEL.decode(word)[1:]


# --- banned strings


def test_token_with_the_first_banned_character_is_taken_back() -> None:
    ids = [BYTE_LEVEL.encode(letter)[0] for letter in "abcab"]
    texts = TokenTexts(Detokenizer(BYTE_LEVEL), ["bca", "zz"])
    assert [texts.push(token) for token in ids[:3]] == [0, 0, 0]
    assert texts.free() == ["a"]
    assert texts.push(ids[3]) == 3
    # It goes on from before the "b".
    assert [texts.push(BYTE_LEVEL.encode(letter)[0]) for letter in "xb"] == [0, 0]
    assert texts.free() == ["x"]
    assert (texts.flush(), texts.rest(), texts.flush()) == (["b"], "", [])


@given(
    st.lists(st.sampled_from("abcé🦊"), max_size=12), st.lists(st.text("abcé🦊", min_size=1, max_size=3), max_size=3)
)
def test_told_text_never_holds_a_banned_string(letters: list[str], banned: list[str]) -> None:
    ids = BYTE_LEVEL.encode("".join(letters))
    texts, kept, told = TokenTexts(Detokenizer(BYTE_LEVEL), banned), list[int](), ""
    for token in ids:
        kept.append(token)
        count = texts.push(token)
        del kept[len(kept) - count :]
        told += "".join(texts.free())
        assert BYTE_LEVEL.decode(kept).startswith(told)
    told += "".join(texts.flush()) + texts.rest()
    assert told == BYTE_LEVEL.decode(kept)
    assert not any(string in told for string in banned)


def test_no_tokenizer_no_text() -> None:
    texts = TokenTexts(None, ())
    assert (texts.push(3), texts.free(), texts.flush(), texts.rest()) == (0, [""], [], "")
