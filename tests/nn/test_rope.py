"""Rope against Hugging Face's own module, for each way of scaling and each way of writing it into config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from max_ray.errors import ConfigError
from max_ray.huggingface import HuggingFaceConfig
from max_ray.nn.rope import RopeConfig, RotaryEmbedding, dynamic_frequencies

HEAD_DIM, MAX_POSITIONS = 16, 64
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 500_000.0},
    "llama3 without original": LLAMA3,
    "yarn": {**YARN, "original_max_position_embeddings": 32},
    "yarn truncate": {**YARN, "original_max_position_embeddings": 64, "truncate": False},
    "yarn betas": {**YARN, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
    "yarn attention factor": {**YARN, "attention_factor": 0.7},
    "yarn mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8},
}


def hugging_face(scaling: dict[str, Any]) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=HEAD_DIM,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_theta": 10_000.0, **scaling},
        )
    )


def their_cos_sin(scaling: dict[str, Any], positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, R] as we write it: their halves are equal, ours keeps one of each."""
    cos, sin = hugging_face(scaling)(torch.empty(0, dtype=dtype), positions.unsqueeze(0))
    return torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)


def ours(config: dict[str, Any], max_length: int = 200, dtype: torch.dtype = torch.float32) -> RotaryEmbedding:
    rope = RopeConfig.from_huggingface(
        HuggingFaceConfig({"max_position_embeddings": MAX_POSITIONS, **config}), HEAD_DIM
    )
    return RotaryEmbedding(rope, max_length, dtype=dtype)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cos_and_sin_are_hugging_faces(name: str, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 63, 64, 65, 7, 199])
    rotary = ours({"rope_parameters": SCALINGS[name]}, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3  # the last bit of a bfloat16
    torch.testing.assert_close(
        rotary(positions), their_cos_sin(SCALINGS[name], positions, dtype), atol=tolerance, rtol=tolerance
    )


def test_the_old_way_to_write_it_means_the_same() -> None:
    positions = torch.arange(100)
    new = ours({"rope_parameters": {**LLAMA3, "rope_theta": 5000.0}})(positions)
    old = ours({"rope_theta": 5000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}})(positions)
    oldest_scaling = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {"type": "llama3"}
    oldest = ours({"rope_theta": 5000.0, "rope_scaling": oldest_scaling})(positions)
    assert torch.equal(new, old)
    assert torch.equal(new, oldest)
    assert not torch.equal(new, ours({"rope_theta": 5000.0, "rope_scaling": None})(positions))


def test_nothing_written_is_the_default() -> None:
    rope = RopeConfig.from_huggingface(HuggingFaceConfig({}), HEAD_DIM)
    assert (rope.rope_type, rope.theta, rope.max_supported_length) == ("default", 10_000.0, 2048)


def test_partial_rotation_has_a_narrower_table() -> None:
    assert ours({"partial_rotary_factor": 0.5})(torch.arange(3)).shape == (3, HEAD_DIM // 2)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 199])
def test_dynamic_follows_the_length_of_the_sequence(length: int) -> None:
    """A whole prompt of `length`, alone: what Hugging Face does in its first forward pass."""
    scaling = {"rope_type": "dynamic", "factor": 3.0}
    positions = torch.arange(length)
    rotary = ours({"rope_parameters": scaling})
    torch.testing.assert_close(
        rotary(positions, torch.full((length,), length)),
        their_cos_sin(scaling, positions, torch.float32),
        atol=2e-5,
        rtol=2e-5,
    )


def test_dynamic_decodes_as_hugging_face_token_by_token() -> None:
    scaling = {"rope_type": "dynamic", "factor": 3.0}
    theirs, rotary = hugging_face(scaling), ours({"rope_parameters": scaling})
    for position in range(60, 90):
        cos, _ = theirs(torch.empty(0), torch.tensor([[position]]))
        torch.testing.assert_close(
            rotary(torch.tensor([position]))[:, : HEAD_DIM // 2], cos[0, :, : HEAD_DIM // 2], atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longrope_follows_the_length_of_the_sequence(length: int, dtype: torch.dtype) -> None:
    """A whole prompt of `length`, alone, then a token behind it."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
    }
    positions, rotary = torch.arange(length), ours({"rope_parameters": scaling}, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    for at, lengths in ((positions, torch.full((length,), length)), (torch.tensor([length]), None)):
        theirs = their_cos_sin(scaling, at, dtype)
        torch.testing.assert_close(rotary(at, lengths), theirs, atol=tolerance, rtol=tolerance)
    rope = RopeConfig.from_huggingface(
        HuggingFaceConfig({"rope_parameters": scaling, "max_position_embeddings": MAX_POSITIONS}), HEAD_DIM
    )
    assert (rope.max_supported_length, rope.fixed_length) == (MAX_POSITIONS, 32)


def test_dynamic_rows_do_not_touch_each_other() -> None:
    rope = RopeConfig(HEAD_DIM, 10_000.0, MAX_POSITIONS, "dynamic", {"factor": 2.0})
    together = dynamic_frequencies(rope, torch.tensor([10, 100, 64, 200]))
    alone = torch.cat([dynamic_frequencies(rope, torch.tensor([n])) for n in (10, 100, 64, 200)])
    assert torch.equal(together, alone)
    assert torch.equal(together[0], together[2])


def test_static_rope_takes_no_lengths() -> None:
    with pytest.raises(AssertionError, match="does not depend on lengths"):
        ours({})(torch.arange(2), torch.arange(2))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 128),
        ({"rope_parameters": LLAMA3}, 64),
        ({"rope_parameters": YARN}, 256),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}, 64),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 32}}, 128),
    ],
)
def test_supported_length(config: dict[str, Any], length: int) -> None:
    rope = RopeConfig.from_huggingface(
        HuggingFaceConfig({"max_position_embeddings": MAX_POSITIONS, **config}), HEAD_DIM
    )
    assert rope.max_supported_length == length


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"type": "spiral"}},
            "rope_type 'spiral'; supported are default, dynamic, linear, llama3, longrope",
        ),
        ({"rope_scaling": {"type": "linear"}}, "type 'linear' lack factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "lack low_freq_factor, high_freq_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor must have 8 numbers",
        ),
        ({"partial_rotary_factor": 0.06}, "cannot rotate heads of size 0"),
    ],
)
def test_what_cannot_work_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeConfig.from_huggingface(HuggingFaceConfig(config), HEAD_DIM)
