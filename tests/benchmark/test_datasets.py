"""Data: lengths, what is shared, what is repeatable, the ShareGPT format, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from max_ray.benchmark.datasets import Conversation, DataSettings, build_dataset
from max_ray.benchmark.words import WORDS, CommonWords, TokenizerWords, Words
from max_ray.errors import ConfigError
from max_ray.serve.serve_config import DEMO_MODEL
from max_ray.tokenization.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(DEMO_MODEL, max_length=10_000)


@pytest.fixture(scope="module")
def exact() -> TokenizerWords:
    return TokenizerWords(DEMO_MODEL, with_special_tokens=True)


def build(words: Words | None = None, **settings: Any) -> list[Conversation]:
    return build_dataset(DataSettings(**settings), words or CommonWords())


def texts(conversations: list[Conversation]) -> list[str]:
    return [turn.text for conversation in conversations for turn in conversation]


def test_words_are_many_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 500


def test_random_data_has_the_lengths_asked_for_and_no_two_alike() -> None:
    data = build(num_prompts=20, input_len=33, output_len=5)
    assert [len(text.split()) for text in texts(data)] == [33] * 20
    assert {turn.output_len for conversation in data for turn in conversation} == {5}
    assert len(set(texts(data))) == 20


def test_a_seed_repeats_and_another_or_a_warm_up_does_not() -> None:
    settings = DataSettings(num_prompts=3, seed=5)
    data = build_dataset(settings, CommonWords())
    assert data == build_dataset(settings, CommonWords())
    assert not set(texts(data)) & set(texts(build(num_prompts=3, seed=6)))
    assert not set(texts(data)) & set(texts(build_dataset(settings, CommonWords(), purpose="warm-up")))


def test_a_shared_prefix_is_shared_and_counted() -> None:
    data = texts(build(dataset="shared-prefix", num_prompts=5, prefix_len=30, input_len=40))
    assert {len(text.split()) for text in data} == {40}
    assert len({tuple(text.split()[:30]) for text in data}) == 1
    assert len({tuple(text.split()[30:]) for text in data}) == 5


def test_turns() -> None:
    data = build(dataset="multi-turn", num_prompts=3, turns=2, input_len=4, output_len=6)
    assert [len(conversation) for conversation in data] == [2, 2, 2]
    assert len(set(texts(data))) == 6


@pytest.mark.parametrize("length", [2, 3, 17, 256])
def test_a_tokenizer_makes_the_count_exact(exact: TokenizerWords, tokenizer: TextTokenizer, length: int) -> None:
    for text in texts(build(exact, num_prompts=5, input_len=length)):
        assert len(tokenizer.encode_text(text)) == exact.count(text) == length


def test_a_tokenizer_makes_shared_prefixes_exact(exact: TokenizerWords, tokenizer: TextTokenizer) -> None:
    data = texts(build(exact, dataset="shared-prefix", num_prompts=4, prefix_len=50, input_len=70))
    ids = [tokenizer.encode_text(text).tolist() for text in data]
    assert {len(row) for row in ids} == {70}
    assert len({tuple(row[:50]) for row in ids}) == 1
    assert len({tuple(row) for row in ids}) == 4


def test_without_special_tokens_all_of_the_count_is_text(tokenizer: TextTokenizer) -> None:
    plain = TokenizerWords(DEMO_MODEL, with_special_tokens=False)
    (text,) = texts(build(plain, num_prompts=1, input_len=12))
    assert len(tokenizer.encode_text(text, add_special_tokens=False)) == plain.count(text) == 12


def test_a_length_that_cannot_be_reached(exact: TokenizerWords, tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode_text("")) == 1  # so one token leaves nothing for text
    with pytest.raises(ConfigError, match="No prompt of exactly 1 tokens"):
        build(exact, num_prompts=1, input_len=1)


def said(*lines: str) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(lines)
    return {"conversations": [{"from": who, "value": line} for who, line in zip(speakers, lines, strict=False)]}


SHAREGPT: list[Any] = [
    said("one question", "x" * 40, "second question", "y" * 80, "third, unanswered"),
    {"messages": [{"role": "system", "content": "be kind"}, *(
        {"role": role, "content": f"openai {role}"} for role in ("user", "assistant"))]},
    {"conversations": [{"from": "gpt", "value": "speaks first"}, {"from": "human", "value": "no"}]},
    said("only a question"),
    said("empty answer", ""),
    {"conversations": []},
    "not an object",
    said("long", "z" * 40_000),
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "share.json"
    path.write_text(json.dumps(SHAREGPT))
    return path


def test_sharegpt(file: Path) -> None:
    data = build(dataset="sharegpt", dataset_path=str(file), num_prompts=2)
    assert sorted((t.text, t.output_len) for c in data for t in c) == [("one question", 10), ("openai user", 4)]
    data = build(dataset="sharegpt", dataset_path=str(file), num_prompts=3, turns=5, output_len=3)
    turns = sorted([turn.text for turn in conversation] for conversation in data)
    assert turns == [["long"], ["one question", "second question"], ["openai user"]]  # its long answer is not asked for
    assert {turn.output_len for conversation in data for turn in conversation} == {3}


def test_sharegpt_lengths(file: Path) -> None:
    data = build(dataset="sharegpt", dataset_path=str(file), num_prompts=3, max_total_len=20_000)
    assert max(turn.output_len for conversation in data for turn in conversation) == 10_000
    with pytest.raises(ConfigError, match=r"has 2 usable conversations, and --num-prompts asks for 3\."):
        build(dataset="sharegpt", dataset_path=str(file), num_prompts=3)


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("{}", "must hold a JSON list")])
def test_files_that_are_no_sharegpt(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        build(dataset="sharegpt", dataset_path=str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        build(dataset="sharegpt", dataset_path=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset": "sonnet"}, "--dataset must be one of random"),
        ({"prefix_len": 5}, "--dataset random has no --prefix-len"),
        ({"turns": 2}, "--dataset random has no --turns"),
        ({"dataset": "sharegpt", "dataset_path": "f", "input_len": 2}, "--dataset sharegpt has no --input-len"),
        ({"dataset": "sharegpt"}, "needs --dataset-path"),
        ({"dataset": "shared-prefix", "prefix_len": 8, "input_len": 8}, "--prefix-len must be smaller"),
        ({"num_prompts": 0}, "--num-prompts must be at least 1"),
        ({"output_len": 0}, "--output-len must be at least 1"),
    ],
)
def test_refusals(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataSettings(**settings)
