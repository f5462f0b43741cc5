"""The way of a GPU on a CPU: steps launched ahead, decode steps replayed. A "graph" here calls its function again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from max_ray.engine.graphs import DecodeGraphs, Replay
from max_ray.engine.local_executor import LocalExecutor
from max_ray.engine.runner import ModelRunner
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.pipelines.text_generation import TextGenerationPipeline
from tests.pipelines.conftest import VOCAB_SIZE


class Recorder:
    """Stands for CudaCapture: as with a graph, each output stays in one place and is overwritten by the next call.

    sizes: rows of each replay, in order. num_captured: functions captured.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.num_captured = 0

    def __call__(self, function: Callable[[], torch.Tensor]) -> Replay:
        output = function().clone()
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.sizes.append(len(output))
            return output.copy_(function())

        return Replay(replay)


def graphs_for(runner: ModelRunner, recorder: Recorder, max_batch_size: int, max_length: int = 256) -> DecodeGraphs:
    return DecodeGraphs(runner._model, runner._storage, max_batch_size, max_length, recorder)


def ahead(
    pipeline: TextGenerationPipeline, *, lookahead: int = 1, recorder: Recorder | None = None, max_batch_size: int = 16
) -> TextGenerationPipeline:
    """A pipeline over the same models and caches as `pipeline`, whose runners look ahead and replay."""
    executor, manager = pipeline.executor, pipeline.kv_manager
    assert isinstance(executor, LocalExecutor)
    runners = [
        ModelRunner(
            runner._model,
            runner._storage,
            runner._tp,
            VOCAB_SIZE,
            None if recorder is None else graphs_for(runner, recorder, max_batch_size),
            lookahead,
        )
        for runner in executor.runners
    ]
    own = PagedKVCacheManager(
        runners[0]._model.get_kv_params(
            runners[0]._model.pipeline_config, runners[0]._model.huggingface_config, runners[0]._model.encoding
        ),
        manager.total_num_blocks,
    )
    return TextGenerationPipeline(LocalExecutor(runners), own)
