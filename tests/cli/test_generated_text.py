"""`generate` prints what the answer adds to the text of the prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max_ray.cli.generate import generated_text
from max_ray.interfaces import RequestID, TextGenerationRequest
from tests.tokenization.kinds import WRITERS, Kind


class SpeakingPipeline:
    """Says the given ids and the end, one a step."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)
        self.released = 0

    def execute(self, inputs: Any) -> dict[RequestID, Any]:
        ((request_id, context),) = inputs.batches[0].items()
        token = next(self._ids)
        context.update(token)
        return {request_id: SimpleNamespace(tokens=[token])}

    def release(self, request_id: RequestID) -> None:
        self.released += 1


@pytest.mark.parametrize("name", list(WRITERS))
def test_the_first_space_stays(name: str, tmp_path: Path) -> None:
    kind = Kind.make(name, tmp_path)
    said = [*kind.ids("ab a b")[len(kind.ids("ab")) :], kind.tokenizer.eos]
    request = TextGenerationRequest(RequestID(), prompt="ab")
    assert "".join(generated_text(kind.tokenizer, SpeakingPipeline(said), request)) == " a b"


@pytest.mark.parametrize(
    ("stop", "text"), [(["b"], " a "), ([" b"], " a"), (["a b"], " "), (["x", "b x"], " a b"), ([" a b a"], " a b")]
)
def test_a_stop_string_ends_the_text_and_is_not_in_it(tmp_path: Path, stop: list[str], text: str) -> None:
    kind = Kind.make("byte_level", tmp_path)
    said = [*kind.ids("ab a b")[len(kind.ids("ab")) :], kind.tokenizer.eos]
    pipeline = SpeakingPipeline(said)
    request = TextGenerationRequest(RequestID(), prompt="ab", sampling_params={"stop": stop})
    assert "".join(generated_text(kind.tokenizer, pipeline, request)) == text
    assert pipeline.released == 1
