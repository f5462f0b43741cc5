"""tekken.json and tiktoken.model: against the plain algorithm, pairs joined by the rank of their union."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex

from max_ray.errors import ModelPathError
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.tokenization.texts import CORPUS, random_texts
from tests.tokenization.tokenizer_folders import LLAMA3_WORDS, TEKKEN_WORDS, byte_level

KIMI_CLASS = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
HAN, UPPER, LOWER = r"\p{Han}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_WORDS = "|".join(
    (
        f"[{HAN}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}&&[^{HAN}]]*[{LOWER}&&[^{HAN}]]+{SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}&&[^{HAN}]]+[{LOWER}&&[^{HAN}]]*{SUFFIX}",
        *(r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
TEKKEN_NAMES = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
KIMI_NAMES = ("[BOS]", "[EOS]", "<|im_end|>")


def naive_ranks(pattern: str, count: int = 150) -> dict[bytes, int]:
    """256 bytes, then the most frequent pair of the corpus again and again, within the words of the pattern."""
    words = [[bytes([b]) for b in word.encode()] for text in CORPUS for word in regex.findall(pattern, text, regex.V1)]
    ranks = {bytes([b]): b for b in range(256)}
    for _ in range(count):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        words = [joined(word, best[0] + best[1]) for word in words]
    return ranks


def joined(parts: list[bytes], union: bytes) -> list[bytes]:
    done: list[bytes] = []
    for part in parts:
        if done and done[-1] + part == union:
            done[-1] = union
        else:
            done.append(part)
    return done


def naive_encode(
    text: str, pattern: str, ranks: dict[bytes, int], names: Sequence[str], special: dict[str, int]
) -> Any:
    """Special tokens first, then words; a word is a token, or its lowest-ranked pair is joined, the left one first."""
    ids: list[int] = []
    cut = "|".join(regex.escape(name) for name in sorted(names, key=len, reverse=True))
    for piece in regex.split(f"({cut})", text):
        if piece in special:
            ids.append(special[piece])
            continue
        for word in regex.findall(pattern, piece, regex.V1):
            ids += [ranks[part] for part in naive_word(word.encode(), ranks)]
    return ids


def naive_word(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [word] if word in ranks else [bytes([b]) for b in word]
    while True:
        unions = [a + b for a, b in pairwise(parts)]
        known = [(ranks[union], place) for place, union in enumerate(unions) if union in ranks]
        if not known:
            return parts
        _, place = min(known)
        parts[place : place + 2] = [unions[place]]


def write_tekken(folder: Path, *, special_tokens: bool = True) -> dict[bytes, int]:
    """Ids 0-9 for special tokens, five of them with a name; then the ranks, five more than are used."""
    ranks = naive_ranks(TEKKEN_WORDS)
    vocab = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in ranks.items()]
    content: dict[str, Any] = {
        "config": {
            "pattern": TEKKEN_WORDS,
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) - 5 + 10,
            "default_num_special_tokens": 10,
            "version": "v7" if special_tokens else "v3",
        },
        "vocab": vocab,
    }
    if special_tokens:
        names = enumerate(TEKKEN_NAMES)
        content["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in names]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(content))
    return {token: rank + 10 for token, rank in ranks.items() if rank < len(ranks) - 5}


def write_kimi(folder: Path, **config: Any) -> dict[bytes, int]:
    ranks = naive_ranks(KIMI_WORDS)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_text("".join(lines))
    named = {str(len(ranks) + place): {"content": name, "special": True} for place, name in enumerate(KIMI_NAMES)}
    settings = {"bos_token": "[BOS]", "eos_token": "[EOS]", "tokenizer_class": "TikTokenTokenizer"}
    settings |= {"auto_map": KIMI_CLASS, "added_tokens_decoder": named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ranks


def assert_ranked(
    folder: Path, pattern: str, ranks: dict[bytes, int], special: dict[str, int], begin: list[int]
) -> None:
    ours = TextTokenizer(folder, max_length=4096)
    for text in random_texts(300, list(special)):
        ids = naive_encode(text, pattern, ranks, list(special), special)
        assert ours.encode_text(text).tolist() == [*begin, *ids], text
        assert ours.decode_ids(ids) == text


def test_tekken_alone(tmp_path: Path) -> None:
    ranks = write_tekken(tmp_path)
    special = {name: i for i, name in enumerate((*TEKKEN_NAMES, *(f"<SPECIAL_{i}>" for i in range(5, 10))))}
    assert_ranked(tmp_path, TEKKEN_WORDS, ranks, special, [1])
    assert TextTokenizer(tmp_path, max_length=8).eos_token_ids == {2}


def test_tekken_before_special_tokens_were_written_down(tmp_path: Path) -> None:
    write_tekken(tmp_path, special_tokens=False)
    assert TextTokenizer(tmp_path, max_length=8).encode_text("[TOOL_CALLS]").tolist() == [1, 9]


@pytest.mark.parametrize("cuts", [(LLAMA3_WORDS,), ()])
def test_tekken_corrects_the_pattern_of_the_file_beside_it(cuts: tuple[str, ...], tmp_path: Path) -> None:
    write_tekken(tmp_path)
    byte_level(*cuts, begin=True, whole_words=True).save(str(tmp_path / "tokenizer.json"))
    ours, right = TextTokenizer(tmp_path, max_length=4096), byte_level(*cuts, begin=True, whole_words=True)
    right.pre_tokenizer = byte_level(TEKKEN_WORDS).pre_tokenizer
    texts = random_texts(200)
    assert [ours.encode_text(text).tolist() for text in texts] == [right.encode(text).ids for text in texts]


def test_kimi(tmp_path: Path) -> None:
    ranks = write_kimi(tmp_path)
    names = [*KIMI_NAMES, *(f"<|reserved_token_{len(ranks) + i}|>" for i in range(3, 256))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    assert_ranked(tmp_path, KIMI_WORDS, ranks, special, [])
    assert len(TextTokenizer(tmp_path, max_length=8).added_ids) == 256


def test_added_tokens_of_kimi_are_special_where_its_files_say_so(tmp_path: Path) -> None:
    ranks = write_kimi(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"][str(len(ranks) + 3)] = {"content": "<think>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = TextTokenizer(tmp_path, max_length=64)
    ids = ours.encode_text("<think>a<|im_end|>").tolist()
    assert ids == [len(ranks) + 3, ord("a"), len(ranks) + 2]
    assert ours.decode_ids(ids, skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize(("pattern", "told"), [(LLAMA3_WORDS, 1), (TEKKEN_WORDS, 0)])
def test_a_pattern_that_is_not_mistrals_is_told(
    pattern: str, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = byte_level(pattern)
    stored = json.loads(made.to_str())
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"x{i}" for i in range(131_000))]
    stored["model"] |= {"vocab": {name: i for i, name in enumerate(names)}, "merges": []}
    stored["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    TextTokenizer(tmp_path, max_length=64)
    assert caplog.text.count("cuts words by another pattern") == told


def test_a_class_from_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    ranks = write_kimi(tmp_path, auto_map={"AutoTokenizer": ["org/name--tokenization_kimi.TikTokenTokenizer", None]})
    assert TextTokenizer(tmp_path, max_length=8).eos_token_ids == {len(ranks) + 1}


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]}, {}, None, ["x.Y", None], 3]
)
def test_a_pattern_that_nobody_knows_is_refused(auto_map: object, tmp_path: Path) -> None:
    write_kimi(tmp_path, auto_map=auto_map)
    with pytest.raises(ModelPathError, match=r"holds no word pattern.*known are tokenization_kimi"):
        TextTokenizer(tmp_path, max_length=8)


@pytest.mark.parametrize("lines", ["", "AA", "AA== x", "!! 0", "YQ== 0\nYg== 2\n", "YQ== 0\n", "\xff 0"])
def test_a_damaged_tiktoken_file(lines: str, tmp_path: Path) -> None:
    write_kimi(tmp_path)
    (tmp_path / "tiktoken.model").write_text(lines)
    with pytest.raises(ModelPathError, match=r"tiktoken\.model holds no tokenizer that can be loaded"):
        TextTokenizer(tmp_path, max_length=8)


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"pattern": "x"}},
        {"vocab": []},
        {"vocab": [{"rank": 0}]},
        {"vocab": None},
        {"special_tokens": [{"rank": 0, "token_str": "a"}]},
        {"special_tokens": [{"rank": 1}]},
        {"special_tokens": 5},
    ],
)
def test_a_damaged_tekken_file(change: dict[str, Any], tmp_path: Path) -> None:
    write_tekken(tmp_path)
    content = json.loads((tmp_path / "tekken.json").read_text())
    (tmp_path / "tekken.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ModelPathError, match=r"tekken\.json holds no tokenizer that can be loaded"):
        TextTokenizer(tmp_path, max_length=8)
