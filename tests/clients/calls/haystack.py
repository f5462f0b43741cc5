"""haystack-ai."""

from __future__ import annotations

from typing import Any, Literal

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, WEATHER_SCHEMA, ClientCalls, call


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


def _generator(**options: Any) -> OpenAIChatGenerator:
    settings: Any = {"max_completion_tokens": 80, **options.pop("generation_kwargs", {})}
    return OpenAIChatGenerator(
        model=MODEL, api_base_url=OPENAI_URL, api_key=Secret.from_token("-"), generation_kwargs=settings, **options
    )


class Haystack(ClientCalls):
    client = "haystack"

    @call("OpenAIChatGenerator, run; turn 2", "texts, finish_reason")
    def test_run(self) -> None:
        question = ChatMessage.from_user("Say hello.")
        (answer,) = _generator().run([question])["replies"]
        self.check_text(answer.text)
        self.assertIn(answer.meta["finish_reason"], ("stop", "length"))
        (again,) = _generator().run([question, answer, question])["replies"]
        self.check_text(again.text)

    @call("OpenAIChatGenerator, streaming_callback", "the pieces are the reply's text")
    def test_stream(self) -> None:
        pieces: list[str] = []
        generator = _generator(streaming_callback=lambda chunk: pieces.append(chunk.content))
        (answer,) = generator.run([ChatMessage.from_user("Say hello.")])["replies"]
        self.check_text(answer.text)
        self.assertEqual("".join(pieces), answer.text)

    @call("OpenAIChatGenerator, tools, required", "arguments fit the schema")
    def test_tools(self) -> None:
        tool = Tool("get_weather", "The weather of a city", WEATHER_SCHEMA, function=lambda city: f"Sunny in {city}")
        generator = _generator(tools=[tool], generation_kwargs={"tool_choice": "required"})
        (answer,) = generator.run([ChatMessage.from_user(WEATHER_QUESTION)])["replies"]
        self.assertTrue(answer.tool_calls)
        for found in answer.tool_calls:
            self.check_weather(found.tool_name, found.arguments)

    @call("OpenAIChatGenerator, response_format=Model", "the object that pydantic parsed")
    def test_schema(self) -> None:
        generator = _generator(generation_kwargs={"response_format": City})
        (answer,) = generator.run([ChatMessage.from_user("Tell me about Paris.")])["replies"]
        City.model_validate_json(answer.text)
