"""Builds the Serve application from a configuration: checks everything first, then connects to Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from max_ray.actors.registry_calls import get_registry
from max_ray.config import ServeConfig
from max_ray.phases import phase
from max_ray.serve.api.access.key_file import read_key_file
from max_ray.serve.api.engine import ApiOptions, FilesOptions
from max_ray.serve.api.files.directory import check_folder
from max_ray.serve.cluster_env import check_tls_files, connect
from max_ray.serve.deployment_version import deployment_version
from max_ray.serve.drain import forget_drain_limit
from max_ray.serve.front_application import bind_front
from max_ray.serve.ingress import Ingress
from max_ray.serve.model_order import (
    DOWNSCALE_DELAY_S,
    FIRST_START_ATTEMPTS,
    UPSCALE_DELAY_S,
    checked_tokenizer,
    group_spec,
)
from max_ray.serve.replica_engine import QueueLimits
from max_ray.serve.serve_config import load_serve_config
from max_ray.serve.tracing_setup import check_tracing

_EXTRA_ONGOING = 64
"""Requests beyond the queue and the batch that a replica takes: health checks, scrapes, and those it answers 429. The
queue may hold twice its limit where one key has filled it and others come."""


def build_application(config: ServeConfig) -> serve.Application:
    """Checks the configuration against model and cluster, connects to Ray, binds the deployment. Raises ConfigError."""
    if not config.model_path and not config.models:
        config = load_serve_config(given_settings(config), environ={})[0]
    if config.files_dir is not None:
        check_folder(Path(config.files_dir))
    options = api_options(config)
    check_keys(options)
    check_tls_files(config)
    check_tracing(config.otlp_traces_endpoint)
    phases: dict[str, float] = {}
    with phase("resolve and plan", durations=phases):
        tokenizers = [checked_tokenizer(model) for model in config.model_configs]
    with phase("connect to Ray", durations=phases):
        connect(config)
    forget_drain_limit(config.app_name)
    get_registry()  # its process starts while Serve does
    specs = [group_spec(model, phases) for model in config.model_configs]
    if config.has_front:
        return bind_front(config, options, list(zip(config.model_configs, specs, tokenizers, strict=True)))
    (spec,) = specs
    deployment = Ingress.options(
        version=deployment_version(config, spec.plan),
        _internal=True,  # the only way to give a version
        max_surge_percent=config.max_surge_percent,
        max_ongoing_requests=2 * config.max_queued_requests + spec.plan.max_batch_size + _EXTRA_ONGOING,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        max_constructor_retry_count=FIRST_START_ATTEMPTS,
        **_scaling(config),
    )
    return deployment.bind(spec, QueueLimits(config.max_queued_requests, config.max_queued_tokens), options)


def check_keys(options: ApiOptions) -> None:
    """Raises ConfigError for a file of API keys that cannot be used."""
    if options.api_keys_file is not None:
        read_key_file(Path(options.api_keys_file))


def api_options(config: ServeConfig) -> ApiOptions:
    """What of the configuration the HTTP routes go by."""
    any_host = None if config.has_keys else ()
    return ApiOptions(
        api_keys=config.key_values,
        api_keys_file=_absolute(config.api_keys_file),
        allowed_hosts=config.allowed_hosts or any_host,
        allowed_origins=config.allowed_origins,
        shares_records=config.max_replicas > 1,
        otlp_traces_endpoint=config.otlp_traces_endpoint,
        resume_grace_s=config.resume_grace_s,
        files=FilesOptions(config.files_dir, config.files_max_bytes, config.batch_concurrency)
        if config.files_dir
        else None,
    )


def _absolute(path: str | None) -> str | None:
    """The path as replicas find it: they run in other folders."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _scaling(config: ServeConfig) -> dict[str, Any]:
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        }
    }


def given_settings(config: ServeConfig) -> dict[str, Any]:
    """What was set on purpose; the rest follows from it again."""
    return {name: getattr(config, name) for name in config.model_fields_set}
