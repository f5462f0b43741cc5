"""langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


@tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


class LangChain(ClientCalls):
    client = "langchain-openai"

    def setUp(self) -> None:
        super().setUp()
        self.chat = self._chat(max_tokens=40)

    def _chat(self, **more: Any) -> ChatOpenAI:
        return ChatOpenAI(model=MODEL, base_url=OPENAI_URL, api_key="-", **more)

    @call("invoke", "text and usage_metadata")
    def test_invoke(self) -> None:
        answer = self.chat.invoke("Say hello.")
        self.check_text(answer.content)
        self.assertGreater(answer.usage_metadata["output_tokens"], 0)

    @call("invoke with history, system and temperature", "text")
    def test_history(self) -> None:
        chat = self._chat(max_tokens=40, temperature=0.2)
        question = [SystemMessage("Be short."), HumanMessage("Say hello.")]
        first = chat.invoke(question)
        self.check_text(chat.invoke([*question, first, HumanMessage("Again.")]).content)

    @call("stream, ainvoke", "pieces make a text; text")
    async def test_stream(self) -> None:
        self.check_text("".join(chunk.content for chunk in self.chat.stream("Say hello.")))
        self.check_text((await self.chat.ainvoke("Say hello.")).content)

    @call("OpenAI() completions", "text")
    def test_completions(self) -> None:
        self.check_text(OpenAI(model=MODEL, base_url=OPENAI_URL, api_key="-", max_tokens=20).invoke("Once upon a time"))

    @call("with_structured_output (default: json_schema)", "the object that pydantic parsed")
    def test_structured_output(self) -> None:
        self.assertIsInstance(self._chat().with_structured_output(City).invoke("Tell me about Paris."), City)

    @call("with_structured_output(method=function_calling)", "the object that pydantic parsed")
    def test_function_calling(self) -> None:
        model = self._chat().with_structured_output(City, method="function_calling")
        self.assertIsInstance(model.invoke("Tell me about Paris."), City)

    @call("with_structured_output(method=json_mode)", "a JSON object begins the text")
    def test_json_mode(self) -> None:
        model = self._chat(max_tokens=60, temperature=0)
        bound = model.with_structured_output(City, method="json_mode", include_raw=True)
        self.assertTrue(bound.invoke("Tell me about Paris as JSON.")["raw"].content.startswith("{"))

    @call("bind_tools, auto", "a text, or calls of the tool")
    def test_tools(self) -> None:
        answer = self._chat(max_tokens=80).bind_tools([get_weather]).invoke(WEATHER_QUESTION)
        calls = [(c["name"], c["args"]) for c in answer.tool_calls]
        self.check_call_or_text(answer.content, calls)

    @call("bind_tools(tool_choice=any), ToolMessage sent back", "arguments fit the schema; then text or calls")
    def test_forced(self) -> None:
        model = self._chat(max_tokens=100)
        question = HumanMessage(WEATHER_QUESTION)
        first = model.bind_tools([get_weather], tool_choice="any").invoke([question])
        self.assertIsInstance(first, AIMessage)
        results = [ToolMessage(get_weather.invoke(c["args"]), tool_call_id=c["id"]) for c in first.tool_calls]
        self.assertTrue(results)
        for found in first.tool_calls:
            self.check_weather(found["name"], found["args"], is_open=True)
        answer = model.bind_tools([get_weather]).invoke([question, first, *results])
        self.check_call_or_text(answer.content, [(c["name"], c["args"]) for c in answer.tool_calls])

    @call("use_responses_api=True", "text")
    def test_responses(self) -> None:
        answer = self._chat(max_tokens=40, use_responses_api=True).invoke("Say hello.")
        self.check_text(answer.text if isinstance(answer.text, str) else answer.text())
