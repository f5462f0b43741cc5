"""The same model gives the same tokens as a folder and as a GGUF file, tokens around a text included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from max_ray.tokenization.tokenizer import TextTokenizer
from tests.tokenization.texts import random_texts
from tests.tokenization.tokenizer_folders import CONTROLS, KINDS, Kind, scored_pieces

# Kind -> what llama.cpp's converter names its words; "" for SentencePiece.
RULES = {
    "prepend and replace": "",
    "replace alone": "",
    "digits in threes": "llama-bpe",
    "digits one by one": "qwen2",
    "no NFC": "deepseek-r1-qwen",
    "words of GPT-2": "gpt-2",
    "words of Tekken": "tekken",
    "tokens in tokenizer_config.json": "qwen2",
    "tokens in added_tokens.json": "qwen2",
    "BOS by flag": "deepseek-v3",
    "both ends by flag": "gpt-2",
    "flags that take nothing away": "gpt-2",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_gguf(path: Path, whole: Tokenizer, kind: Kind, rule: str) -> Path:
    """As llama.cpp's converter writes a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = whole.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2" if rule else "llama")
    writer.add_tokenizer_pre(rule or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(token_types(whole, tokens))
    stored = json.loads(whole.to_str())
    if rule:
        writer.add_token_merges([" ".join(merge) for merge in stored["model"]["merges"]])
    else:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_space_prefix("Prepend" in str(stored["normalizer"]))
    ends = {0: whole.encode("x").ids[0], -1: whole.encode("x").ids[-1]}
    names = {**{"bos_token": "<s>", "eos_token": "</s>"}, **kind.files.get("special_tokens_map.json", {})}
    eos = names["eos_token"]
    bos_id, eos_id = vocabulary["<s>"], vocabulary[eos["content"] if isinstance(eos, dict) else eos]
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_id)
    writer.add_add_bos_token(ends[0] == bos_id)
    writer.add_add_eos_token(ends[-1] == eos_id)
    add_model(writer, len(tokens))
    return path


def token_types(whole: Tokenizer, tokens: list[str]) -> list[int]:
    added = whole.get_added_tokens_decoder()
    types = [CONTROL if i in added and added[i].special else NORMAL for i in range(len(tokens))]
    for i, token in enumerate(tokens):
        if token == "<unk>":
            types[i] = UNKNOWN
        elif token.startswith("<0x") and i not in added:
            types[i] = BYTE
        elif i in added and not added[i].special:
            types[i] = USER_DEFINED
    return types


def add_model(writer: Any, num_tokens: int) -> None:
    """The least that a file of a model must have."""
    for add, value in (
        (writer.add_context_length, 512),
        (writer.add_embedding_length, 4),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 4),
        (writer.add_head_count, 1),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(kind: str, folder: Path, count: int) -> None:
    whole = KINDS[kind].write(folder)
    from_folder = TextTokenizer(folder, max_length=4096)
    from_gguf = TextTokenizer(write_gguf(folder / "model.gguf", whole, KINDS[kind], RULES[kind]), max_length=4096)
    for text in random_texts(count, CONTROLS, seed=7):
        ids = from_folder.encode_text(text).tolist()
        assert from_gguf.encode_text(text).tolist() == ids, text
        for skip in (False, True):
            assert from_gguf.decode_ids(ids, skip) == from_folder.decode_ids(ids, skip), text


@pytest.mark.parametrize("kind", RULES)
def test_a_folder_and_its_gguf_agree(kind: str, tmp_path: Path) -> None:
    assert_same(kind, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_a_folder_and_its_gguf_agree_over_many_texts(kind: str, tmp_path: Path) -> None:
    assert_same(kind, tmp_path, 2000)


def test_scores_follow_the_ids() -> None:
    """What the scores written above stand on."""
    vocabulary, _ = scored_pieces()
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
