"""What metrics and traces are told of a choice that has ended, from the times that it and the scheduler have noted."""

from __future__ import annotations

from max_ray.serve.api.choice import Choice
from max_ray.serve.api.metrics import FinishedChoice
from max_ray.serve.api.request_log import phase_seconds

ABORTED = "abort"
"""The finish reason of a choice that was cancelled or failed."""


def finished_choice(choice: Choice, arrival: float) -> FinishedChoice:
    """The numbers of a choice.

    Args:
        choice: Of a request that has ended.
        arrival: perf_counter() when the request came.
    """
    context, trace = choice.context, choice.context.trace
    phases = phase_seconds(choice, arrival)
    has_tokens = choice.first_token_time > 0
    is_complete = choice.finish_reason is not None
    return FinishedChoice(
        finish_reason=choice.finish_reason or ABORTED,
        prompt_tokens=context.tokens.prompt_length,
        cached_tokens=choice.num_cached_tokens,
        generated_tokens=choice.num_tokens,
        preemptions=trace.num_preemptions,
        queue_s=phases["queue"],
        prefill_s=phases["prefill"],
        decode_s=choice.last_token_time - choice.first_token_time if has_tokens and is_complete else None,
        total_s=choice.last_token_time - arrival if has_tokens and is_complete else None,
    )
