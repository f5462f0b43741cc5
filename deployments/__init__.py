"""What runs on a cluster: the HTTP front, the Serve application and its configurations.

    serve run deployments:app model_path=DIR tensor_parallel_size=2

`app` is found here on first use, so that the front and the command line can be imported without Ray.
"""

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from deployments.builder import app

        return app
    raise AttributeError(f"module 'deployments' has no attribute {name!r}")
