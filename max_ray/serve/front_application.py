"""Binds the application of several models: a front, and a deployment for each model."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray import serve

from max_ray.actors.messages import GroupSpec
from max_ray.config import ServeConfig
from max_ray.interfaces import PipelineTask
from max_ray.planning.plan import PipelinePlan
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.front.served_model import ServedModel, served_model
from max_ray.serve.api.model_parsers import ModelParsers
from max_ray.serve.deployment_version import deployment_version
from max_ray.serve.front import Front
from max_ray.serve.ingress import model_details
from max_ray.serve.model_order import FIRST_START_ATTEMPTS
from max_ray.serve.model_replica import ModelReplica, scaling
from max_ray.serve.replica_engine import QueueLimits, parsers_of
from max_ray.tokenization.tokenizer import TextTokenizer

_HANDLE_CALLS = 64
"""Calls of the front beyond those of Python handles that a replica takes."""
_LONGEST_NAME = 40
Planned = tuple[ServeConfig, GroupSpec, TextTokenizer]
"""A model's settings, order and tokenizer."""


@dataclass(frozen=True)
class _PlannedModel:
    """A `ModelView` of a model that no replica has loaded yet.

    Args:
        plan: Of the model.
        tokenizer: Made for the check of its files.
    """

    plan: PipelinePlan
    tokenizer: TextTokenizer

    @property
    def task(self) -> PipelineTask:
        return self.plan.task

    @property
    def embedding_size(self) -> int | None:
        return self.plan.embedding_size

    @property
    def model_name(self) -> str:
        return self.plan.config.served_model_name

    @property
    def model_aliases(self) -> tuple[str, ...]:
        return self.plan.config.served_model_aliases

    @property
    def parsers(self) -> ModelParsers:
        return parsers_of(self.tokenizer, self.plan)


def bind_front(config: ServeConfig, options: ApiOptions, models: Sequence[Planned]) -> serve.Application:
    """The application.

    Args:
        config: Of the application.
        options: Of its HTTP routes.
        models: Its models.
    """
    internal_key = _internal_key(options)
    keys = (*options.api_keys, internal_key) if internal_key else ()
    inner = replace(options, api_keys=keys, allowed_origins=(), files=None, shares_records=True)
    handles = {
        model.served_model_name: _bound(number, model, spec, inner, config.host)
        for number, (model, spec, _) in enumerate(models)
    }
    described = [_described(model, spec.plan, tokenizer) for model, spec, tokenizer in models]
    front = Front.options(num_replicas=config.front_replicas, graceful_shutdown_timeout_s=config.drain_timeout_s)
    return front.bind(described, handles, options, internal_key)


def _bound(number: int, config: ServeConfig, spec: GroupSpec, options: ApiOptions, host: str) -> serve.Application:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", config.served_model_name)[:_LONGEST_NAME]
    deployment = ModelReplica.options(
        name=f"Model{number}-{name}",
        version=f"{deployment_version(config, spec.plan)}-{_digest(options)}",
        _internal=True,  # the only way to give a version
        max_surge_percent=config.max_surge_percent,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        max_ongoing_requests=2 * config.max_queued_requests + spec.plan.max_batch_size + _HANDLE_CALLS,
        max_constructor_retry_count=FIRST_START_ATTEMPTS,
        **scaling(config),
    )
    queue = QueueLimits(config.max_queued_requests, config.max_queued_tokens)
    return deployment.bind(spec, queue, options, host, config.drain_timeout_s)


def _internal_key(options: ApiOptions) -> str:
    """What lines of batches are sent with. It follows from secret keys where there are any, so that an update of the
    application changes no replica for it."""
    if options.api_keys:
        return hmac.new("\0".join(options.api_keys).encode(), b"max_ray front", hashlib.sha256).hexdigest()
    return secrets.token_hex(32) if options.has_keys else ""


def _digest(options: ApiOptions) -> str:
    """Of the keys that a replica knows."""
    return hashlib.sha256(repr(options.api_keys).encode()).hexdigest()[:8]


def _described(config: ServeConfig, plan: PipelinePlan, tokenizer: TextTokenizer) -> ServedModel:
    return served_model(
        _PlannedModel(plan, tokenizer),
        model_details(plan),
        min_replicas=config.min_replicas,
        idle_s=config.scale_to_zero_after_s,
        start_timeout_s=config.worker_start_timeout_s,
    )
