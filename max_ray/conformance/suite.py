"""The suite: one family on one checkpoint, on 1 and 2 ranks, over paged, chunked and prefix-hit runs, in float32 and
bfloat16, against a reference.

    paged    whole prompts of lengths around a page's borders side by side; then greedy tokens, one a step
    chunked  prompts in pieces that end inside, on and after a page, beside rows that decode
    prefix   a prompt whose first pages another prompt computed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from max_ray.architecture import SupportedArchitecture
from max_ray.config import PipelineConfig
from max_ray.conformance.engine import Engine, random_tokens
from max_ray.conformance.reference import Reference
from max_ray.distributed import TPGroup, init_tp_group
from max_ray.huggingface import load_huggingface_config
from max_ray.interfaces import SupportedEncoding
from max_ray.modeling import PipelineModel
from max_ray.nn import Module, pack_weights
from max_ray.weights import open_weights

PAGE = 8
NUM_GREEDY = 16
LOGIT_LIMIT = 1e-4
ROUTED_LOGIT_LIMIT = 1e-3
KL_LIMIT = 1e-3

CPU = torch.device("cpu")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Case:
    """Sequences by length; how they are cut into steps; whether the last one begins with the first one's pages."""

    name: str
    lengths: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    prefix: int = 0


CASES = (
    Case("paged", (PAGE + 1, 1, 37, PAGE - 1, PAGE), ((PAGE + 1,), (1,), (37,), (PAGE - 1,), (PAGE,))),
    Case("chunked", (37, 20, 18), ((5, PAGE - 5, 1, 28), (PAGE, 1, 1, 10), (17, 1))),
    Case("prefix hit", (37, 29), ((37,), (0, 29 - 2 * PAGE)), prefix=2 * PAGE),
)


@dataclass(frozen=True)
class Verdict:
    """How one case came out. `error`: the largest difference of a logit in float32, the KL divergence from the float32
    reference in bfloat16. `greedy_equal`: None where no greedy tokens were drawn."""

    case: str
    num_ranks: int
    encoding: SupportedEncoding
    error: float
    limit: float
    greedy_equal: bool | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.greedy_equal is not False


@dataclass(frozen=True)
class Suite:
    """A family (`architecture`), a checkpoint folder and the reference for it.

    routed: a mixture of experts. Rounding changes the choice of experts where two are nearly equal, in the reference's
    own bfloat16 as well; so there the median of the tokens' KL divergences counts rather than the mean.
    expert_parallel: the setting of that name.
    """

    architecture: SupportedArchitecture
    path: Path
    reference: Reference
    routed: bool = False
    expert_parallel: bool = False

    def run(self, num_ranks: int, encoding: SupportedEncoding, cases: Sequence[Case] = CASES) -> list[Verdict]:
        """Loads the model once on `num_ranks` ranks (threads of this process) and runs the cases on it. Raises
        ConfigError and WeightsError as a start of the model would."""
        answers = run_ranks(num_ranks, lambda tp: self._answers(tp, encoding, cases))
        return [
            self._verdict(case, num_ranks, encoding, [answer[i] for answer in answers]) for i, case in enumerate(cases)
        ]

    def load(self, tp: TPGroup, encoding: SupportedEncoding) -> PipelineModel:
        """One rank of the model, as a worker loads it."""
        config = PipelineConfig(
            model_path=str(self.path), kv_cache_page_size=PAGE, expert_parallel=self.expert_parallel
        )
        record = self.architecture
        model = record.pipeline_model(
            config,
            load_huggingface_config(self.path),
            encoding,
            tp.device,
            tp,
            open_weights(self.path),
            record.weight_adapters.get(record.default_weights_format),
        )
        for network in vars(model).values():
            if isinstance(network, Module):
                pack_weights(network)
        return model

    def divergence(self, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
        """KL(exact || ours) in nats of the tokens' distributions: the mean, or the median where `routed`."""
        q = torch.cat(list(ours)).double().log_softmax(-1)
        p = torch.cat(list(exact)).double().log_softmax(-1)
        of_tokens = (p.exp() * (p - q)).sum(-1)
        return float(of_tokens.median() if self.routed else of_tokens.mean())

    def _answers(self, tp: TPGroup, encoding: SupportedEncoding, cases: Sequence[Case]) -> list[_Answer]:
        model = self.load(tp, encoding)
        return [_answer(Engine(model), case, self.sequences(case), encoding) for case in cases]

    def sequences(self, case: Case) -> list[list[int]]:
        """The random prompts of a case; the same for everybody who asks."""
        vocab_size = load_huggingface_config(self.path).text_part.vocab_size
        sequences = random_tokens(case.lengths, vocab_size)
        sequences[-1][: case.prefix] = sequences[0][: case.prefix]
        return sequences

    def _verdict(self, case: Case, num_ranks: int, encoding: SupportedEncoding, answers: Sequence[_Answer]) -> Verdict:
        sequences = self.sequences(case)
        exact = self.reference(sequences)
        exact[-1] = exact[-1][case.prefix :]
        if encoding is SupportedEncoding.float32:
            limit = ROUTED_LOGIT_LIMIT if self.routed else LOGIT_LIMIT
            worst = max(_largest_difference(answer.logits, exact) for answer in answers)
        else:
            limit = KL_LIMIT
            worst = max(self.divergence(answer.logits, exact) for answer in answers)
        greedy = None
        if answers[0].greedy:
            greedy = all(self._is_greedy(sequences[0], answer.greedy) for answer in answers)
        return Verdict(case.name, num_ranks, encoding, worst, limit, greedy)

    def _is_greedy(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the reference, given the tokens so far, would have picked each of `tokens`."""
        (logits,) = self.reference([[*prompt, *tokens]])
        return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(tokens)


@dataclass(frozen=True)
class _Answer:
    """What one rank gave for one case."""

    logits: list[torch.Tensor]
    greedy: list[int]


def _answer(engine: Engine, case: Case, sequences: list[list[int]], encoding: SupportedEncoding) -> _Answer:
    cached = [0] * len(sequences)
    if case.prefix:
        engine.share_prefix(0, len(sequences) - 1, case.prefix)
        cached[-1] = case.prefix
    logits = engine.logits_of(sequences, case.chunks, cached)
    draws = case.name == "paged" and encoding is SupportedEncoding.float32
    return _Answer(logits, engine.greedy(sequences[0], NUM_GREEDY) if draws else [])


def _largest_difference(ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    return max(float((a.float() - b).abs().max()) for a, b in zip(ours, exact, strict=True))


def run_ranks(size: int, work: Callable[[TPGroup], ResultT], timeout_s: float = 60.0) -> list[ResultT]:
    """What `work` gives on each rank of a group of CPU threads, in rank order; the first error is raised."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(size) as threads:

        def rank_thread(rank: int) -> ResultT:
            tp = init_tp_group(rank, size, f"file://{Path(folder) / 'rendezvous'}", CPU, timeout_s)
            try:
                with torch.inference_mode():
                    return work(tp)
            finally:
                tp.destroy()

        return list(threads.map(rank_thread, range(size)))
