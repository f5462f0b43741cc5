"""Keys: typed access to the keys of a GGUF model. A key that changes numbers and that nothing asked for is refused.

Names of keys: the ggml project's docs/gguf.md; `{arch}` is general.architecture, and the keys here stand below it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from max_ray.errors import WeightsError
from max_ray.gguf.file import GgufFile

_CHANGES_NUMBERS = re.compile(
    r"(rope|attention|altup|ssm|hyper_connection)\..*|expert.*|moe_.*|swiglu_clamp.*|.*(softcapping|_scale|_multiplier)"
    r"|use_parallel_residual|leading_dense_block_count|nextn_predict_layers|interleave_moe_layer_step|n_deepstack_layers"
    r"|full_attention_interval|embedding_length_per_layer_input"
)
_WITHOUT_EFFECT = (
    "rope.scaling.finetuned",  # says where the numbers come from
    "attention.layer_norm_epsilon",  # of another kind of norm than these networks have
    "attention.group_norm_epsilon",
    "attention.group_norm_groups",
    "attention.sliding_window_pattern",  # of a window, and the window itself is refused where it is not read
    "attention.temperature_length",  # of a temperature scale, likewise
)
_SCALE = (0, 1)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": _SCALE,
    "expert_gating_func": _SCALE,  # not said, or a softmax
    "expert_group_count": _SCALE,
    "expert_group_scale": _SCALE,
    "expert_group_used_count": _SCALE,
    "expert_weights_norm": (True,),
    "expert_weights_scale": _SCALE,
    "interleave_moe_layer_step": _SCALE,
    "logit_scale": _SCALE,
    "moe_every_n_layers": _SCALE,
    "residual_scale": _SCALE,
    "embedding_scale": _SCALE,
    "rope.scaling.alpha": _SCALE,
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1: not said
}
"""Values with which a key changes nothing; of all others 0, false and an empty text or list."""
_MAX_COUNT = 1 << 31


class Keys:
    """The keys of one model by their names below `{arch}.`; remembers which were asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._asked: set[str] = set(_WITHOUT_EFFECT)

    def get(self, key: str) -> Any:
        """The value as it stands in the file; None without one."""
        self._asked.add(key)
        return self._file.metadata.get(f"{self._file.architecture}.{key}")

    def ignore(self, *keys: str) -> None:
        """Marks keys that change nothing in this model."""
        self._asked.update(keys)

    def count(self, key: str, optional: bool) -> int | None:
        """A positive integer, or a list of one such number for each layer. Raises WeightsError for anything else."""
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and optional:
            return None
        if type(value) is not int or not 1 <= value < _MAX_COUNT:
            raise self.wrong(key, value, "a positive integer, the same for all layers")
        return value

    def count_or_none(self, key: str) -> int | None:
        """The same, where 0 stands for none."""
        value = self.get(key)
        is_none = value == 0 or (isinstance(value, list) and not any(value))
        return None if is_none else self.count(key, True)

    def positive(self, key: str, default: float) -> float:
        """A positive number. Raises WeightsError for anything else."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < 1e18:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Raises WeightsError where the value is neither true nor false."""
        value = self.get(key)
        if value is None:
            return default
        if value not in (True, False):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def must_be(self, key: str, *known: float) -> None:
        """Raises WeightsError for a value that is none of the known ones: no family here computes with another."""
        value = self.get(key)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(_is_one_of(item, known) for item in items):
            raise self.wrong(key, value, " or ".join(f"{number:g}" for number in known))

    def refuse_unread(self, has_experts: bool) -> None:
        """Raises WeightsError for a key that changes what the model computes, and that nothing asked for."""
        prefix = f"{self._file.architecture}."
        for name, value in self._file.metadata.items():
            key = name.removeprefix(prefix)
            if key == name or key in self._asked or not _CHANGES_NUMBERS.fullmatch(key):
                continue
            if not _is_neutral(key, value) and (has_experts or not key.startswith("expert")):
                raise WeightsError(
                    f"{self._file.path}: key {name} is {value!r:.60}, which changes what the model computes, and the "
                    f"family that reads this file has no such thing."
                )

    def wrong(self, key: str, value: object, rule: str) -> WeightsError:
        """The error for a key that breaks a rule."""
        return WeightsError(
            f"{self._file.path}: key {self._file.architecture}.{key} must be {rule}, not {value!r:.60}."
        )


def _is_neutral(key: str, value: object) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(key, item) for item in value)
    return value in _NEUTRAL.get(key, (0, False, ""))


def _is_one_of(value: object, known: tuple[float, ...]) -> bool:
    return isinstance(value, (int, float)) and any(math.isclose(value, number, rel_tol=1e-5) for number in known)
