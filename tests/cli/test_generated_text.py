"""`generate` prints what the answer adds to the text of the prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from max_ray.cli import main as cli
from max_ray.interfaces import RequestID, TextGenerationRequest
from max_ray.pipelines import PIPELINE_REGISTRY
from tests.tokenization.kinds import WRITERS, Kind


class SpeakingPipeline:
    """Says the given ids and the end, one a step."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def execute(self, inputs: Any) -> dict[RequestID, Any]:
        ((request_id, context),) = inputs.batches[0].items()
        token = next(self._ids)
        context.update(token)
        return {request_id: SimpleNamespace(tokens=[token])}

    def release(self, request_id: RequestID) -> None:
        pass


@pytest.mark.parametrize("name", list(WRITERS))
def test_the_first_space_stays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind.make(name, tmp_path)
    said = [*kind.ids("ab a b")[len(kind.ids("ab")) :], kind.tokenizer.eos]
    monkeypatch.setattr(PIPELINE_REGISTRY, "retrieve", lambda *_: (kind.tokenizer, SpeakingPipeline(said)))
    request = TextGenerationRequest(RequestID(), prompt="ab")
    assert "".join(cli._generated_text(SimpleNamespace(), request)) == " a b"  # type: ignore[arg-type]
