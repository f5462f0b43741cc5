"""`max-ray serve`: runs the application in the foreground until Ctrl-C, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from types import FrameType
from typing import Any

import ray
from ray import serve

from max_ray import settings
from max_ray.config import ServeConfig
from max_ray.errors import WorkerGroupError
from max_ray.interfaces import PipelineTask
from max_ray.log import setup_logging
from max_ray.planning.tasks import task_of
from max_ray.serve.application import build_application
from max_ray.serve.cluster_env import check_ports_before_start, owns_ray, remove_haproxy_files
from max_ray.serve.drain import limit_drain
from max_ray.serve.server_watch import ServerWatch, dead_ray_process, serve_is_known
from max_ray.serve.start_log import StartLog
from max_ray.serve.terminal import server_terminal

_STOP_WITHIN_S = 6.0
_DRAIN_S = 3.0
"""Of these: for open requests to end. Docker kills a server ten seconds after it has told it to end."""
_ANSWERS_WITHIN_S = 60.0
_OWN_ERROR = re.compile(r"^max_ray\.errors\.\w+: (.*)$", re.MULTILINE)
_ray: Any = ray  # Ray leaves a few of its functions without types
_serve: Any = serve


@server_terminal()
def serve_main(config: ServeConfig) -> None:
    """Starts Ray if none runs, runs the application, blocks. Ctrl-C or SIGTERM ends it.

    Raises ConfigError before anything starts, ServerFailedError when Ray does not start, WorkerGroupError when the
    application does not come up. Exits with code 1 when Ray, Serve or the application ends.
    """
    setup_logging(settings.log_level())
    signal.signal(signal.SIGTERM, _interrupt)
    check_ports_before_start(config)
    try:
        application = build_application(config)
        signal.signal(signal.SIGTERM, _interrupt)  # again: ray.init sets a handler of its own
        _run(application, config)
        _wait_for_answer(f"{_url(config)}/health")
        first, *others = config.model_configs
        print(ready_message(first, _task_of(first), [one.served_model_name for one in others]), flush=True)
        reason = ServerWatch(f"{_url(config)}/health").wait_for_end()
        print(f"max-ray: error: {reason}", file=sys.stderr, flush=True)  # now: Ray may end this process below
        raise SystemExit(1)
    except KeyboardInterrupt:
        print("Stopping ...", flush=True)
    finally:
        if ray.is_initialized():
            _stop(config)


def _run(application: serve.Application, config: ServeConfig) -> None:
    """Raises WorkerGroupError with our own sentence, where there is one in what Serve says of the failure."""
    log = StartLog()
    try:
        serve.run(application, name=config.app_name, route_prefix="/")
    except RuntimeError as error:
        reason = failure_reason(_replica_message(config.app_name))
        if reason:
            log.silence()
        raise WorkerGroupError(f"The application did not start. {reason or error}") from error
    finally:
        log.release()


def _wait_for_answer(url: str) -> None:
    """Until HAProxy knows the way to the replica, which can be a moment after Serve calls the application ready."""
    deadline = time.monotonic() + _ANSWERS_WITHIN_S
    own = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())  # it is this server, by its address
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), own)  # whatever http_proxy says
    while time.monotonic() < deadline:
        try:
            with direct.open(url, timeout=5):
                return
        except OSError:  # refused, reset, timed out, or an HTTP error status
            time.sleep(0.1)
    raise WorkerGroupError(f"The application is up, but {url} does not answer: is another server on that port?")


def _replica_message(app_name: str) -> str:
    """What Serve says of the deployment: text that ends with a replica's traceback when its start failed."""
    application = serve.status().applications.get(app_name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    return "\n".join(messages)


def failure_reason(message: str) -> str:
    """The sentence of the last of max_ray's own errors in the text; "" when there is none."""
    found: list[str] = _OWN_ERROR.findall(message)
    return found[-1].strip() if found else ""


def _task_of(config: ServeConfig) -> PipelineTask:
    """Without a model path the bundled model is served, which writes text."""
    return task_of(config) if config.model_path else PipelineTask.TEXT_GENERATION


def _url(config: ServeConfig) -> str:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    host = f"[{host}]" if ":" in host else host
    return f"{'http' if config.ssl_certfile is None else 'https'}://{host}:{config.port}"


def ready_message(
    config: ServeConfig, task: PipelineTask = PipelineTask.TEXT_GENERATION, others: Sequence[str] = ()
) -> str:
    """The URL, the page, and a command that answers when pasted into a shell.

    Args:
        config: Of the model, or of the first one.
        task: What that model does.
        others: Names of the other models.
    """
    url = _url(config)
    route, given = "chat/completions", {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    if task is PipelineTask.EMBEDDINGS_GENERATION:
        route, given = "embeddings", {"input": "Hello!"}
    if task is PipelineTask.SCORE:
        route, given = "score", {"text_1": "Hello!", "text_2": ["Hi!", "Bye!"]}
    body = json.dumps({"model": config.served_model_name, **given})
    key = ' -H "Authorization: Bearer ${MAX_RAY_API_KEYS%%,*}"' if config.api_keys else ""
    if config.api_keys_file is not None and not config.api_keys:
        key = ' -H "Authorization: Bearer $KEY"'
    return (
        f"\nServing {', '.join([config.served_model_name, *others])} at {url}/v1   (Ctrl-C ends it)\n"
        f"  chat and status in a browser: {url}/\n"
        f"  curl {url}/v1/{route} -H 'Content-Type: application/json'{key} -d '{body}'\n"
    )


def _stop(config: ServeConfig) -> None:
    """Ends the application; ends Serve and Ray too when this process started them. A hanging end is cut short."""
    node_id = ray.get_runtime_context().get_node_id() if owns_ray() else None
    thread = threading.Thread(target=_end_application, args=(config.app_name,), daemon=True)
    thread.start()
    thread.join(_STOP_WITHIN_S)
    _ray.shutdown()
    if node_id is not None:
        remove_haproxy_files(node_id)


def _end_application(app_name: str) -> None:
    if dead_ray_process() is not None or not serve_is_known():
        return
    limit_drain(app_name, _DRAIN_S)
    serve.delete(app_name)  # first: `shutdown` would end HAProxy at once, and the streams with it
    if owns_ray():
        _serve.shutdown()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
