"""PipelineConfig and ServeConfig: every setting, its default, its rule and its one-line description.

The description is also the command line's help text, and the default is the only place where that default is written.
A wrong value raises SettingsError: one sentence a problem. Values given as text ("8", "true", "none", "a,b") are
understood, because builder arguments and environment variables are text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from max_ray import settings
from max_ray.config.model_blocks import block_settings
from max_ray.config.names import model_name, other_names
from max_ray.config.ports import parse_port_range
from max_ray.config.problems import ALIASES, SettingsError, settings_problems
from max_ray.config.values import DeviceChoice, SecretList, TextList, split, split_all
from max_ray.errors import ConfigError
from max_ray.interfaces import PipelineTask, SupportedEncoding
from max_ray.output_parsers import AUTO, reasoning_parser_name, tool_parser_name

_MAX_THREADS = 1024  # beyond what a machine can start, OpenMP kills the process instead of raising
_MAX_SECONDS = 10.0**6  # days; an infinite wait has no form in the timeouts that these become
_LOOPBACK_NAMES = ("localhost", "ip6-localhost")
_HTTP_URL = re.compile(r"https?://[^\s/?#]+[^\s]*")
_HOST_RULE = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_ORIGIN_RULE = re.compile(
    r"\*|null|[a-z][a-z0-9+.-]*://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", re.ASCII | re.IGNORECASE
)


class PipelineConfig(BaseModel):
    """What to run and how: the settings of one model, its batches, its KV cache and its devices.

    Frozen; unknown settings raise SettingsError with the nearest known one. Reads no file and no environment: see
    `load_config` for that. None means that the value follows from the model and the hardware (`--print-config`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    model_path: str = Field(min_length=1, description="Folder of a model, or its Hugging Face repository id.")
    revision: str | None = Field(None, description="Branch, tag or commit of the repository.")
    served_model_name: str = Field(
        default_factory=model_name,
        description="Name of the model in the API; more names are aliases. Default: the folder's name, the GGUF "
        "model's own, or the repository id.",
    )
    served_model_aliases: TextList = Field(
        default_factory=other_names,
        description="Other names that requests may give. Default: the GGUF file's name.",
    )
    task: PipelineTask | None = Field(
        None, description="text_generation, embeddings_generation or score. Default: what the model is made for."
    )
    quantization_encoding: SupportedEncoding | None = Field(
        None, description="How weights are stored and executed. Default: what the checkpoint is."
    )
    max_length: int | None = Field(
        None, ge=1, description="Longest sequence, prompt and output. Default: the model's limit."
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Most requests in one batch. Default: by device and KV cache."
    )
    max_batch_input_tokens: int = Field(2048, ge=1, description="Most tokens in one step, over all requests.")
    enable_chunked_prefill: bool = Field(True, description="Spread long prompts over several steps.")
    max_num_steps: int = Field(32, ge=1, description="Most steps of a run that no new request interrupts.")
    kv_cache_page_size: int = Field(16, ge=1, description="Tokens in one block of the KV cache.")
    kv_cache_memory: float | None = Field(
        None,
        gt=0,
        le=2**20,
        description="Memory for the KV cache of one rank, in GiB. Default: what a GPU has left; on a CPU, room for "
        "1024 tokens of each request of a batch, at most a quarter of the machine.",
    )
    device_memory_utilization: float = Field(
        0.95, gt=0, le=1, description="Share of a GPU's memory to use, all in all."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse keys and values of prompts with equal beginnings.")
    tensor_parallel_size: int = Field(1, ge=1, description="Over how many devices one copy of the model is cut.")
    expert_parallel: bool = Field(
        False, description="Spread whole experts over the devices instead of cutting every expert."
    )
    devices: str = Field("auto", description="'auto' (GPUs where there are any), 'cpu', 'gpu', or 'gpu:0,1'.")
    custom_architectures: TextList = Field(
        (), description="Folder of a custom architecture, or module.path:NAME; may be given several times."
    )
    cuda_graphs: Literal["never", "lazy", "start"] = Field(
        "start", description="Decode steps as CUDA graphs: captured at the start, at first use ('lazy'), or never."
    )
    allowed_image_root: str | None = Field(
        None,
        min_length=1,
        description="Folder below which file: URLs of images in messages may point. Default: none may.",
    )
    max_images: int = Field(16, ge=0, description="Most images in the messages of one request.")
    max_image_bytes: int = Field(16 * 2**20, ge=1, description="Most bytes of one image's file.")
    max_image_pixels: int = Field(2**26, ge=1, le=2**27, description="Most pixels of one image, before it is resized.")
    allow_special_tokens_in_messages: bool = Field(
        False, description="Read names of special tokens in chat messages as these tokens; by default they are text."
    )
    tool_call_parser: str = Field(
        AUTO, description="Parser of tool calls: 'auto' (by the chat template), 'none', or a name."
    )
    reasoning_parser: str = Field(
        AUTO, description="Parser of reasoning: 'auto' (by the chat template), 'none', or a name."
    )
    num_threads: int | None = Field(
        None, ge=1, le=_MAX_THREADS, description="CPU threads of one rank. Default: its share of the cores."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**_canonical(values))
        except ValidationError as error:
            raise SettingsError(settings_problems(type(self), error)) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """From a mapping, with the errors of the constructor (Ray Serve's typed builders call this)."""
        if isinstance(obj, Mapping):
            assert not options, f"options are not supported here: {sorted(options)}"
            return cls(**obj)
        return super().model_validate(obj, **options)

    @field_validator("*", mode="before")
    @classmethod
    def _text_none(cls, value: Any, info: Any) -> Any:
        """The text "none" is None where a setting may be None."""
        if isinstance(value, str) and value.lower() in ("none", "null"):
            field = cls.model_fields[info.field_name]
            return None if NoneType in get_args(field.annotation) else value
        return value

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, value: str) -> str:
        try:
            DeviceChoice.parse(value)
        except ValueError as error:
            raise PydanticCustomError("devices", "Input should be {rule}", {"rule": str(error)}) from None
        return value

    @field_validator("tool_call_parser", "reasoning_parser")
    @classmethod
    def _check_parser(cls, value: str, info: Any) -> str:
        try:
            return tool_parser_name(value) if info.field_name == "tool_call_parser" else reasoning_parser_name(value)
        except ConfigError as error:
            raise PydanticCustomError("parser", "Input should be {rule}", {"rule": str(error)}) from None

    @model_validator(mode="after")
    def _check_device_count(self) -> Self:
        ids = self.device_choice.ids
        if ids and len(ids) != self.tensor_parallel_size:
            raise PydanticCustomError(
                "device_count",
                "devices={devices} names {num} GPUs, but tensor_parallel_size is {size}: set them to the same number.",
                {"devices": repr(self.devices), "num": len(ids), "size": self.tensor_parallel_size},
            )
        return self

    @property
    def device_choice(self) -> DeviceChoice:
        return DeviceChoice.parse(self.devices)

    @property
    def model(self) -> Self:
        """The model's settings: MAX's later pages write `config.model.model_path`."""
        return self

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values; what follows from the changed ones follows again."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **_canonical(changes)})


def _api_keys_of_environment() -> tuple[SecretStr, ...]:
    return tuple(SecretStr(key) for key in split(settings.variable(settings.API_KEYS) or ""))


class ServeConfig(PipelineConfig):
    """A PipelineConfig and how it is served over HTTP.

    `model_path` may be left out here ("" = the bundled demo model; the server fills it in). `api_keys` come from
    MAX_RAY_API_KEYS, so that they are on no command line; they are never printed. Without a key only a loopback
    `host` is allowed.
    """

    model_path: str = Field("", description="Folder of a model, or its Hugging Face repository id.")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; all but loopback needs API keys.")
    port: int = Field(8000, ge=1, le=65535, description="TCP port of the HTTP API.")
    app_name: str = Field("max_ray", min_length=1, description="Name of the Ray Serve application.")
    models: tuple[dict[str, Any], ...] = Field(
        (), description="Several models: a block of settings each, in a YAML file; others are for all of them."
    )
    front_replicas: int = Field(1, ge=1, description="Copies of the front, where there are several models.")
    min_replicas: int = Field(1, ge=0, description="Fewest copies of the model; 0: none while it is not used.")
    scale_to_zero_after_s: float = Field(
        300.0,
        ge=0,
        le=_MAX_SECONDS,
        description="Seconds without a request after which the last copy ends, with min_replicas=0.",
    )
    max_replicas: int = Field(1, ge=1, description="Most copies of the model; more than min_replicas scales with load.")
    target_ongoing_requests: float = Field(
        16.0, gt=0, le=2**31, description="Requests a copy should have under way; above it the application scales up."
    )
    max_queued_requests: int = Field(512, ge=0, description="Requests that may wait in a copy; beyond that, HTTP 429.")
    max_queued_tokens: int | None = Field(
        None, ge=1, description="Prompt tokens that may wait in a copy; beyond that, HTTP 429. Default: no limit."
    )
    lease_grace_s: float = Field(
        60.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds without a living owner after which a worker group ends itself.",
    )
    worker_start_timeout_s: float = Field(
        600.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds a worker group may take to be placed and to load its weights.",
    )
    collective_timeout_s: float = Field(
        60.0, gt=0, le=_MAX_SECONDS, description="Seconds after which ranks that wait for a silent one give up."
    )
    max_surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="Share of the replicas that an update may start before it stops old ones; each needs room for a "
        "worker group of its own.",
    )
    drain_timeout_s: float = Field(
        60.0,
        gt=0,
        le=_MAX_SECONDS,
        description="Seconds for which a replica that is removed or replaced goes on with its open requests; then they "
        "end with an error. The end of the server itself is quicker.",
    )
    resume_grace_s: float = Field(
        15.0,
        ge=0,
        le=3600,
        description="Seconds that a stream with stream_options.resumable outlives its connection; 0 refuses such "
        "requests.",
    )
    max_stream_s: int = Field(
        3600,
        ge=1,
        le=int(_MAX_SECONDS),
        description="Seconds that an open stream may go on after replicas have come or gone; HAProxy cuts it then.",
    )
    worker_port_range: str | None = Field(
        None,
        description="TCP ports LOW-HIGH on which replicas accept their workers on other nodes. Default: any free port.",
    )
    files_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder for uploaded files and results of batches, of mode 0700. Default: neither is taken.",
    )
    files_max_bytes: int = Field(4 * 2**30, ge=2**20, description="Most bytes of all files in files_dir together.")
    batch_concurrency: int = Field(
        8, ge=1, description="Lines of batches that a copy of the model runs at a time, while no other request waits."
    )
    allowed_hosts: TextList = Field(
        (),
        description="Names besides loopback's that clients may address the server by ('*': any, '*.x.org': below "
        "x.org). Default: loopback's only; with API keys any.",
    )
    allowed_origins: TextList = Field(
        (),
        description="Origins such as https://chat.example.org whose web pages may use the server ('*': all). "
        "Default: none.",
    )
    api_keys: SecretList = Field(
        default_factory=_api_keys_of_environment, description="Keys that clients must send; from MAX_RAY_API_KEYS."
    )

    api_keys_file: str | None = Field(
        None,
        min_length=1,
        description="YAML or JSON file of API keys by their hashes, with limits; read again when it changes.",
    )
    ssl_certfile: str | None = Field(
        None, min_length=1, description="PEM file of the server's certificate and its chain: HTTPS instead of HTTP."
    )
    ssl_keyfile: str | None = Field(None, min_length=1, description="PEM file of the certificate's private key.")
    otlp_traces_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request. "
        "Default: no traces.",
    )

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(key.get_secret_value().strip() for key in keys):
            raise PydanticCustomError("blank_key", "Input should be a list of keys that are not blank")
        return keys

    @field_validator("worker_port_range")
    @classmethod
    def _check_ports(cls, value: str | None) -> str | None:
        if value is not None and parse_port_range(value) is None:
            raise PydanticCustomError("port_range", "Input should be ports LOW-HIGH such as 20000-20999")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not _HTTP_URL.fullmatch(value):
            raise PydanticCustomError("url", "Input should be a URL like http://collector:4318/v1/traces")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _HOST_RULE.fullmatch(host):
                raise PydanticCustomError(
                    "host_name", "Input should be host names without scheme, port and path, or '*'"
                )
        return tuple(host.lower() for host in hosts)

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN_RULE.fullmatch(origin):
                raise PydanticCustomError(
                    "origin", "Input should be origins like https://chat.example.org:8443 without a path, or '*'"
                )
        return tuple(origin.lower() for origin in origins)

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        if not self.has_keys and not is_loopback(self.host):
            raise PydanticCustomError(
                "exposure",
                "host={host} is reachable from other machines, which needs API keys: set MAX_RAY_API_KEYS "
                "or api_keys_file, or leave host at 127.0.0.1.",
                {"host": repr(self.host)},
            )
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise PydanticCustomError("tls", "ssl_certfile and ssl_keyfile belong together: give both, or neither.")
        return self

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise PydanticCustomError(
                "replicas",
                "max_replicas={high} is less than min_replicas={low}.",
                {"high": self.max_replicas, "low": self.min_replicas},
            )
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.models and (self.model_path or {"served_model_name", "served_model_aliases"} & self.model_fields_set):
            raise PydanticCustomError(
                "models", "models has a block for each model: put model_path, name and aliases into the blocks."
            )
        try:
            served = self.model_configs if self.models else ()
        except ConfigError as error:
            raise PydanticCustomError("models", "{text}", {"text": str(error)}) from None
        names = [name for model in served for name in (model.served_model_name, *model.served_model_aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError(
                "models", "Two models have the name {name}: give each a name of its own.", {"name": repr(twice[0])}
            )
        return self

    @model_validator(mode="after")
    def _check_device_ids(self) -> Self:
        if self.device_choice.ids:
            raise PydanticCustomError(
                "device_ids",
                "devices={devices} names GPUs, but when serving, Ray picks them: set devices='gpu', and start Ray "
                "with the CUDA_VISIBLE_DEVICES that it may use.",
                {"devices": repr(self.devices)},
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether clients need an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @property
    def has_front(self) -> bool:
        """Whether a front stands before the models: there are several, or one that may have no replica."""
        return bool(self.models) or self.min_replicas == 0

    @property
    def model_configs(self) -> tuple[Self, ...]:
        """The settings of each model. Raises ConfigError that names the block."""
        if not self.models:
            return (self,)
        shared = {name: getattr(self, name) for name in self.model_fields_set - {"models"}}
        return tuple(self._of_block(number, shared) for number in range(len(self.models)))

    def _of_block(self, number: int, shared: Mapping[str, Any]) -> Self:
        try:
            block = block_settings(
                _canonical(self.models[number]), PipelineConfig.model_fields, ServeConfig.model_fields
            )
            return type(self)(**{**shared, **block})
        except ConfigError as error:
            raise ConfigError(f"Block {number + 1} of models: {error}") from None

    @property
    def key_values(self) -> tuple[str, ...]:
        """The API keys in clear."""
        return tuple(key.get_secret_value() for key in self.api_keys)


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in _LOOPBACK_NAMES


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """Aliases replaced by the setting's name. Raises SettingsError when both are given with different values."""
    result = dict(values)
    for alias, name in ALIASES.items():
        if alias not in result:
            continue
        value = result.pop(alias)
        if result.setdefault(name, value) != value:
            raise SettingsError([(name, f"{alias} and {name} are the same setting: give one of them.")])
    return _with_aliases(result)


def _with_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """Of several served_model_names the first is the name, the others are aliases."""
    names = values.get("served_model_name")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return values
    first, *others = split_all(names) or [""]
    aliases = split_all(values.get("served_model_aliases", ()))
    return {**values, "served_model_name": first, "served_model_aliases": tuple(dict.fromkeys([*others, *aliases]))}
