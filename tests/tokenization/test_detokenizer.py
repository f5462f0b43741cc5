"""Incremental detokenization equals decoding at once; stop strings do not depend on how the text was cut."""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max_ray.tokenization.detokenizer import IncrementalDetokenizer, StopStringMatcher
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import BYTE_OFFSET, VOCAB_SIZE, write_byte_fallback, write_byte_level


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("level")), max_length=64)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_fallback(tmp_path_factory.mktemp("fallback")), max_length=64)


def pieces_of(tokenizer: TextTokenizer, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(partial(tokenizer.decode_ids, skip_special_tokens=skip))
    return [*[detokenizer.push([token]) for token in ids], detokenizer.flush()]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), skip=st.booleans())
def test_unicode_text_byte_level(byte_level: TextTokenizer, text: str, skip: bool) -> None:
    ids = byte_level.encode_text(text).tolist()
    pieces = pieces_of(byte_level, ids, skip=skip)
    assert "".join(pieces) == byte_level.decode_ids(ids, skip)
    if "\ufffd" not in text:
        assert pieces[-1] == "", "whole characters wait for nothing"


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=200), skip=st.booleans())
def test_any_ids_byte_level(byte_level: TextTokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(pieces_of(byte_level, ids, skip=skip)) == byte_level.decode_ids(ids, skip)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab \u00e9\u4f60\U0001f600", max_size=60))
def test_unicode_text_byte_fallback(byte_fallback: TextTokenizer, text: str) -> None:
    ids = byte_fallback.encode_text(text, add_special_tokens=False).tolist()
    assert "".join(pieces_of(byte_fallback, ids, skip=True)) == byte_fallback.decode_ids(ids, True) == text


def test_a_character_comes_out_with_its_last_byte(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode_text("a\U0001f600b", add_special_tokens=False).tolist()
    assert pieces_of(byte_level, ids, skip=True) == ["a", "", "", "", "\U0001f600", "b", ""]


def test_space_after_the_window_was_cut(byte_fallback: TextTokenizer) -> None:
    text = "a a ab a b " * 20
    ids = byte_fallback.encode_text(text, add_special_tokens=False).tolist()
    pieces = pieces_of(byte_fallback, ids, skip=True)
    assert "".join(pieces) == text
    assert all(pieces[:-1]), "every one of these tokens shows at once"


def test_garbage_is_not_held_for_ever(byte_level: TextTokenizer) -> None:
    detokenizer = IncrementalDetokenizer(partial(byte_level.decode_ids, skip_special_tokens=True))
    lead_byte = byte_level.encode_text("\u00e9", add_special_tokens=False).tolist()[0]
    shown = sum(len(detokenizer.push([lead_byte])) for _ in range(1000))
    assert shown >= 1000 - 64


def test_work_per_token_does_not_grow(byte_level: TextTokenizer) -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level.decode_ids(ids, True)

    detokenizer = IncrementalDetokenizer(decode)
    generator = random.Random(0)
    detokenizer.push([BYTE_OFFSET + generator.randrange(256) for _ in range(5000)])
    assert longest <= 80


def naive_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        endings = [s for s in stop if text[:end].endswith(s)]
        if endings:
            longest = max(endings, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run_matcher(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stop)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    cuts=st.randoms(use_true_random=False),
)
def test_stop_strings_equal_the_naive_search(text: str, stop: list[str], cuts: random.Random) -> None:
    pieces, rest = [], text
    while rest:
        length = cuts.randint(1, 4)
        pieces.append(rest[:length])
        rest = rest[length:]
    assert run_matcher(pieces, tuple(stop)) == naive_stop(text, tuple(stop))


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["on", "e E", "ND two"], ("END",), "one "),
        (["E", "N", "D"], ("END",), ""),
        (["abc"], ("b", "abc"), "a"),
        (["xab"], ("b", "ab"), "x"),
        (["aab"], ("ab",), "a"),
        (["EN", "E", "ND"], ("END",), "EN"),
    ],
)
def test_stop_string_borders(pieces: list[str], stop: tuple[str, ...], shown: str) -> None:
    assert run_matcher(pieces, stop)[0] == shown


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopStringMatcher(("END",))
    assert [matcher.push(p) for p in ("x", "E", "N", "x", "E")] == ["x", "", "", "ENx", ""]
    assert matcher.flush() == "E"
    assert matcher.matched is None


def test_no_stop_strings_hold_nothing() -> None:
    assert StopStringMatcher(()).push("text") == "text"


def test_fixture_folders_are_tokenizers_of_their_kind(byte_level: TextTokenizer, byte_fallback: TextTokenizer) -> None:
    assert "ByteLevel" in byte_level.decoder_description()
    assert "ByteFallback" in byte_fallback.decoder_description()
