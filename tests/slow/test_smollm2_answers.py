"""SmolLM2's greedy answers from its GGUF file (Q4_1) against llama.cpp's, token by token.

    LLAMA_CPP_PYTHON=venv/bin/python python -m pytest -m slow -s tests/slow/test_smollm2_answers.py

llama.cpp keeps Q4_1 and rounds inputs to 8 bits. Served as q4_1, weights are kept and inputs
rounded likewise, and what is between layers is bfloat16: logits of 32 to 64 are 0.25 apart. As float32, nothing is
rounded. So two tokens that are about as likely may change places; the test says how far apart they are, in logits
(their standard deviation is 8.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from max_ray.conformance.engine import Engine
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.architectures.greedy import load_as_served
from tests.slow.peer import ask, smollm2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Explain what a binary search does.",
    "Write a Python function that adds two numbers.",
    "Name three colors.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
    "What is 12 plus 30?",
    "Tell me a short story about a fox.",
    "List the planets of the solar system.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What does HTTP stand for?",
    "Summarize the water cycle in two sentences.",
    "How do plants make food?",
    "What is the difference between a list and a tuple in Python?",
    "Write a haiku about the sea.",
    "When did the Second World War end?",
    "What should I pack for a day of hiking?",
    "Is a tomato a fruit or a vegetable?",
    "Schreibe einen Satz \u00fcber den Herbst. \U0001f342",
)


def prompts(path: Path) -> list[list[int]]:
    tokenizer = TextTokenizer(path, max_length=1024)
    texts = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode_text(text, add_special_tokens=False).tolist() for text in texts]


def logits_along(engine: Engine, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """float32 [len(answer), V]: before each token of the answer. In one step: it gives the same bits as one a token."""
    tokens = [*prompt, *answer[:-1]]
    (logits,) = engine.logits_of([tokens], [[len(tokens)]])
    return logits[len(prompt) - 1 :].float()


@dataclass(frozen=True)
class Difference:
    """A token that llama.cpp chose and this library would not, after the same tokens.

    gap: by how much the other token's logit is larger here. their_gap: by how much llama.cpp's second is smaller there.
    """

    prompt: int
    position: int
    gap: float
    their_gap: float


def differences(logits: torch.Tensor, prompt: int, answer: list[int], gaps: list[float]) -> list[Difference]:
    theirs = torch.tensor(answer)
    behind = logits.amax(-1) - logits.gather(1, theirs.unsqueeze(1)).squeeze(1)
    places = (logits.argmax(-1) != theirs).nonzero().flatten().tolist()
    return [Difference(prompt, k, round(float(behind[k]), 3), round(gaps[k], 3)) for k in places]


def report(encoding: str, found: list[Difference], num_tokens: int) -> None:
    first = {one.prompt: one for one in reversed(found)}
    print(
        f"\n{encoding}: {num_tokens - len(found)} of {num_tokens} tokens, {len(QUESTIONS) - len(first)} whole answers"
    )
    for one in first.values():
        print(f"  answer {one.prompt} parts at token {one.position}: gap {one.gap}, llama.cpp's {one.their_gap}")
    print(f"  largest gaps: {sorted((one.gap for one in found), reverse=True)[:5]}")


def test_answers_are_those_of_llama_cpp_up_to_near_ties() -> None:
    """Every token of an answer is compared, also those after a difference: both go on from llama.cpp's token."""
    path = smollm2()
    asked = prompts(path)
    theirs = ask("greedy", path=str(path), prompts=asked, num_tokens=NUM_TOKENS)
    total = sum(map(len, theirs["tokens"]))
    for encoding, near, share in (("q4_1", 0.75, 0.94), ("float32", 0.25, 0.96)):
        engine = Engine(load_as_served(path, quantization_encoding=encoding), num_rows=1, max_tokens=512)
        found = []
        for i, (prompt, answer) in enumerate(zip(asked, theirs["tokens"], strict=True)):
            found += differences(logits_along(engine, prompt, answer), i, answer, theirs["gaps"][i])
        report(encoding, found, total)
        assert len(found) <= (1 - share) * total
        assert all(one.gap <= near and one.their_gap <= 0.75 for one in found), found
