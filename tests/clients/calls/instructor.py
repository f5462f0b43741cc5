"""instructor."""

from __future__ import annotations

from typing import Any, Literal

import instructor
from instructor.core import IncompleteOutputException, InstructorRetryException
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, ClientCalls, call

QUESTION: list[Any] = [{"role": "user", "content": "Tell me about Paris."}]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


class Instructor(ClientCalls):
    client = "instructor"

    def _create(self, **more: Any) -> Any:
        client = instructor.from_openai(OpenAI(base_url=OPENAI_URL, api_key="-"), **more)
        return client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_model=City, max_retries=0, max_tokens=200
        )

    @call("default mode (tools)", "the object that pydantic parsed")
    def test_default(self) -> None:
        self.assertIsInstance(self._create(), City)

    @call("Mode.JSON_SCHEMA", "the object that pydantic parsed")
    def test_json_schema(self) -> None:
        self.assertIsInstance(self._create(mode=instructor.Mode.JSON_SCHEMA), City)

    @call("Mode.JSON", "accepted; a JSON object of the model's own, so validation may fail")
    def test_json(self) -> None:
        try:
            self.assertIsInstance(self._create(mode=instructor.Mode.JSON), City)
        except (InstructorRetryException, IncompleteOutputException) as error:
            self.assertRegex(str(error), "validation error|max_tokens")

    @call("Mode.MD_JSON", "accepted; the text is the model's, so validation may fail")
    def test_markdown(self) -> None:
        try:
            self.assertIsInstance(self._create(mode=instructor.Mode.MD_JSON), City)
        except (InstructorRetryException, IncompleteOutputException) as error:
            self.assertRegex(str(error), "validation error|max_tokens")
