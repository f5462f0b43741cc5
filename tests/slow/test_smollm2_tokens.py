"""Tokens of GGUF files against llama.cpp: SmolLM2's, and one small file for each kind of tokenizer that GGUF can say.

LLAMA_CPP_PYTHON=venv/bin/python python -m pytest -m slow tests/slow
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from max_ray.gguf import read_gguf
from max_ray.gguf.words import NFC_RULES
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.slow.peer import ask, smollm2
from tests.tokenization.test_gguf_parity import RULES, write_gguf
from tests.tokenization.texts import random_texts
from tests.tokenization.tokenizer_folders import CONTROLS, KINDS

pytestmark = pytest.mark.slow
NUM_TEXTS = 2000
OWN_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<jupyter_script>")


def differences(path: Path, texts: list[str], seed: int = 3) -> list[str]:
    """Where encoding and decoding differ from llama.cpp: of the texts, and of as many lists of random ids.

    Bytes that are no UTF-8 are compared for byte-level tokenizers only: `tokenizers` replaces each byte of a run of
    SentencePiece's byte tokens, and llama.cpp gives the bytes."""
    tokenizer = TextTokenizer(path, max_length=4096)
    is_byte_level = read_gguf(path).metadata["tokenizer.ggml.model"] == "gpt2"
    rng = random.Random(seed)
    ids = [tokenizer.encode_text(text).tolist() for text in texts]
    lists = [*ids, *(rng.choices(range(tokenizer.vocab_size), k=rng.randint(1, 30)) for _ in texts)]
    theirs = ask("tokens", path=str(path), texts=texts, ids=lists)
    found = [f"{t!r}: {a}, not {b}" for t, a, b in zip(texts, ids, theirs["ids"], strict=True) if a != b]
    for skip, name in ((False, "texts"), (True, "without_special")):
        for of, text in zip(lists, theirs[name], strict=True):
            own = tokenizer.decode_ids(of, skip)
            if own != text and (is_byte_level or "\ufffd" not in text):
                found.append(f"{name} of {of}: {own!r}, not {text!r}")
    return found


def comparable(texts: list[str], rule: str) -> list[str]:
    """Texts that llama.cpp cuts as the model's tokenizer.json says. It has no NFC, and its pattern for Tekken takes
    marks for punctuation."""
    if rule in NFC_RULES:
        return [unicodedata.normalize("NFC", text) for text in texts]
    if rule == "tekken":
        return ["".join(c for c in text if not unicodedata.category(c).startswith("M")) for text in texts]
    return texts


def test_smollm2_has_the_tokens_of_llama_cpp() -> None:
    assert not differences(smollm2(), random_texts(NUM_TEXTS, OWN_CONTROLS, seed=11))


@pytest.mark.parametrize("kind", RULES)
def test_every_kind_has_the_tokens_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    smollm2()
    whole = KINDS[kind].write(tmp_path)
    path = write_gguf(tmp_path / "model.gguf", whole, KINDS[kind], RULES[kind])
    assert not differences(path, comparable(random_texts(NUM_TEXTS, CONTROLS, seed=7), RULES[kind]))
