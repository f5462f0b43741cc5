"""Tiny models of the families whose attention has kernels of its own, in tests/gpu and in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.architectures.families import find_tiny, make_tiny
from tests.gpu.models import MAX_LENGTH

DENSE_DEEPSEEK, DEEPSEEK, GPT_OSS = "DeepSeek V3, dense", "DeepSeek V3", "gpt-oss"
PROMPTS = [
    [3 + (31 * i * j) % 150 for j in range(1, length + 1)] for i, length in enumerate((1, 15, 16, 17, 40, 3), start=1)
]


def make_family(name: str, directory: Path, **sizes: int) -> Path:
    """The checkpoint of a tiny model of that name in `directory`; "dense": without experts. sizes: for config.json."""
    model = find_tiny(name.removesuffix(", dense"))
    changes = {"max_position_embeddings": MAX_LENGTH, **sizes}
    if name == DENSE_DEEPSEEK:
        changes["first_k_dense_replace"] = 3  # all layers
    return make_tiny(replace(model, overrides={**model.overrides, **changes}), directory)


def greedy_of_transformers(path: Path, prompts: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
    """In float32 on the CPU, the end of the sequence ignored."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for prompt in prompts:
        with torch.device("cpu"):
            ids = torch.tensor([list(prompt)])
        out = reference.generate(ids, max_new_tokens=num_steps, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(out[0, len(prompt) :].tolist())
    return found
