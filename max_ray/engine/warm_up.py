"""Steps before the first request: every variant of every kernel is compiled, and the memory of a step is known.

Triton compiles a variant of a kernel for each combination of its constants. Those of attention follow from the number
of splits (a power of two, by the longest row), and whether a step has prompts; those of quantized layers from the
number of inputs. One row reaches each number of splits: a step may claim longer rows than it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from max_ray.engine.kv_storage import KVStorage, RunTables
from max_ray.engine.runner import ModelRunner
from max_ray.interfaces import LogitControls, RunRequest, RunRow, SamplingParams
from max_ray.modeling import PipelineModel

_LEAST_KEYS_A_SPLIT = 128  # of the attention kernels
_INPUTS = (1, 2, 8, 16, 32, 64, 128, 512)  # numbers of inputs at which quantized layers take another tile
_SAMPLED: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0.0, seed=0),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, seed=0),
    SamplingParams(temperature=1.0, seed=0, logit_controls=LogitControls(logit_bias=((0, 1.0),))),
    SamplingParams(temperature=1.0, seed=0, frequency_penalty=0.5),
)


class WarmUp:
    """Steps over the first blocks of a cache that no request uses yet. All ranks of a group take the same ones.

    Args:
        model: Loaded model.
        storage: Its cache; what it holds is overwritten.
        runner: Runner over both.
        max_length: Tokens of the longest row.
        max_tokens: Tokens of the largest step.
    """

    def __init__(
        self, model: PipelineModel, storage: KVStorage, runner: ModelRunner, max_length: int, max_tokens: int
    ) -> None:
        self._model = model
        self._storage = storage
        self._runner = runner
        self._max_length = max_length
        self._max_tokens = max(2, min(max_tokens, storage.num_blocks * storage.page_size))

    def compile_all(self) -> None:
        """Runs each variant once."""
        with torch.inference_mode():
            for longest in self._longest_rows():
                for new in (1, 2):
                    self._step([new], longest)
            for count in _INPUTS:
                if count <= self._max_tokens:
                    self._step(self._cut(count), count, echo=True)
        for params in _SAMPLED:
            self._run([2], params, num_steps=3)

    def largest_step(self) -> None:
        """A step of the most tokens, all of them with logits, as a request with `echo` has them."""
        self._run(self._cut(self._max_tokens), SamplingParams(temperature=1.0, seed=0), num_steps=1, echo=True)

    def _longest_rows(self) -> list[int]:
        """A length for each number of splits."""
        found = [2]
        while found[-1] < self._max_length and max(found[-1] * 2, _LEAST_KEYS_A_SPLIT) <= self._max_length:
            found.append(max(found[-1] * 2, _LEAST_KEYS_A_SPLIT))
        return found

    def _cut(self, tokens: int) -> list[int]:
        """Tokens of rows that are `tokens` together, each in blocks of its own."""
        page, longest = self._storage.page_size, max(1, self._max_length - 1)
        most = max(page, longest // page * page) if longest >= page else longest
        rows, left, blocks = [], tokens, self._storage.num_blocks
        while left > 0 and blocks > 0:
            rows.append(min(most, left, blocks * page))
            left -= rows[-1]
            blocks -= -(-rows[-1] // page)
        return rows

    def _step(self, counts: Sequence[int], longest: int, *, echo: bool = False) -> None:
        """One forward pass, launched as if its longest row had `longest` tokens."""
        rows = self._rows(counts, _SAMPLED[0], 1, echo)
        kv = RunTables(rows, self._storage, self._model.device).first_step(rows)
        kv = replace(kv, max_kv_length=max(longest, kv.max_kv_length))
        self._model.execute(self._model.prepare_initial_token_inputs(rows, kv))

    def _run(self, counts: Sequence[int], params: SamplingParams, num_steps: int, echo: bool = False) -> None:
        for _ in self._runner.run(RunRequest(0, self._rows(counts, params, num_steps, echo), num_steps)):
            pass

    def _rows(self, counts: Sequence[int], params: SamplingParams, num_steps: int, echo: bool) -> list[RunRow]:
        rows, first = [], 0
        for index, count in enumerate(counts):
            steps = min(num_steps, max(1, self._storage.num_blocks * self._storage.page_size - count))
            blocks = -(-(count + steps - 1) // self._storage.page_size)
            table = (np.arange(first, first + blocks) % self._storage.num_blocks).astype(np.int32)
            first += blocks
            tokens = np.zeros(count, dtype=np.int64)
            rows.append(
                RunRow(
                    request_id=f"warm-up {index}",
                    active_tokens=tokens,
                    processed_length=0,
                    block_table=table,
                    max_new_tokens=steps,
                    sampling_params=params,
                    stop_ids=frozenset(),
                    generated_length=0,
                    prompt_length=count,
                    history=tokens,
                    log_probabilities=0 if echo else None,
                    echo=echo,
                )
            )
        return rows
