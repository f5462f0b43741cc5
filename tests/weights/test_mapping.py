"""Name tables: both directions, first match, fused parts, numbers.

python -m pytest tests/weights/test_mapping.py
"""

from __future__ import annotations

import pytest

from max_ray.weights import NameMap, OwnName

TABLE = NameMap(
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.attention.qkv.weight:q"),
        ("model.layers.{}.self_attn.k_proj.weight", "layers.{}.attention.qkv.weight:k"),
        ("model.layers.{}.experts.{}.up.weight", "layers.{}.experts.{}.weight:up"),
        ("*.rotary_emb.inv_freq", None),
    ]
)


@pytest.mark.parametrize(
    ("checkpoint", "own"),
    [
        ("model.embed_tokens.weight", OwnName("embed.weight")),
        ("model.layers.0.self_attn.q_proj.weight", OwnName("layers.0.attention.qkv.weight", "q")),
        ("model.layers.117.self_attn.k_proj.weight", OwnName("layers.117.attention.qkv.weight", "k")),
        ("model.layers.3.experts.12.up.weight", OwnName("layers.3.experts.12.weight", "up")),
    ],
)
def test_both_directions(checkpoint: str, own: OwnName) -> None:
    assert TABLE.rename([checkpoint]).sources == {own: [checkpoint]}
    assert TABLE.checkpoint_name(own) == checkpoint
    assert OwnName.parse(str(own)) == own


def test_dropped_and_unknown_names_are_told_apart() -> None:
    dropped = "model.layers.0.self_attn.rotary_emb.inv_freq"
    unknown = [
        "lm_head.weight",
        "model.layers.x.self_attn.q_proj.weight",  # {} is a number
        "model.layers.0.self_attn.q_proj.weight.extra",
        "xmodel.embed_tokens.weight",
        "modelxembed_tokens.weight",  # a dot is a dot
    ]
    renaming = TABLE.rename([dropped, *unknown])
    assert (renaming.sources, renaming.dropped, renaming.unknown) == ({}, [dropped], unknown)


def test_two_names_of_one_weight_are_both_kept_for_the_error() -> None:
    table = NameMap([("a.{}", "x.{}"), ("b.{}", "x.{}")])
    assert table.rename(["a.1", "b.1", "a.2"]).sources == {OwnName("x.1"): ["a.1", "b.1"], OwnName("x.2"): ["a.2"]}


def test_the_first_pattern_decides() -> None:
    table = NameMap([("a.bias", None), ("a.*", None), ("a.weight", "x")])
    assert table.rename(["a.weight"]).dropped == ["a.weight"]
    assert NameMap([("a.weight", "x"), ("a.*", None)]).rename(["a.weight"]).sources == {OwnName("x"): ["a.weight"]}


def test_there_is_no_way_back_where_the_table_does_not_say() -> None:
    assert TABLE.checkpoint_name(OwnName("layers.0.attention.qkv.weight", "v")) is None
    assert NameMap([("*.weight", "x")]).checkpoint_name(OwnName("x")) is None


def test_a_table_whose_numbers_differ_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="numbers differ"):
        NameMap([("layers.{}.weight", "weight")])
