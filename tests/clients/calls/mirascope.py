"""mirascope."""

from __future__ import annotations

from typing import Literal

from mirascope import llm
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call

NAME = f"local/{MODEL}"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


@llm.tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


class Mirascope(ClientCalls):
    client = "mirascope"

    def setUp(self) -> None:
        super().setUp()
        llm.register_provider("openai:completions", scope="local/", base_url=OPENAI_URL, api_key="-")

    @call("call", "text")
    def test_call(self) -> None:
        @llm.call(NAME, max_tokens=40)
        def hello() -> str:
            return "Say hello."

        self.check_text(hello().text())

    @call("call.stream", "pieces make a text")
    def test_stream(self) -> None:
        @llm.call(NAME, max_tokens=40)
        def hello() -> str:
            return "Say hello."

        self.check_text("".join(hello.stream().text_stream()))

    @call("call(format=Model)", "the object that pydantic parsed")
    def test_format(self) -> None:
        @llm.call(NAME, format=City)
        def city() -> str:
            return "Tell me about Paris."

        self.assertIsInstance(city().parse(), City)

    @call("call(tools)", "a text, or calls of the tool")
    def test_tools(self) -> None:
        @llm.call(NAME, tools=[get_weather], max_tokens=80)
        def weather() -> str:
            return WEATHER_QUESTION

        answer = weather()
        self.check_call_or_text(answer.text() if answer.texts else "", [(c.name, c.args) for c in answer.tool_calls])
