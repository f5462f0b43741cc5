"""A tiny model on one device, without settings: the product's model and runner, with graphs and lookahead or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from architectures.deepseek.model import DeepseekV3Model
from architectures.gpt_oss.model import GptOssModel
from architectures.llama3.model import Llama3Model
from max_ray.benchmark.synthetic import RunSettings
from max_ray.distributed import TPGroup
from max_ray.engine.graphs import Capture, DecodeGraphs
from max_ray.engine.kv_storage import KVStorage
from max_ray.engine.runner import ModelRunner
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import RunRequest, RunRow, SamplingParams, SupportedEncoding
from max_ray.modeling import PipelineModel
from max_ray.weights import WeightSource, open_weights
from max_ray.weights.quantize import QuantizingSource

MAX_LENGTH, MAX_ROWS, PAGE_SIZE = 256, 12, 16
BLOCKS_A_ROW = MAX_LENGTH // PAGE_SIZE
MODELS: dict[str, type[PipelineModel]] = {
    "DeepseekV3ForCausalLM": DeepseekV3Model,
    "GptOssForCausalLM": GptOssModel,
    "LlamaForCausalLM": Llama3Model,
}


class Lab:
    """One loaded model; runners over it share one cache."""

    def __init__(self, path: Path, device: torch.device, encoding: str = "float32") -> None:
        settings: Any = RunSettings(MAX_LENGTH, PAGE_SIZE)
        config = load_huggingface_config(path)
        self.tp = TPGroup.single(device)
        kind = SupportedEncoding(encoding)
        weights: WeightSource = open_weights(path)
        if kind.is_quantized:
            weights = QuantizingSource(weights, encoding)
        model_class = MODELS[config.architectures[0]]
        self.model = model_class(settings, config, kind, device, self.tp, weights)
        params = self.model.get_kv_params(settings, config, kind)
        self.storage = KVStorage.allocate(params, MAX_ROWS * BLOCKS_A_ROW, device)
        self.vocab_size: int = config.vocab_size

    def runner(self, capture: Capture | None, lookahead: int) -> ModelRunner:
        graphs = None if capture is None else DecodeGraphs(self.model, self.storage, MAX_ROWS, MAX_LENGTH, capture)
        return ModelRunner(self.model, self.storage, self.tp, self.vocab_size, graphs, lookahead)


def request(
    prompts: Sequence[Sequence[int]], num_steps: int, kinds: Sequence[dict[str, Any]], stops: Sequence[set[int]] = ()
) -> RunRequest:
    """kinds: sampling parameters, in turn. stops: ids that end each row."""
    tables = np.random.default_rng(0).permutation(MAX_ROWS * BLOCKS_A_ROW).astype(np.int32).reshape(MAX_ROWS, -1)
    rows = [
        RunRow(
            request_id=str(i),
            active_tokens=np.array(prompt, dtype=np.int64),
            processed_length=0,
            block_table=tables[i],
            max_new_tokens=num_steps,
            sampling_params=SamplingParams(**{"temperature": 0.0, "seed": i, **kinds[i % len(kinds)]}),
            stop_ids=frozenset(stops[i] if i < len(stops) else ()),
            generated_length=0,
            prompt_length=len(prompt),
            history=np.array(prompt, dtype=np.int64),
        )
        for i, prompt in enumerate(prompts)
    ]
    return RunRequest(1, rows, num_steps)


def tokens_of(runner: ModelRunner, run: RunRequest) -> list[list[int]]:
    """What each row was given."""
    gained: list[list[int]] = [[] for _ in run.rows]
    for step in runner.run(run):
        for row, new in zip(gained, np.split(step.tokens, step.indptr[1:-1]), strict=True):
            row += new.tolist()
    return gained
