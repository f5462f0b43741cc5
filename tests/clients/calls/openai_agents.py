"""openai-agents."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    StopAtTools,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call

SHORT = ModelSettings(max_tokens=60)
FORCED = ModelSettings(max_tokens=100, tool_choice="required", parallel_tool_calls=False)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


@function_tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


class OpenAIAgents(ClientCalls):
    client = "openai-agents"

    def setUp(self) -> None:
        super().setUp()
        set_tracing_disabled(True)
        openai = AsyncOpenAI(base_url=OPENAI_URL, api_key="-")
        self.responses = OpenAIResponsesModel(MODEL, openai)
        self.chat = OpenAIChatCompletionsModel(MODEL, openai)

    def _agent(self, model: Any, **more: Any) -> Agent:
        return Agent(name="assistant", instructions="Be short.", model=model, **{"model_settings": SHORT, **more})

    @call("Runner.run, default model class (Responses); turn 2", "texts")
    async def test_default(self) -> None:
        first = await Runner.run(self._agent(self.responses), "Say hello.")
        self.check_text(first.final_output)
        again = [*first.to_input_list(), {"role": "user", "content": "Again."}]
        self.check_text((await Runner.run(self._agent(self.responses), again)).final_output)

    @call("Runner.run_streamed, Responses", "deltas are the final output")
    async def test_streamed(self) -> None:
        whole = ModelSettings(max_tokens=600, temperature=0)  # a cut answer is an error to the client
        result = Runner.run_streamed(self._agent(self.responses, model_settings=whole), "Say hello.")
        raw = [event.data async for event in result.stream_events() if event.type == "raw_response_event"]
        text = "".join(event.delta for event in raw if event.type == "response.output_text.delta")
        self.assertEqual(text, result.final_output)
        self.check_text(text)

    @call("output_type, Responses", "the object that pydantic parsed")
    async def test_output(self) -> None:
        agent = self._agent(self.responses, output_type=City, model_settings=ModelSettings())
        self.assertIsInstance((await Runner.run(agent, "Tell me about Paris.")).final_output, City)

    @call("tools, Responses, a required call", "the tool ran with a city; its result is the output")
    async def test_tools(self) -> None:
        await self._check_tool(self.responses)

    @call("OpenAIChatCompletionsModel, text", "text")
    async def test_chat(self) -> None:
        self.check_text((await Runner.run(self._agent(self.chat), "Say hello.")).final_output)

    @call("OpenAIChatCompletionsModel, tools", "the tool ran with a city; its result is the output")
    async def test_chat_tools(self) -> None:
        await self._check_tool(self.chat)

    @call("OpenAIChatCompletionsModel, output_type", "the object that pydantic parsed")
    async def test_chat_output(self) -> None:
        agent = self._agent(self.chat, output_type=City, model_settings=ModelSettings())
        self.assertIsInstance((await Runner.run(agent, "Tell me about Paris.")).final_output, City)

    async def _check_tool(self, model: Any) -> None:
        stop = StopAtTools(stop_at_tool_names=["get_weather"])
        agent = self._agent(model, tools=[get_weather], model_settings=FORCED, tool_use_behavior=stop)
        result = await Runner.run(agent, WEATHER_QUESTION)
        self.assertRegex(str(result.final_output), "^Sunny in (Paris|Rome|Oslo)$")
