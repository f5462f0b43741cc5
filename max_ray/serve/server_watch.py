"""ServerWatch: notices that the server behind `max-ray serve` has ended, so that the command ends, too.

systemd, Docker and Kubernetes watch the command, and start it again when it ends with an error.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

_ROUND_S = 2.5
_AWAY_FOR_S = 60.0
"""Serve needs half of it to start HAProxy again on a busy machine."""
_CONFIRM_ROUNDS = 3
_ANSWER_S = 5.0
_ESSENTIAL = ("raylet", "gcs_server")
_ray: Any = ray


def dead_ray_process() -> str | None:
    """Name of an ended process of the Ray that this process started, without which that Ray cannot go on."""
    node = _ray._private.worker._global_node
    if node is None or not node.head:
        return None
    dead = {kind for kind, _ in node.dead_processes()}
    return next((kind for kind in _ESSENTIAL if kind in dead), None)


def serve_is_known() -> bool:
    """Whether there is a controller of Serve; Ray starts a dead one again. True where Ray does not answer."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except RayError:
        return True
    return True


def answers(url: str) -> bool:
    """False when no connection is accepted, or the route does not exist. A server that is slow or unhealthy answers."""
    own = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())  # it is this server, by its address
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), own)  # whatever http_proxy says
    try:
        with direct.open(url, timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code != http.HTTPStatus.NOT_FOUND
    except TimeoutError:
        return True
    except (OSError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", None), TimeoutError)


class ServerWatch:
    """Looks every few seconds.

    Args:
        url: A route that needs no key.
        away_for_s: Seconds without an answer after which the server counts as ended.
        round_s: Seconds between two looks.
        dead_process: Gives the name of an ended process of our Ray, or None.
        is_known: Whether Serve runs; it may block.
    """

    def __init__(
        self,
        url: str,
        *,
        away_for_s: float = _AWAY_FOR_S,
        round_s: float = _ROUND_S,
        dead_process: Callable[[], str | None] = dead_ray_process,
        is_known: Callable[[], bool] = serve_is_known,
    ) -> None:
        self._url = url
        self._away_for_s = away_for_s
        self._round_s = round_s
        self._dead_process = dead_process
        self._is_known = is_known
        self._num_unknown = 0

    def wait_for_end(self) -> str:
        """Blocks until the server has ended; a sentence that says what has."""
        threading.Thread(target=self._look_for_serve, name="max_ray-server-watch", daemon=True).start()
        answered_at = time.monotonic()
        while True:
            process = self._dead_process()
            if process is not None:
                return f"Ray's {process} has ended, and the server with it; Ray's logs say why. Start it again."
            if self._num_unknown >= _CONFIRM_ROUNDS:
                return "Serve was shut down, and the server with it. Start it again."
            asked_at = time.monotonic()
            if answers(self._url):
                answered_at = asked_at
            elif asked_at - answered_at > self._away_for_s:
                return f"The application is gone: {self._url} has not answered for {self._away_for_s:.0f} s."
            time.sleep(self._round_s)

    def _look_for_serve(self) -> None:
        """On a thread of its own: Ray does not answer while its GCS is away."""
        while self._num_unknown < _CONFIRM_ROUNDS:
            self._num_unknown = 0 if self._is_known() else self._num_unknown + 1
            time.sleep(self._round_s)
