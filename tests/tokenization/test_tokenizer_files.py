"""A folder gives the tokens of its tokenizer.json, whatever class its tokenizer_config.json names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from max_ray.tokenization.tokenizer import TextTokenizer
from tests.tokenization.texts import random_texts
from tests.tokenization.tokenizer_folders import CONTROLS, KINDS


def assert_same(folder: Path, expected: Tokenizer, count: int) -> None:
    ours = TextTokenizer(folder, max_length=4096)
    for text in random_texts(count, CONTROLS):
        ids = expected.encode(text).ids
        assert ours.encode_text(text).tolist() == ids, text
        bare = expected.encode(text, add_special_tokens=False).ids
        assert ours.encode_text(text, add_special_tokens=False).tolist() == bare, text
        for skip in (False, True):
            assert ours.decode_ids(ids, skip) == expected.decode(ids, skip_special_tokens=skip), text


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_its_file_says(kind: str, tmp_path: Path) -> None:
    assert_same(tmp_path, KINDS[kind].write(tmp_path), 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_over_many_texts(kind: str, tmp_path: Path) -> None:
    assert_same(tmp_path, KINDS[kind].write(tmp_path), 2000)
