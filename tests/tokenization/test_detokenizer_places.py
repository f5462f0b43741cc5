"""Text behind a prompt, and where each token begins in it: against references worked out the slow way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from max_ray.tokenization.token_bytes import token_text_of
from tests.tokenization.kinds import WRITERS, Kind


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind.make(request.param, tmp_path_factory.mktemp("kinds"))


def located(kind: Kind, prompt: list[int], ids: list[int]) -> tuple[list[str], list[int]]:
    detokenizer = token_text_of(kind.tokenizer).detokenizer(prompt)
    pieces, places = [], []
    for token in ids:
        piece, found = detokenizer.locate(token)
        pieces.append(piece)
        places += found
    piece, found = detokenizer.flush_located()
    return [*pieces, piece], places + found


def test_the_reference_is_what_the_tokenizer_decodes(kind: Kind) -> None:
    ids = kind.ids("ab a\u00e9 b\u4f60\U0001f600ab a")
    assert kind.text(ids) == kind.tokenizer.decode_ids(ids, True)


def test_text_from_the_beginning(kind: Kind) -> None:
    generator = random.Random(1)
    for _ in range(200):
        ids = kind.random_ids(generator, generator.randint(0, 60))
        pieces, places = located(kind, [], ids)
        assert "".join(pieces) == kind.text(ids)
        if kind.name != "byte_sequence":  # there, broken bytes have no place of their own
            assert places == kind.offsets(ids)


def test_text_behind_a_prompt(kind: Kind) -> None:
    """Whatever the prompt ends with: nothing is lost, nothing is doubled."""
    generator = random.Random(2)
    for _ in range(200):
        prompt = kind.random_ids(generator, generator.randint(1, 30))
        ids = kind.random_ids(generator, generator.randint(0, 30))
        shown = kind.settled(prompt)
        detokenizer = token_text_of(kind.tokenizer).detokenizer(prompt)
        assert detokenizer.num_unsettled == len(kind.text(prompt)) - len(shown)
        pieces = [detokenizer.push([token]) for token in ids]
        assert shown + "".join(pieces) + detokenizer.flush() == kind.text(prompt + ids)
        places = located(kind, prompt, ids)[1]
        if kind.name != "byte_sequence":
            assert [len(shown) + place for place in places] == kind.offsets(prompt + ids)[len(prompt) :]


def test_special_tokens_do_not_push_the_context_out(kind: Kind) -> None:
    """A word behind many special tokens keeps its space."""
    for number in range(1, 40):
        prompt = kind.ids("ab a")
        ids = [1 + number % 2] * number + kind.ids("a b")
        expected = kind.text(prompt + ids)[len(kind.text(prompt)) :]
        assert "".join(located(kind, prompt, ids)[0]) == expected
        assert "".join(located(kind, prompt + ids[:number], ids[number:])[0]) == expected


def test_a_word_behind_long_garbage_keeps_its_space(tmp_path: Path) -> None:
    kind = Kind.make("byte_fallback", tmp_path)
    lead_byte = kind.tokenizer.encode_text("\u00e9", False).tolist()[1]
    word = kind.ids("a a")[-1]
    text = "".join(located(kind, kind.ids("a"), [lead_byte] * 100 + [word])[0])
    assert text == "\ufffd" * 100 + " a"
