"""The ollama package for Python."""

from __future__ import annotations

from typing import Any

from ollama import AsyncClient, Client
from pydantic import BaseModel

from tests.clients.harness import MODEL, URL, WEATHER_QUESTION, WEATHER_TOOL, ClientCalls, call

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
SHORT: Any = {"num_predict": 30, "temperature": 0}


class Answer(BaseModel):
    is_capital: bool


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: the city's name
    """
    return f"Sunny in {city}"


class OllamaPython(ClientCalls):
    client = "ollama (Python)"

    def setUp(self) -> None:
        super().setUp()
        self.ollama = Client(host=URL)

    @call("chat", "text, done_reason, eval_count")
    def test_chat(self) -> None:
        answer = self.ollama.chat(MODEL, HELLO, options=SHORT)
        self.check_text(answer.message.content)
        self.assertIn(answer.done_reason, ("stop", "length"))
        self.assertTrue(0 < answer.eval_count <= 30)

    @call("chat(stream=True)", "the pieces are the whole answer's text")
    def test_stream(self) -> None:
        whole = self.ollama.chat(MODEL, HELLO, options=SHORT).message.content
        parts = list(self.ollama.chat(MODEL, HELLO, options=SHORT, stream=True))
        self.assertEqual("".join(part.message.content or "" for part in parts), whole)
        self.assertEqual([part.done for part in parts], [False] * (len(parts) - 1) + [True])

    @call("chat of AsyncClient", "text")
    async def test_async(self) -> None:
        self.check_text((await AsyncClient(host=URL).chat(MODEL, HELLO, options=SHORT)).message.content)

    @call("generate", "text")
    def test_generate(self) -> None:
        self.check_text(self.ollama.generate(MODEL, "Say hello.", options=SHORT).response)

    @call("generate(raw=True, stream=True)", "pieces make a text")
    def test_raw(self) -> None:
        parts = self.ollama.generate(MODEL, "Once upon a time", raw=True, options=SHORT, stream=True)
        self.check_text("".join(part.response for part in parts))

    @call("chat(format=schema)", "the object that pydantic parsed")
    def test_format(self) -> None:
        question: Any = [{"role": "user", "content": "Is Paris a capital?"}]
        answer = self.ollama.chat(MODEL, question, format=Answer.model_json_schema())
        Answer.model_validate_json(answer.message.content)

    @call('chat(format="json")', "text that begins a JSON object")
    def test_json(self) -> None:
        question: Any = [{"role": "user", "content": "Is Paris a capital? Answer as JSON."}]
        answer = self.ollama.chat(MODEL, question, format="json", options=SHORT)
        self.assertTrue(answer.message.content.startswith("{"))

    @call("chat(tools=[schema])", "a text, or calls of the tool")
    def test_tools(self) -> None:
        question: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        message = self.ollama.chat(MODEL, question, tools=[WEATHER_TOOL], options={"num_predict": 80}).message
        calls = [(c.function.name, dict(c.function.arguments)) for c in message.tool_calls or ()]
        self.check_call_or_text(message.content, calls)

    @call("chat(tools=[function]), tool message sent back", "text or calls after the client's own tool messages")
    def test_tool_results(self) -> None:
        called: Any = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        history: Any = [
            {"role": "user", "content": WEATHER_QUESTION},
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "tool_name": "get_weather", "content": get_weather("Paris")},
        ]
        message = self.ollama.chat(MODEL, history, tools=[get_weather], options={"num_predict": 60}).message
        calls = [(c.function.name, dict(c.function.arguments)) for c in message.tool_calls or ()]
        self.check_call_or_text(message.content, calls)

    @call("list, show, ps", "the served model with its capabilities")
    def test_models(self) -> None:
        self.assertEqual([model.model for model in self.ollama.list().models], [MODEL])
        self.assertIn("completion", self.ollama.show(MODEL).capabilities)
        self.assertEqual([model.model for model in self.ollama.ps().models], [MODEL])
