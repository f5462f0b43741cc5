"""The engine's tests run on the same tiny Llama as those of the pipelines."""

from tests.pipelines.conftest import lab, shared_lab

__all__ = ["lab", "shared_lab"]
