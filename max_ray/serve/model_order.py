"""From the settings of a model to the order for its worker groups."""

from __future__ import annotations

from collections.abc import Mapping

from max_ray.actors.messages import GroupSpec
from max_ray.config import PipelineConfig, ServeConfig
from max_ray.config.ports import parse_port_range
from max_ray.log import get_logger
from max_ray.pipelines.factory import build_tokenizer
from max_ray.planning.hardware import Hardware
from max_ray.planning.plan import resolve_plan
from max_ray.serve.cluster_env import cluster_hardware
from max_ray.serve.start_summary import start_summary
from max_ray.tokenization.tokenizer import TextTokenizer

_LOG = get_logger(__name__)
UPSCALE_DELAY_S = 10.0
DOWNSCALE_DELAY_S = 300.0
"""A new replica means a new worker group with its weights to load: quick to add one, slow to give one up."""
FIRST_START_ATTEMPTS = 1
"""A model that does not load will not load the second time: the user is told at once. Once a replica has been up, Serve
replaces a failing one for ever, whatever this says."""


def checked_tokenizer(config: ServeConfig) -> TextTokenizer:
    """The tokenizer of a model that could be served here, before a cluster is there. Raises ConfigError."""
    return build_tokenizer(resolve_plan(_pipeline_config(config), hardware=_hardware_to_be(config)))


def group_spec(config: ServeConfig, phases: Mapping[str, float]) -> GroupSpec:
    """The order for a model's worker groups, on the cluster that this process is connected to. Raises ConfigError.

    Args:
        config: Of the model.
        phases: Seconds of the phases of the start so far.
    """
    plan = resolve_plan(_pipeline_config(config), hardware=cluster_hardware())
    _LOG.info("memory plan of a worker group:\n%s", plan.memory.text())
    print(start_summary(plan), flush=True)
    return GroupSpec(
        app=config.app_name,
        plan=plan,
        lease_grace_s=config.lease_grace_s,
        start_timeout_s=config.worker_start_timeout_s,
        collective_timeout_s=config.collective_timeout_s,
        phases=phases,
        worker_port_range=None if config.worker_port_range is None else parse_port_range(config.worker_port_range),
    )


def _pipeline_config(config: ServeConfig) -> PipelineConfig:
    return PipelineConfig(**{name: getattr(config, name) for name in PipelineConfig.model_fields})


def _hardware_to_be(config: ServeConfig) -> Hardware:
    """For the check before a cluster is there: this machine, and the GPUs that were asked for."""
    local = Hardware.local()
    if config.device_choice.kind != "gpu":
        return local
    num_gpus = max(local.num_gpus, config.tensor_parallel_size)
    seen = local.gpu_memory if num_gpus == local.num_gpus else ()
    return Hardware(local.num_cpus, local.memory_bytes, num_gpus, seen)
