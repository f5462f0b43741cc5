"""Schemas with a keyword that cannot be enforced: a 400 that names it, through every field that takes a schema."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.http.fake_engine import FakeEngine
from tests.http.test_malformed_bodies import is_error_object
from tests.structured_output.corpus import REFUSED

_MESSAGES = [{"role": "user", "content": "hi"}]


def requests_with(schema: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """By the field that takes the schema: the route and the body."""
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    own = {"type": "json_schema", "name": "answer", "schema": schema}
    chat, completion = {"messages": _MESSAGES}, {"prompt": "hi"}
    limited = {**chat, "max_tokens": 5}
    return {
        "response_format.json_schema.schema": ("/v1/chat/completions", {**chat, "response_format": named}),
        "response_format.schema": (
            "/v1/completions",
            {**completion, "response_format": {"type": "json_object", "schema": schema}},
        ),
        "guided_json": ("/v1/completions", {**completion, "guided_json": schema}),
        "structured_outputs.json": ("/v1/chat/completions", {**chat, "structured_outputs": {"json": schema}}),
        "text.format": ("/v1/responses", {"input": "hi", "text": {"format": own}}),
        "output_config.format": (
            "/v1/messages",
            {**limited, "output_config": {"format": {"type": "json_schema", "schema": schema}}},
        ),
        "chat format": ("/api/chat", {"model": "fake", **chat, "format": schema}),
        "generate format": ("/api/generate", {"model": "fake", **completion, "format": schema}),
    }


def message_of(content: Any) -> str:
    """The sentence of an error object of any dialect."""
    error = content["error"]
    return str(error if isinstance(error, str) else error["message"])


def test_there_are_sixty() -> None:
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("name", REFUSED)
async def test_the_keyword_is_named(name: str, client: httpx.AsyncClient, engine: FakeEngine) -> None:
    keyword, schema = REFUSED[name]
    for field, (path, body) in requests_with(schema).items():
        reply = await client.post(path, json=body)
        assert reply.status_code == 400, (field, reply.text)
        assert is_error_object(reply.json(), path), (field, reply.text)
        assert f"'{keyword}'" in message_of(reply.json()), (field, reply.text)
    assert not engine.contexts


async def test_the_same_requests_with_a_schema_that_is_enforced(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """What is refused above is refused for the schema."""
    for path, body in requests_with({"type": "object"}).values():
        assert (await client.post(path, json=body)).status_code == 200
    assert all(context.sampling_params.structured_output is not None for context in engine.contexts)
