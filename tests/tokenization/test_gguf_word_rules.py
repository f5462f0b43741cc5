"""How the tokenizers that GGUF files hold cut text into words, by `tokenizer.ggml.pre`; and where a text ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from max_ray.errors import WeightsError
from max_ray.gguf import GgufFile, huggingface_values, read_gguf
from max_ray.gguf.tokenizer import build_tokenizer
from tests.gguf_files import make_gguf

PAIRS = ["1 2", "a B", "b a", "\u0120 1", "\u0120 b", "\u0120b a"]


def file_of(rule: str, **keys: Any) -> GgufFile:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(pair.replace(" ", "") for pair in PAIRS), "<|im_end|>", "wo", "two"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": PAIRS,
        "tokenizer.ggml.bos_token_id": 0,
        **keys,
    }
    return GgufFile(Path("model.gguf"), metadata, {})


@pytest.mark.parametrize(
    ("rule", "text", "words"),
    [
        ("gpt-2", "ba 12", ["ba", "\u0120", "12"]),
        ("smollm", "ba 12", ["ba", "\u0120", "1", "2"]),
        ("qwen2", "aB12", ["aB", "1", "2"]),
        ("deepseek-r1-qwen", "aB12", ["aB", "1", "2"]),
        ("llama-bpe", "aB12", ["!", "aB", "12"]),
        ("llama-v3", "aB12", ["!", "aB", "12"]),
        ("tekken", "aB12", ["!", "a", "B", "1", "2"]),
        ("tekken", "two", ["!", "two"]),
        ("qwen2", "two", ["t", "w", "o"]),
        ("pixtral", "two", ["!", "two"]),
        ("dbrx", "aB12", ["aB", "12"]),
        ("gpt-4o", "aB12", ["a", "B", "12"]),
        ("deepseek-v3", "ba 12", ["ba", "\u0120", "12"]),
        ("deepseek-coder", "ba 12", ["ba", "\u0120", "1", "2"]),
        ("command-r", "ba 12", ["ba", "\u0120", "1", "2"]),
        ("exaone4", "ba 12", ["ba", "\u0120", "12"]),
    ],
)
def test_texts_are_cut_as_the_rule_says(rule: str, text: str, words: list[str]) -> None:
    assert build_tokenizer(file_of(rule)).tokenizer.encode(text).tokens == words


def test_a_rule_that_nobody_knows_is_refused_with_those_that_are() -> None:
    with pytest.raises(WeightsError, match=r"the word rule 'viking'.*deepseek-r1-qwen.*smollm.*tekken"):
        build_tokenizer(file_of("viking"))


def test_a_file_without_a_rule_is_told(caplog: pytest.LogCaptureFixture) -> None:
    file = file_of("gpt-2")
    keys = {name: value for name, value in file.metadata.items() if name != "tokenizer.ggml.pre"}
    built = build_tokenizer(GgufFile(file.path, keys, {}))
    assert built.tokenizer.encode("ba 12").tokens == ["ba", "\u0120", "12"]
    assert "model.gguf does not say how text is cut into words" in caplog.text


def test_chat_templates_by_name() -> None:
    named = {"tokenizer.chat_template.tool_use": "t", "tokenizer.chat_templates": ["tool_use"]}
    assert build_tokenizer(file_of("gpt-2", **named)).chat_template == {"tool_use": "t"}
    both = file_of("gpt-2", **named, **{"tokenizer.chat_template": "d"})
    assert build_tokenizer(both).chat_template == {"tool_use": "t", "default": "d"}
    assert build_tokenizer(file_of("gpt-2", **{"tokenizer.chat_template": "d"})).chat_template == "d"
    assert build_tokenizer(file_of("gpt-2")).chat_template is None


def test_a_beginning_whose_name_the_library_would_parse() -> None:
    file = file_of("llama-bpe")
    tokens = ["$A:1", *file.metadata["tokenizer.ggml.tokens"][1:]]
    built = build_tokenizer(file_of("llama-bpe", **{"tokenizer.ggml.tokens": tokens}))
    assert built.tokenizer.encode("ba").tokens == ["$A:1", "ba"]


@pytest.mark.parametrize("kind", [3, 4])
def test_added_tokens_known_to_end_a_turn_do(kind: int, tmp_path: Path) -> None:
    file = read_gguf(make_gguf(tmp_path / "m.gguf", {}))
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    tokens[7] = "<|im_end|>"
    kinds = [kind if i == 7 else 1 for i in range(len(tokens))]
    metadata = dict(file.metadata) | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert huggingface_values(GgufFile(file.path, metadata, file.tensors))["eos_token_id"] == [2, 7]
