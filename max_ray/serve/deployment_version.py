"""The version of a deployment: equal versions need no new replicas.

Without one, Serve gives every `serve.run` a new version by chance and replaces all replicas, also where only their
number has changed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import max_ray
from max_ray.config import ServeConfig
from max_ray.planning.plan import PipelinePlan

_NOT_OF_REPLICAS = frozenset(
    {
        *("host", "port", "app_name", "min_replicas", "max_replicas", "target_ongoing_requests"),
        *("models", "front_replicas", "scale_to_zero_after_s"),
        *("drain_timeout_s", "max_stream_s", "max_surge_percent", "ssl_certfile", "ssl_keyfile"),
    }
)
"""Settings that Serve, or HAProxy, applies without new replicas."""
_CODE = ("*.py", "*.cpp", "*.h")


def deployment_version(config: ServeConfig, plan: PipelinePlan) -> str:
    """A digest of what a replica and its workers are made of: settings, keys, the resolved plan, the checkpoint's files
    (names, sizes, times of change) and max_ray's own code."""
    settings = config.model_dump(mode="json", exclude=set(_NOT_OF_REPLICAS))
    parts = [
        max_ray.__version__,
        json.dumps(settings, sort_keys=True),
        repr(config.key_values),
        repr(sorted((name, str(value)) for name, value in plan.values.items())),
        repr([(code.name, code.digest, code.attribute) for code in plan.custom_code]),
        repr(_files(Path(plan.model_dir))),
    ]
    digest = hashlib.sha256("\0".join(parts).encode())
    package = Path(max_ray.__file__).parent
    for folder in (package, package.parent / "architectures"):
        for pattern in _CODE:
            for file in sorted(folder.rglob(pattern)):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files(model: Path) -> list[tuple[str, int, int]]:
    files = [model] if model.is_file() else sorted(path for path in model.iterdir() if path.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
