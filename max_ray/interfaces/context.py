"""TextContext: everything about one running request, so that a pipeline needs to remember nothing.

Regions of `tokens` (length L = prompt + generated):

    [0, processed_length)             keys and values are in the KV cache
    [processed_length, active_end)    run in the next step ("active"); active_end = L unless the prompt is chunked
    [active_end, L)                   prompt tokens that wait for a later chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from max_ray.interfaces.image import PromptImage
from max_ray.interfaces.request import RequestID, SamplingParams
from max_ray.interfaces.task import GenerationStatus
from max_ray.interfaces.trace import RequestTrace

TokenArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class LogProbabilities:
    """Of one token: its own log probability (nats) and the `n` most likely ones, most likely first.

    Taken from the logits after bias, penalties and masks, and before temperature and filters.
    """

    token_id: int
    log_probability: float
    top: list[tuple[int, float]]


class TokenBuffer:
    """A growing int64 array of token ids; appending is amortized O(1) and views are not copies."""

    __slots__ = ("_array", "_length", "prompt_length")

    def __init__(self, prompt: npt.ArrayLike) -> None:
        tokens = np.asarray(prompt, dtype=np.int64)
        assert tokens.ndim == 1
        self.prompt_length = len(tokens)
        self._length = len(tokens)
        self._array = np.empty(max(64, len(tokens) + 64), dtype=np.int64)
        self._array[: len(tokens)] = tokens

    def __len__(self) -> int:
        return self._length

    @property
    def all(self) -> TokenArray:
        return self._array[: self._length]

    @property
    def prompt(self) -> TokenArray:
        return self._array[: self.prompt_length]

    @property
    def generated(self) -> TokenArray:
        return self._array[self.prompt_length : self._length]

    @property
    def generated_length(self) -> int:
        return self._length - self.prompt_length

    def append(self, token: int) -> None:
        if self._length == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self._length] = token
        self._length += 1


@dataclass(kw_only=True, eq=False)
class TextContext:
    """State of one text-generation request. The tokenizer creates it, the pipeline updates it; no other copy exists.

    Attributes:
        request_id: Identity of the request.
        tokens: Prompt and generated tokens.
        max_length: Prompt and generated tokens, at most.
        eos_token_ids: Tokens that end the sequence unless `sampling_params.ignore_eos`.
        sampling_params: How tokens are sampled; its `stop_token_ids` always end the sequence.
        model_name: The model that the request names.
        log_probabilities: Alternatives to report for each token; None to report nothing.
        log_probabilities_echo: Whether to report log probabilities of the prompt too.
        status: Whether the request is active, or how it ended.
        processed_length: Tokens that have keys and values.
        active_end: End of the tokens that run in the next step.
        block_table: int32, ids of the request's KV blocks, in order; a copy of the KV manager's table.
        cached_prefix_length: Prompt tokens whose keys and values came from the prefix cache (for `usage`).
        echoed_length: Prompt tokens whose log probabilities were reported already.
        block_hashes: Hashes of the full blocks, as far as they were needed.
        images: Images of the prompt, in order; kept until the end, for a prompt that must be computed again.
        cache_salt: Requests with different ones share no cached prefix.
        priority: Lower numbers run earlier and are preempted later.
        num_siblings: Contexts of the same request that are submitted right after this one. All are admitted, or none.
        tenant: Who shares the server fairly with others: the name of the API key that sent the request.
        tenant_weight: Its share, in proportion to the weights of other tenants.
        deadline: Time at which its client gives up, in monotonic seconds; None: never.
        trace: What the scheduler did with it.
        stop_ids: All tokens that end the sequence.
    """

    request_id: RequestID
    tokens: TokenBuffer
    max_length: int
    eos_token_ids: frozenset[int] = frozenset()
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    model_name: str = ""
    log_probabilities: int | None = None
    log_probabilities_echo: bool = False
    status: GenerationStatus = GenerationStatus.ACTIVE
    processed_length: int = 0
    active_end: int = 0
    block_table: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    cached_prefix_length: int = 0
    echoed_length: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    images: tuple[PromptImage, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    num_siblings: int = 0
    tenant: str = ""
    tenant_weight: float = 1.0
    deadline: float | None = None
    trace: RequestTrace = field(default_factory=RequestTrace)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.active_end = len(self.tokens)
        always = frozenset(self.sampling_params.stop_token_ids)
        self.stop_ids = always if self.sampling_params.ignore_eos else always | self.eos_token_ids

    @property
    def is_done(self) -> bool:
        return self.status is not GenerationStatus.ACTIVE

    @property
    def active_length(self) -> int:
        return self.active_end - self.processed_length

    @property
    def active_tokens(self) -> TokenArray:
        """Token ids of the next step, [active_length]."""
        return self.tokens.all[self.processed_length : self.active_end]

    @property
    def prompt_in_chunks(self) -> bool:
        """True while the next step ends before the last known token: it must not sample."""
        return self.active_end < len(self.tokens)

    @property
    def wants_prompt_log_probabilities(self) -> bool:
        """True while prompt tokens must run to be scored: their keys and values may not come from the prefix cache."""
        return (
            self.log_probabilities_echo
            and self.log_probabilities is not None
            and self.echoed_length < self.tokens.prompt_length
        )

    @property
    def remaining_new_tokens(self) -> int:
        """How many tokens this request may still generate."""
        room = self.max_length - len(self.tokens)
        limit = self.sampling_params.max_new_tokens
        return room if limit is None else min(room, limit - self.tokens.generated_length)

    def chunk(self, num_tokens: int) -> None:
        """Limits the next step to `num_tokens` tokens (at least 1)."""
        assert num_tokens >= 1
        self.active_end = min(len(self.tokens), self.processed_length + num_tokens)

    def advance(self) -> None:
        """The active tokens have run without sampling: the next chunk becomes active."""
        self.processed_length = self.active_end
        self.active_end = len(self.tokens)

    def update(self, token: int) -> None:
        """The active tokens have run and `token` was sampled after them."""
        assert not self.is_done, "a finished request was updated"
        self.processed_length = self.active_end
        self.tokens.append(token)
        self.active_end = len(self.tokens)
        if token in self.stop_ids and self.tokens.generated_length > self.sampling_params.min_new_tokens:
            self.status = GenerationStatus.END_OF_SEQUENCE
        elif self.remaining_new_tokens <= 0:
            self.status = GenerationStatus.MAXIMUM_LENGTH

    def extend(self, tokens: Sequence[int]) -> int:
        """The active tokens and all of `tokens` but the last have run; `tokens` follow the active ones.

        Args:
            tokens: New tokens in order. Those behind the one that ends the request are dropped.

        Returns:
            How many were taken.
        """
        for number, token in enumerate(tokens, start=1):
            self.update(token)
            if self.status is not GenerationStatus.ACTIVE:
                return number
        return len(tokens)

    def reset(self) -> None:
        """Forgets the KV cache (preemption, a rebuilt worker group): all tokens so far become the next prefill."""
        self.processed_length = 0
        self.active_end = len(self.tokens)
        self.block_table = np.empty(0, dtype=np.int32)

    def compute_num_available_steps(self, max_seq_len: int) -> int:
        """Steps that fit between the present length and `max_seq_len`."""
        return max_seq_len - len(self.tokens)
