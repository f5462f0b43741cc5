"""Front: the ingress deployment of an application with several models.

It holds no model. What it tells of the models it knows from the start, and what their replicas are doing from the
registry, once a second. So no probe or scrape wakes one. A request for a model without a replica calls the model's
deployment: Serve starts a replica for the call.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from max_ray import settings
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.actors.registry_calls import known_snapshots
from max_ray.errors import WorkerGroupError
from max_ray.log import get_logger, setup_logging
from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.front.forwarder import Forwarder
from max_ray.serve.api.front.replica_table import ReplicaTable
from max_ray.serve.api.front.routes import FrontApp
from max_ray.serve.api.front.served_model import ModelTable, ServedModel
from max_ray.serve.api.front.state import FrontState
from max_ray.serve.application_actor import group_app
from max_ray.serve.batch_store import ActorBatchStore
from max_ray.serve.cluster_env import SERVE_LOGGING
from max_ray.serve.replica_door import REPLICA_DOOR
from max_ray.serve.response_store import ActorResponseStore

_LOG = get_logger(__name__)
_LOOK_EVERY_S = 1.0
_KEEP_EVERY_LOOKS = 10


class _Front:
    """One replica of the front.

    Args:
        models: What is told of the models.
        handles: The models' deployments, by the names of the models.
        options: Of the HTTP routes.
        internal_key: API key for lines of batches; "" where there are no keys.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        handles: Mapping[str, DeploymentHandle[Any]],
        options: ApiOptions,
        internal_key: str,
    ) -> None:
        setup_logging(settings.log_level())
        context: Any = serve.get_replica_context()
        self._handles = handles
        self._options = options
        self._apps = {group_app(context.app_name, handle.deployment_name): name for name, handle in handles.items()}
        table = ModelTable(models)
        replicas = ReplicaTable(self._wake)
        self._state = FrontState(table, replicas)
        self._forwarder = Forwarder(table, replicas, options, internal_key)
        self._responses = ActorResponseStore(context.app_name)
        files = options.files
        self._files: ActorBatchStore | None = None
        if files is not None:
            self._files = ActorBatchStore(context.app_name, files.folder, files.max_bytes)
        self._batches = self._batch_runner()
        self._task = asyncio.get_running_loop().create_task(self._look())

    def __serve_build_asgi_app__(self) -> FrontApp:
        return FrontApp(self._state, self._forwarder, self._options, self._responses, self._batches, self._responses)

    def _batch_runner(self) -> BatchRunner | None:
        """Runs lines of batches from now on; None where no files are kept."""
        if self._files is None or self._options.files is None:
            return None
        name = ray.get_runtime_context().get_actor_id() or "front"
        most = self._options.files.concurrency
        runner = BatchRunner(name, self._forwarder, self._files, lambda: self._state.num_waiting, most)
        runner.start()
        return runner

    async def _wake(self, model: str) -> str:
        try:
            url: str = await self._handles[model].locate.remote()
        except (RayError, RayServeException) as error:
            _LOG.warning("no replica of %s came up: %s", model, error)
            raise WorkerGroupError(f"No replica of the model {model!r} came up: the server's log says why.") from error
        return url

    async def _look(self) -> None:
        """Keeps up with the replicas, and keeps what is stored while no model runs."""
        looks = 0
        while True:
            try:
                found = await known_snapshots(list(self._apps), limit_s=5.0)
                self._state.take({self._apps[app]: _unpickled(owners) for app, owners in found.items()})
                if looks % _KEEP_EVERY_LOOKS == 0:
                    await self._responses.need()
                    if self._files is not None:
                        await self._files.need()
            except WorkerGroupError as error:
                _LOG.warning("the front did not hear of the replicas: %s", error)
            looks += 1
            await asyncio.sleep(_LOOK_EVERY_S)

    async def __del__(self) -> None:
        if hasattr(self, "_task"):
            self._task.cancel()
            if self._batches is not None:
                await self._batches.close()
            await self._forwarder.close()


def _unpickled(owners: Mapping[str, bytes]) -> list[Any]:
    return [pickle.loads(data) for _, data in sorted(owners.items())]


Front = serve.deployment(
    name="Front",
    ray_actor_options={"num_cpus": 0.01, "runtime_env": {"env_vars": ORDINARY_PRIORITY | REPLICA_DOOR}},
    max_ongoing_requests=100_000,
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_wait_loop_s=0.5,
    logging_config=SERVE_LOGGING,
)(serve.ingress()(_Front))
