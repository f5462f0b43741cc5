"""Delivery: step outputs to the queues of their requests."""

from __future__ import annotations

from max_ray.interfaces import GenerationStatus, RequestID, TextGenerationOutput
from max_ray.scheduler.forecast import AnswerLengths
from max_ray.scheduler.scheduled_request import ScheduledRequest
from max_ray.scheduler.scheduler import Scheduler

StepOutputs = dict[RequestID, TextGenerationOutput]


class Delivery:
    """Hands outputs to their readers and ends the requests that are done.

    Args:
        scheduler: Whose requests they are.
        lengths: Notes how long answers get.
    """

    def __init__(self, scheduler: Scheduler, lengths: AnswerLengths) -> None:
        self._lengths = lengths
        self._scheduler = scheduler
        self._stats = scheduler.stats
        self._running = scheduler.queues.running
        self._quarantine = scheduler.quarantine

    def deliver(self, outputs: StepOutputs) -> tuple[bool, bool]:
        """Delivers the outputs of one step.

        Returns:
            Whether a request ended, and whether one got several tokens.
        """
        ended: list[tuple[ScheduledRequest, TextGenerationOutput]] = []
        num_delivered, is_ragged = 0, False
        for request_id, output in outputs.items():
            request = self._running.get(request_id)
            if request is None:
                continue
            if output.final_status is not GenerationStatus.ACTIVE:
                ended.append((request, output))
                if output.error is not None:
                    continue
            num_tokens = len(output.tokens)
            request.num_delivered += num_tokens
            num_delivered += num_tokens
            if num_tokens > 1:
                is_ragged = True
            request.outputs.put(output)
        self._stats.generated_tokens += num_delivered
        if self._quarantine.has_failed_runs:
            self._quarantine.note_tokens(self._running.get(key) for key, output in outputs.items() if output.tokens)
        for request, output in ended:
            self._finish(request, output.failure)
        return bool(ended), is_ragged

    def deliver_missing(self) -> None:
        """Delivers tokens that a failing pipeline put into the contexts and did not hand out."""
        for request in list(self._running.values()):
            tokens = request.context.tokens.generated[request.num_delivered :].tolist()
            if tokens:
                self.deliver({request.request_id: _output(request, request.context.status, tokens)})

    def cancel(self, request: ScheduledRequest) -> None:
        """Tells the reader that its request was cancelled."""
        self._stats.cancelled += 1
        request.outputs.put(_output(request, GenerationStatus.CANCELLED, []))

    def _finish(self, request: ScheduledRequest, failure: Exception | None) -> None:
        if failure is not None:
            self._scheduler.fail(request, failure)
            return
        self._stats.finished += 1
        self._lengths.note(request.context)
        self._scheduler.end(request)


def _output(request: ScheduledRequest, status: GenerationStatus, tokens: list[int]) -> TextGenerationOutput:
    return TextGenerationOutput(
        request_id=request.request_id,
        tokens=tokens,
        final_status=status,
        num_cached_tokens=request.context.cached_prefix_length,
    )
