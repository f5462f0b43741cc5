"""ChoiceLog: what the engine gave for one choice, token by token: enough to make its events again elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from max_ray.interfaces import GenerationStatus, LogProbabilities, RequestID, TextGenerationOutput

_TOKEN_BYTES = 16
_ENTRY_BYTES = 256
_TOP_BYTES = 128


def token_bytes(num_top: int | None) -> int:
    """Most bytes of memory that a token takes in a log.

    Args:
        num_top: Alternatives with log probabilities; None: without log probabilities.
    """
    return _TOKEN_BYTES if num_top is None else _TOKEN_BYTES + _ENTRY_BYTES + _TOP_BYTES * num_top


@dataclass(slots=True)
class ChoiceNews:
    """What a log gained.

    Args:
        start: Tokens before these.
        tokens: Token ids.
        entries: Their log probabilities; empty where they are not asked for.
        prompt_entries: All log probabilities of the prompt.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        status: How the choice ended.
        ends_apart: Whether the end came without a token.
    """

    start: int
    tokens: list[int]
    entries: list[LogProbabilities]
    prompt_entries: list[LogProbabilities | None]
    num_cached_tokens: int
    status: GenerationStatus
    ends_apart: bool


@dataclass(slots=True)
class ChoiceLog:
    """The same from the first token on.

    Args:
        tokens: Token ids.
        entries: Their log probabilities; empty where they are not asked for.
        prompt_entries: Log probabilities of the prompt, for `echo`.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        status: Whether the choice goes on, or how it ended.
        ends_apart: Whether the end came without a token.
    """

    tokens: array[int] = field(default_factory=lambda: array("q"))
    entries: list[LogProbabilities] = field(default_factory=list)
    prompt_entries: list[LogProbabilities | None] = field(default_factory=list)
    num_cached_tokens: int = 0
    status: GenerationStatus = GenerationStatus.ACTIVE
    ends_apart: bool = False

    def note(self, output: TextGenerationOutput) -> None:
        """Takes what the engine gave. An end that is not the model's is left out: the choice can go on elsewhere."""
        self.tokens.extend(output.tokens)
        self.entries += output.log_probabilities or []
        self.prompt_entries += output.prompt_log_probabilities or []
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.final_status in (GenerationStatus.END_OF_SEQUENCE, GenerationStatus.MAXIMUM_LENGTH):
            self.status, self.ends_apart = output.final_status, not output.tokens

    def copy(self) -> ChoiceLog:
        """A log that does not change with this one."""
        copied = ChoiceLog()
        copied.apply(self.since(0))
        return copied

    def since(self, num_tokens: int) -> ChoiceNews:
        """What is there beyond the first `num_tokens` tokens."""
        return ChoiceNews(
            num_tokens,
            self.tokens[num_tokens:].tolist(),
            self.entries[num_tokens:],
            list(self.prompt_entries),
            self.num_cached_tokens,
            self.status,
            self.ends_apart,
        )

    def apply(self, news: ChoiceNews) -> None:
        """Takes what another log gained; again is fine."""
        del self.tokens[news.start :]
        del self.entries[news.start :]
        self.tokens.extend(news.tokens)
        self.entries += news.entries
        self.prompt_entries = news.prompt_entries
        self.num_cached_tokens = news.num_cached_tokens
        self.status, self.ends_apart = news.status, news.ends_apart

    def outputs(self, request_id: RequestID) -> Iterator[TextGenerationOutput]:
        """What the engine gave, one token each.

        Args:
            request_id: Of the context that goes on with it.
        """
        is_over = self.status is not GenerationStatus.ACTIVE
        last = len(self.tokens) - 1
        for position, token in enumerate(self.tokens):
            ends = is_over and not self.ends_apart and position == last
            yield TextGenerationOutput(
                request_id=request_id,
                tokens=[token],
                final_status=self.status if ends else GenerationStatus.ACTIVE,
                log_probabilities=[self.entries[position]] if self.entries else None,
                prompt_log_probabilities=list(self.prompt_entries) if not position and self.prompt_entries else None,
                num_cached_tokens=self.num_cached_tokens,
            )
        if is_over and self.ends_apart:
            yield TextGenerationOutput(request_id=request_id, final_status=self.status)


def single_tokens(output: TextGenerationOutput) -> Iterator[TextGenerationOutput]:
    """An output as outputs of one token each: how many tokens come together must not change a stream's events."""
    if len(output.tokens) < 2:
        yield output
        return
    last = len(output.tokens) - 1
    entries = output.log_probabilities
    for position, token in enumerate(output.tokens):
        yield TextGenerationOutput(
            request_id=output.request_id,
            tokens=[token],
            final_status=output.final_status if position == last else GenerationStatus.ACTIVE,
            log_probabilities=None if entries is None else [entries[position]],
            prompt_log_probabilities=output.prompt_log_probabilities if not position else None,
            num_cached_tokens=output.num_cached_tokens,
            error=output.error if position == last else None,
        )
