"""Beginning- and end-of-text tokens that tokenizer_config.json asks for where tokenizer.json puts none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, processors

from max_ray.tokenization.loading.settings import TokenizerSettings

_Pieces = tuple[list[list[int]], list[list[int]]]


def add_text_ends(tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
    """Follows `add_bos_token` and `add_eos_token`, each where the post-processor adds no token at that end.

    DeepSeek V3's files are so. False takes nothing away: a post-processor that adds a token goes on to do so.
    """
    before, after = _added(_state(tokenizer))
    wanted = (settings.adds_bos and not before, "bos_token"), (settings.adds_eos and not after, "eos_token")
    begin, end = (_id_of(tokenizer, settings.names.get(role)) if wants else [] for wants, role in wanted)
    if begin or end:
        set_text_ends(tokenizer, [*begin, *before], [*after, *end])


def set_text_ends(tokenizer: Tokenizer, before: list[list[int]], after: list[list[int]]) -> None:
    """Makes the tokenizer put these around a text; each is the ids of one name."""
    texts = [[tokenizer.id_to_token(i) or "" for i in ids] for ids in [*before, *after]]
    aliases = [f"end{place}" for place in range(len(texts))]  # a token's own text may hold what the library parses
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*aliases[: len(before)], "$A", *aliases[len(before) :]],
        special_tokens=[
            {"id": alias, "ids": ids, "tokens": tokens}
            for alias, ids, tokens in zip(aliases, [*before, *after], texts, strict=True)
        ],
    )


def _id_of(tokenizer: Tokenizer, name: str | None) -> list[list[int]]:
    number = None if name is None else tokenizer.token_to_id(name)
    return [] if number is None else [[number]]


def _state(tokenizer: Tokenizer) -> Any:
    processor = tokenizer.post_processor
    return None if processor is None else json.loads(processor.__getstate__())


def _added(state: Any) -> _Pieces:
    """The ids that a post-processor puts before and after a text."""
    kind = state["type"] if state else ""
    if kind == "Sequence":
        parts = [_added(part) for part in state["processors"]]
        return [ids for before, _ in reversed(parts) for ids in before], [ids for _, after in parts for ids in after]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [[state["cls"][1]]], [[state["sep"][1]]]
    return _added_by_template(state) if kind == "TemplateProcessing" else ([], [])


def _added_by_template(state: Mapping[str, Any]) -> _Pieces:
    ends: _Pieces = ([], [])
    place = 0
    for piece in state["single"]:
        if "Sequence" in piece:
            place = 1
        else:
            ends[place].append(state["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return ends
