"""pydantic-ai."""

from __future__ import annotations

from typing import Any, Literal

from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call

SHORT: Any = {"max_tokens": 60}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


class PydanticAI(ClientCalls):
    client = "pydantic-ai"

    def setUp(self) -> None:
        super().setUp()
        self.provider = OpenAIProvider(openai_client=AsyncOpenAI(base_url=OPENAI_URL, api_key="-"))
        self.model = OpenAIChatModel(MODEL, provider=self.provider)

    @call("run; message_history in turn 2", "texts")
    async def test_run(self) -> None:
        agent = Agent(self.model, instructions="Be short.", model_settings=SHORT)
        first = await agent.run("Say hello.")
        self.check_text(first.output)
        self.check_text((await agent.run("Again.", message_history=first.all_messages())).output)

    @call("run_stream", "the pieces are the result's text")
    async def test_stream(self) -> None:
        async with Agent(self.model, model_settings=SHORT).run_stream("Say hello.") as result:
            pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
            self.check_text("".join(pieces))

    @call("output_type (default: a tool)", "the object that pydantic parsed")
    async def test_output(self) -> None:
        agent = Agent(self.model, output_type=City)
        self.assertIsInstance((await agent.run("Tell me about Paris.")).output, City)

    @call("output_type=NativeOutput", "the object that pydantic parsed")
    async def test_native(self) -> None:
        agent = Agent(self.model, output_type=NativeOutput(City))
        self.assertIsInstance((await agent.run("Tell me about Paris.")).output, City)

    @call("a tool, choice left to the model", "a text at the end; where the tool ran, with a city")
    async def test_tool(self) -> None:
        called = []
        agent = Agent(self.model, model_settings=SHORT)

        @agent.tool_plain
        def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
            """The weather of a city."""
            called.append(city)
            return f"Sunny in {city}"

        try:
            self.check_text((await agent.run(WEATHER_QUESTION)).output)
        except UnexpectedModelBehavior as error:  # the model called it wrongly too often
            self.assertIn("retries", str(error))
        self.assertLessEqual(set(called), {"Paris", "Rome", "Oslo"})

    @call("OpenAIResponsesModel", "text")
    async def test_responses(self) -> None:
        agent = Agent(OpenAIResponsesModel(MODEL, provider=self.provider), model_settings=SHORT)
        self.check_text((await agent.run("Say hello.")).output)
