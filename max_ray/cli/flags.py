"""Flags from the fields of PipelineConfig and ServeConfig: names, defaults and help are written once, there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from max_ray.config import PipelineConfig
from max_ray.config.problems import ALIASES

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_NOT_A_FLAG = ("api_keys", "models")
"""A secret does not belong on a command line, where `ps` shows it; blocks of settings belong into a file."""
_OTHER = "other settings"
_GROUPS: Mapping[str, Sequence[str]] = {
    "model": (
        *("model_path", "revision", "served_model_name", "served_model_aliases", "task", "quantization_encoding"),
        *("max_length", "custom_architectures"),
    ),
    "chat": ("tool_call_parser", "reasoning_parser", "allow_special_tokens_in_messages"),
    "batches and KV cache": (
        *("max_batch_size", "max_batch_input_tokens", "enable_chunked_prefill", "max_num_steps"),
        *("kv_cache_page_size", "kv_cache_memory", "enable_prefix_caching"),
    ),
    "devices": (
        *("devices", "tensor_parallel_size", "expert_parallel", "device_memory_utilization", "cuda_graphs"),
        "num_threads",
    ),
    "images": ("allowed_image_root", "max_images", "max_image_bytes", "max_image_pixels"),
    "HTTP server": (
        *("host", "port", "max_queued_requests", "max_queued_tokens", "allowed_hosts", "allowed_origins"),
        *("api_keys_file", "ssl_certfile", "ssl_keyfile", "otlp_traces_endpoint"),
    ),
    "replicas and workers": (
        *("app_name", "min_replicas", "max_replicas", "scale_to_zero_after_s", "target_ongoing_requests"),
        *("front_replicas", "lease_grace_s"),
        *("worker_start_timeout_s", "collective_timeout_s", "worker_port_range", "max_surge_percent"),
        *("drain_timeout_s", "max_stream_s"),
    ),
    "files and batch jobs": ("files_dir", "files_max_bytes", "batch_concurrency"),
}
POOLED_SETTINGS = (
    *("model_path", "revision", "served_model_name", "task", "quantization_encoding", "max_length"),
    *("custom_architectures", "max_batch_size", "max_batch_input_tokens", "devices", "tensor_parallel_size"),
    *("device_memory_utilization", "num_threads"),
)
"""What has an effect on embeddings: no cache, no sampling, no images."""


def add_settings(
    parser: argparse.ArgumentParser,
    cls: type[PipelineConfig],
    names: Sequence[str] | None = None,
    *,
    print_config: bool = False,
    repeated: Sequence[str] = (),
) -> None:
    """Adds the flags of settings, in groups, and `--config`.

    Args:
        parser: Gets the flags.
        cls: Whose settings.
        names: Which of them; None for all.
        print_config: Whether there is `--print-config`, too.
        repeated: Settings whose flag may be given several times.
    """
    wanted = [name for name in names or cls.model_fields if name not in _NOT_A_FLAG]
    grouped = {name for members in _GROUPS.values() for name in members}
    groups = {**_GROUPS, _OTHER: [name for name in wanted if name not in grouped]}
    for title, members in groups.items():
        present = [name for name in members if name in wanted]
        group = parser.add_argument_group(title) if present else None
        for name in present:
            assert group is not None, "there are members"
            add_setting(group, name, cls.model_fields[name], is_repeated=name in repeated)
    where = parser.add_argument_group("where settings come from")
    where.add_argument("--config", metavar="FILE", help="YAML file with settings (or MAX_RAY_CONFIG).")
    if print_config:
        help_text = "Print every setting and where it came from, and stop."
        where.add_argument("--print-config", action="store_true", help=help_text)


def add_setting(parser: argparse._ActionsContainer, name: str, field: FieldInfo, *, is_repeated: bool = False) -> None:
    """Adds the flag of one setting; a flag that is not given leaves nothing in the options."""
    flags = [flag(name), *(flag(alias) for alias, target in ALIASES.items() if target == name)]
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
    if is_repeated:
        several = f"{_help(field)} Several times: several models."
        options |= {"action": "append", "metavar": name.rpartition("_")[2].upper(), "help": several}
    elif field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif name == "served_model_name":
        has_words = any(not action.option_strings for action in parser._actions)  # which `--flag A B` would swallow
        options |= {"metavar": "NAME"} | ({"action": "append"} if has_words else {"action": "extend", "nargs": "+"})
    elif field.annotation == tuple[str, ...]:
        options |= {"action": "append", "metavar": name.rpartition("_")[2].upper().removesuffix("S")}
    else:
        options["metavar"] = name.rpartition("_")[2].upper()
    parser.add_argument(*flags, **options)


def flag(name: str) -> str:
    """`--max-length` for max_length."""
    return "--" + name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default_factory is None and not field.is_required() and field.default not in (None, "", ()):
        text += f" Default: {field.default}."
    return text.replace("%", "%%")
