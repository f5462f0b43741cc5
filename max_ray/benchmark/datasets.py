"""What is sent: conversations of one or more turns. The same settings and seed give the same data.

| dataset       | a conversation                                                                             |
|---------------|--------------------------------------------------------------------------------------------|
| random        | one turn of `input_len` tokens                                                             |
| shared-prefix | one turn of `input_len` tokens, whose first `prefix_len` are the same in all conversations |
| multi-turn    | `turns` turns of `input_len` new tokens each; what came before is sent along               |
| sharegpt      | the first `turns` questions of a conversation in the file                                  |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

from max_ray.benchmark.words import Words
from max_ray.errors import ConfigError

_ASKING = ("human", "user")
_ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True)
class Turn:
    """What the user says, and how many tokens are asked for in reply."""

    text: str
    output_len: int


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class DataSettings:
    """The shape of the data; None where the dataset's default holds. Lengths are tokens.

    Raises ConfigError for a length below 1 and for a setting that the dataset does not have.
    """

    dataset: str = "random"
    num_prompts: int = 100
    seed: int = 0
    input_len: int | None = None
    output_len: int | None = None
    prefix_len: int | None = None
    turns: int | None = None
    dataset_path: str | None = None
    max_total_len: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DEFAULTS:
            raise ConfigError(f"--dataset must be one of {', '.join(DEFAULTS)}, not {self.dataset!r}.")
        for field in fields(self):
            self._check(field.name, getattr(self, field.name))
        if self.dataset == "shared-prefix" and self["prefix_len"] >= self["input_len"]:
            raise ConfigError("--input-len counts the shared prefix too, so --prefix-len must be smaller than it.")
        if self.dataset == "sharegpt" and self.dataset_path is None:
            raise ConfigError("--dataset sharegpt needs --dataset-path FILE.")

    def __getitem__(self, name: str) -> Any:
        """The value of a setting, or the dataset's default for it."""
        given = getattr(self, name)
        return DEFAULTS[self.dataset][name] if given is None else given

    def _check(self, name: str, value: Any) -> None:
        if name not in ("dataset", "num_prompts", "seed") and value is not None and name not in DEFAULTS[self.dataset]:
            raise ConfigError(f"--dataset {self.dataset} has no {_flag(name)}. Leave it out.")
        if name != "seed" and isinstance(value, int) and value < 1:
            raise ConfigError(f"{_flag(name)} must be at least 1, not {value}.")


DEFAULTS: dict[str, dict[str, Any]] = {
    "random": {"input_len": 128, "output_len": 128},
    "shared-prefix": {"input_len": 544, "output_len": 32, "prefix_len": 512},
    "multi-turn": {"input_len": 64, "output_len": 64, "turns": 4},
    "sharegpt": {"output_len": None, "turns": 1, "dataset_path": None, "max_total_len": 2048},
}


def build_dataset(settings: DataSettings, words: Words, *, purpose: str = "measured") -> list[Conversation]:
    """`num_prompts` conversations. Another purpose gives other text. Raises ConfigError for a file that has too few."""
    makers: dict[str, Callable[[DataSettings, Words, Random], Iterator[Conversation]]] = {
        "random": _random,
        "shared-prefix": _shared_prefix,
        "multi-turn": _multi_turn,
        "sharegpt": _sharegpt,
    }
    random = Random(f"{purpose}-{settings.dataset}-{settings.seed}")
    found = list(makers[settings.dataset](settings, words, random))
    if len(found) < settings.num_prompts:
        raise ConfigError(
            f"{settings.dataset_path} has {len(found)} usable conversations, and --num-prompts asks for "
            f"{settings.num_prompts}. Ask for fewer, or allow longer ones with --max-total-len."
        )
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _random(settings: DataSettings, words: Words, random: Random) -> Iterator[Conversation]:
    for _ in range(settings.num_prompts):
        yield (Turn(words.text(random, settings["input_len"]), settings["output_len"]),)


def _shared_prefix(settings: DataSettings, words: Words, random: Random) -> Iterator[Conversation]:
    prefix = words.text(random, settings["prefix_len"])
    for _ in range(settings.num_prompts):
        yield (Turn(words.text(random, settings["input_len"], prefix), settings["output_len"]),)


def _multi_turn(settings: DataSettings, words: Words, random: Random) -> Iterator[Conversation]:
    for _ in range(settings.num_prompts):
        texts = [words.text(random, settings["input_len"]) for _ in range(settings["turns"])]
        yield tuple(Turn(text, settings["output_len"]) for text in texts)


def _sharegpt(settings: DataSettings, words: Words, random: Random) -> Iterator[Conversation]:
    entries = _read_entries(Path(settings["dataset_path"]))
    random.shuffle(entries)
    num_left = settings.num_prompts
    for entry in entries:
        conversation = _conversation(_exchanges(entry), settings, words)
        if conversation and num_left:
            num_left -= 1
            yield conversation


def _read_entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"--dataset-path {path} is not JSON: {error}.") from None
    if not isinstance(entries, list):
        raise ConfigError(f"--dataset-path {path} must hold a JSON list of conversations.")
    return entries


def _exchanges(entry: Any) -> list[tuple[str, str]]:
    """Question and answer pairs from the beginning of one entry, up to where that order breaks.

    Both spellings that are in use: `conversations` with `from` and `value`, `messages` with `role` and `content`.
    """
    if not isinstance(entry, dict):
        return []
    said = entry.get("conversations") or entry.get("messages") or []
    lines = [(m.get("from") or m.get("role"), m.get("value") or m.get("content")) for m in said if isinstance(m, dict)]
    if lines and lines[0][0] == "system":
        lines = lines[1:]
    pairs: list[tuple[str, str]] = []
    for (asker, question), (answerer, answer) in zip(lines[::2], lines[1::2], strict=False):
        if asker not in _ASKING or answerer not in _ANSWERING or not (question and answer):
            break
        pairs.append((str(question), str(answer)))
    return pairs


def _conversation(exchanges: list[tuple[str, str]], settings: DataSettings, words: Words) -> Conversation:
    """Empty where nothing is left, or it would be longer than `max_total_len` tokens."""
    turns: list[Turn] = []
    total = 0
    for question, answer in exchanges[: settings["turns"]]:
        turn = Turn(question, settings["output_len"] or words.count(answer))
        total += words.count(question) + turn.output_len
        turns.append(turn)
    return tuple(turns) if total <= settings["max_total_len"] else ()
