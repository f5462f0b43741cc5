"""No tokenizer class of transformers has a say: neither in its own files nor in those of another tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from max_ray.tokenization.tokenizer import TextTokenizer
from tests.tokenization.texts import random_texts
from tests.tokenization.tokenizer_folders import CONTROLS, LLAMA3_WORDS, byte_level, scored_pieces, sentencepiece

# The classes that the fast suite looks at: those that most served models name. To import them all takes seconds.
COMMON = {
    **{"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "gemma": "GemmaTokenizer", "llama": "LlamaTokenizer"},
    **{"qwen2": "Qwen2Tokenizer", "t5": "T5Tokenizer"},
}
OTHERS = ("byte-level", "SentencePiece", "SentencePiece without a prefix")
NOT_HERE = ("CpmTokenizerFast", "MarkupLMTokenizer", "RoFormerTokenizer")  # want other packages, or tables


def all_classes() -> dict[str, tuple[str, Any]]:
    """Every class of transformers over a tokenizer.json, by name, with its model type."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")):
        for name, kind in _members(f"transformers.models.{path.parent.name}.{path.stem}"):
            if name not in NOT_HERE:
                found[name] = (path.parent.name, kind)
    assert len(found) >= 57
    assert set(COMMON.values()) <= set(found)
    return found


def _members(module: str) -> Iterator[tuple[str, Any]]:
    try:
        members = vars(import_module(module)).items()
    except (ImportError, NameError):  # NameError: one module leaves a package out and then names it
        return
    for name, kind in members:
        own = inspect.isclass(kind) and kind.__module__ == module and kind.__name__ == name
        if own and issubclass(kind, PreTrainedTokenizerFast) and kind is not PreTrainedTokenizerFast:
            yield name, kind


def make(kind: Any) -> Any:
    """An object of the class, with a vocabulary if it takes one of ours."""
    pieces, merges = scored_pieces()
    vocabulary = {
        piece: i for i, piece in enumerate(dict.fromkeys(["<s>", *pieces, *map(chr, range(33, 127)), "[UNK]"]))
    }
    ranked = [(piece, 0.0 if piece == "<unk>" else -float(i)) for piece, i in vocabulary.items()]
    choices: dict[str, list[dict[str, Any]]] = {
        "BPE": [{"vocab": {**vocabulary, "<|endoftext|>": len(vocabulary)}, "merges": merges}],
        "Unigram": [{"vocab": ranked}],
        "WordPiece": [{"vocab": vocabulary}],
    }
    tried = choices.get(kind.model.__name__ if kind.model else "", [{"vocab": ranked}, {"vocab": vocabulary}])
    for arguments in [*tried, {}]:
        try:
            return kind(**arguments)
        except (TypeError, ValueError):
            continue
    raise AssertionError(f"{kind.__name__} takes no vocabulary of ours and has none of its own")


def assert_as_the_file(folder: Path, count: int) -> None:
    expected, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), TextTokenizer(folder, max_length=4096)
    expected.no_truncation()
    expected.no_padding()
    controls = [token.content for token in expected.get_added_tokens_decoder().values()][:8]
    for text in random_texts(count, controls, seed=3):
        ids = expected.encode(text).ids
        assert ours.encode_text(text).tolist() == ids, text
        for skip in (False, True):
            assert ours.decode_ids(ids, skip) == expected.decode(ids, skip_special_tokens=skip), text


def check_own_files(folder: Path, model_type: str, kind: Any, count: int) -> None:
    make(kind).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_as_the_file(folder, count)


def check_other_files(folder: Path, model_type: str, name: str, other: str, count: int) -> None:
    made = {
        "byte-level": lambda: byte_level(LLAMA3_WORDS, begin=True),
        "SentencePiece": sentencepiece,
        "SentencePiece without a prefix": lambda: sentencepiece(prefix="none"),
    }[other]()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, "bos_token": CONTROLS[0], "eos_token": CONTROLS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_as_the_file(folder, count)


@pytest.mark.parametrize("model_type", COMMON)
def test_the_files_of_a_class(model_type: str, tmp_path: Path) -> None:
    name = COMMON[model_type]
    kind = getattr(import_module(f"transformers.models.{model_type}.tokenization_{model_type}"), name)
    check_own_files(tmp_path, model_type, kind, 150)


@pytest.mark.parametrize("model_type", COMMON)
@pytest.mark.parametrize("other", OTHERS)
def test_a_class_named_over_other_files(model_type: str, other: str, tmp_path: Path) -> None:
    check_other_files(tmp_path, model_type, COMMON[model_type], other, 100)


@pytest.mark.slow
def test_every_class_of_transformers(tmp_path: Path) -> None:
    for name, (model_type, kind) in all_classes().items():
        check_own_files(tmp_path / name, model_type, kind, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_every_class_named_over_other_files(other: str, tmp_path: Path) -> None:
    for name, (model_type, _) in all_classes().items():
        check_other_files(tmp_path / name, model_type, name, other, 700)
