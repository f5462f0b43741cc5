"""The name of the model in a body, against what a JSON decoder finds."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from max_ray.errors import InputError
from max_ray.serve.api.front.body_model import MAX_TOKENS, find_model, named_model

MODEL = ("model",)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('{"model":"a"}', "a"),
        (' { "model" :\n "a/b:c" } ', "a/b:c"),
        ('{"x": {"model": "inner"}, "model": "outer"}', "outer"),
        ('{"x": ["model", {"model": "b"}], "y": "\\"model\\": \\"c\\"", "model": "d"}', "d"),
        ('{"x": "model", "y": "}", "model": "d"}', "d"),
        ('{"mod\\u0065l": "caf\\u00e9"}', "café"),
        ('{"model": null}', None),
        ('{"modelx": "a", "xmodel": "b"}', None),
        ("{}", None),
        ('{"x": "\\\\", "model": "e"}', "e"),
        ('{"model": "ü"}', "ü"),
        ('\ufeff{"model": "a"}', "a"),
    ],
)
def test_names(body: str, found: str | None) -> None:
    assert find_model(body.encode(), MODEL) == found


@pytest.mark.parametrize("body", ["", "[]", "5", '"model"', '{"model": ', '{"model": 5}', '{"model": ["a"]}', "{,}"])
def test_refusals(body: str) -> None:
    with pytest.raises(InputError):
        find_model(body.encode(), MODEL)


def random_value(rng: random.Random, depth: int) -> Any:
    texts = ["", "model", '"', "\\", "}{", "[", '":"', "x" * rng.randrange(40), "\u20ac", '{"model": "no"}']
    kinds: list[Any] = [rng.choice(texts), rng.randrange(1000), None, True]
    if depth:
        kinds.append([random_value(rng, depth - 1) for _ in range(rng.randrange(4))])
        kinds.append({rng.choice(texts): random_value(rng, depth - 1) for _ in range(rng.randrange(4))})
    return rng.choice(kinds)


def test_random_bodies_agree_with_a_decoder() -> None:
    rng = random.Random(3)
    num_found = 0
    for _ in range(3000):
        members = {f"k{i}": random_value(rng, 3) for i in range(rng.randrange(5))}
        if rng.random() < 0.7:
            members["model"] = rng.choice(["a", 'q"uote', "back\\slash", "\u20ac\n", ""])
        items = list(members.items())
        rng.shuffle(items)
        body = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2])).encode()
        assert find_model(body, MODEL) == members.get("model")
        num_found += "model" in members
    assert num_found > 1500


async def test_a_long_body_costs_little() -> None:
    long = b"x" * (8 * 2**20)
    for body in (b'{"prompt": "' + long + b'", "model": "a"}', b'{"model": "a", "prompt": "' + long + b'"}'):
        begin = time.process_time()
        assert await named_model(body) == "a"
        assert time.process_time() - begin < 0.3
    with pytest.raises(InputError, match="put 'model' first"):
        await named_model(b'{"a": ' + b"[" * (MAX_TOKENS + 1))
