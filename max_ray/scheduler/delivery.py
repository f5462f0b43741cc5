"""Delivery: step outputs to the queues of their requests."""

from __future__ import annotations

import time

from max_ray.interfaces import GenerationStatus, RequestID, TextGenerationOutput
from max_ray.scheduler.scheduled_request import ScheduledRequest
from max_ray.scheduler.scheduler import Scheduler
from max_ray.scheduler.stats import CompletionRate

StepOutputs = dict[RequestID, TextGenerationOutput]


class Delivery:
    """Hands outputs to their readers and ends the requests that are done.

    Attributes:
        completions: How fast requests have been ending.
    """

    def __init__(self, scheduler: Scheduler, completions: CompletionRate) -> None:
        self.completions = completions
        self._scheduler = scheduler
        self._stats = scheduler.stats

    def deliver(self, outputs: StepOutputs) -> tuple[bool, bool]:
        """Delivers the outputs of one step.

        Returns:
            Whether a request ended, and whether one got several tokens.
        """
        running = self._scheduler.queues.running
        ends = is_ragged = False
        for request_id, output in outputs.items():
            request = running.get(request_id)
            if request is not None:
                is_ragged = is_ragged or len(output.tokens) > 1
                ends = ends or output.is_done
                self._deliver(request, output)
        return ends, is_ragged

    def deliver_missing(self) -> None:
        """Delivers tokens that a failing pipeline put into the contexts and did not hand out."""
        for request in list(self._scheduler.queues.running.values()):
            tokens = request.context.tokens.generated[request.num_delivered :].tolist()
            if tokens:
                self._deliver(request, _output(request, request.context.status, tokens))

    def cancel(self, request: ScheduledRequest) -> None:
        """Tells the reader that its request was cancelled."""
        self._stats.cancelled += 1
        request.outputs.put(_output(request, GenerationStatus.CANCELLED, []))

    def _deliver(self, request: ScheduledRequest, output: TextGenerationOutput) -> None:
        num_tokens = len(output.tokens)
        if num_tokens:
            request.num_delivered += num_tokens
            self._stats.generated_tokens += num_tokens
            self._scheduler.quarantine.release(request)
        request.outputs.put(output)
        if output.is_done:
            self._stats.finished += 1
            self.completions.note(time.monotonic())
            self._scheduler.end(request)


def _output(request: ScheduledRequest, status: GenerationStatus, tokens: list[int]) -> TextGenerationOutput:
    return TextGenerationOutput(
        request_id=request.request_id,
        tokens=tokens,
        final_status=status,
        num_cached_tokens=request.context.cached_prefix_length,
    )
