"""ModelReplica: the deployment of one of several models, behind the front.

It is the ingress' replica without Serve's HTTP in front of it: the front sends requests to a server of its own, with
the same routes and the same guards. Its number of requests, which Serve does not see, decides about scaling.
"""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from max_ray.actors.messages import GroupSpec
from max_ray.actors.network import this_node
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.config import ServeConfig
from max_ray.config.models import is_loopback
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.application_actor import group_app
from max_ray.serve.cluster_env import SERVE_LOGGING
from max_ray.serve.ingress import Replica
from max_ray.serve.model_order import DOWNSCALE_DELAY_S, UPSCALE_DELAY_S
from max_ray.serve.ray_metrics import ONE_ARENA
from max_ray.serve.replica_engine import QueueLimits
from max_ray.serve.replica_server import ReplicaServer

_MEASURE_EVERY_S = 1.0
_LOOK_BACK_S = 5.0
OPEN_REQUESTS = "open_requests"


class _ModelReplica(Replica):
    """One replica.

    Args:
        spec: The order for its worker group.
        queue: Limits of its queue.
        options: Of its HTTP server.
        host: The address that the application listens on.
        drain_s: Seconds that requests under way may take at its end.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: GroupSpec, queue: QueueLimits, options: ApiOptions, host: str, drain_s: float
    ) -> None:
        await super().__init__(spec, queue, options)
        self._drain_s = drain_s
        api = self.__serve_build_asgi_app__()
        self._server = await ReplicaServer.start(api, "127.0.0.1" if is_loopback(host) else this_node().ip)
        self.engine.address = self._server.url

    def _group_app(self, context: Any) -> str:
        return group_app(context.app_name, context.deployment)

    async def locate(self) -> str:
        """The URL of its HTTP server. A call starts a replica where the model has no other."""
        return self._server.url

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaling."""
        return {OPEN_REQUESTS: float(self._server.num_open)}

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            self.engine.address = ""
            await self._server.close(self._drain_s)
        await super().__del__()


def replicas_needed(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Serve's autoscaling policy: requests of the front and of Python handles, by those that a replica should have.

    Serve rounds up, delays and bounds the number, and starts a first replica at once.
    """
    assert context.config is not None, "a deployment that scales has settings for it"
    by_replica = (context.aggregated_metrics or {}).get(OPEN_REQUESTS, {})
    running = set(context.running_replicas)
    num_open = sum(value for replica, value in by_replica.items() if replica in running)
    return (num_open + context.total_num_requests) / context.config.target_ongoing_requests, {}


_policy: Any = AutoscalingPolicy  # without types


def scaling(config: ServeConfig) -> dict[str, Any]:
    """Options of a model's deployment."""
    if config.min_replicas == config.max_replicas:
        return {"num_replicas": config.min_replicas}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # variables of Serve's own processes are to replace it
        autoscaling = AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=UPSCALE_DELAY_S,
            downscale_delay_s=DOWNSCALE_DELAY_S,
            downscale_to_zero_delay_s=config.scale_to_zero_after_s,
            metrics_interval_s=_MEASURE_EVERY_S,
            look_back_period_s=_LOOK_BACK_S,
            policy=_policy(policy_function=replicas_needed),
        )
    return {"autoscaling_config": autoscaling}


ModelReplica = serve.deployment(
    name="Model",
    ray_actor_options={"num_cpus": 0.01, "runtime_env": {"env_vars": ORDINARY_PRIORITY | ONE_ARENA}},
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    logging_config=SERVE_LOGGING,
)(_ModelReplica)
