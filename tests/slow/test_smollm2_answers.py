"""SmolLM2's greedy answers from its GGUF file (Q4_1) against llama.cpp's, token by token.

    LLAMA_CPP_PYTHON=venv/bin/python python -m pytest -m slow -s tests/slow/test_smollm2_answers.py

Both round differently: llama.cpp keeps Q4_1 and rounds inputs to 8 bits; here Q4_1 becomes q8_0, a step of at most
1/254 of a group's largest weight, with the same inputs. So tokens may differ where two are about as likely.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from max_ray.conformance.engine import Engine
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.architectures.greedy import load_as_served
from tests.slow.peer import ask, smollm2

pytestmark = pytest.mark.slow
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
    """float32 [len(answer), V]: before each token of the answer."""
    tokens = [*prompt, *answer[:-1]]
    (logits,) = engine.logits_of([tokens], [[len(prompt), *[1] * (len(answer) - 1)]])
    return logits[len(prompt) - 1 :].float()
