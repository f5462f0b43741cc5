"""litellm, as the bridge that many applications put before a server."""

from __future__ import annotations

from typing import Any, Literal

import litellm
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, URL, WEATHER_QUESTION, WEATHER_TOOL, ClientCalls, call

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
QUESTION: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
OPENAI: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": OPENAI_URL, "api_key": "-"}


class City(BaseModel):
    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


class LiteLLM(ClientCalls):
    client = "litellm"

    @call("completion, openai/", "text, finish_reason")
    def test_completion(self) -> None:
        (choice,) = litellm.completion(messages=HELLO, max_tokens=30, **OPENAI).choices
        self.check_text(choice.message.content)
        self.assertIn(choice.finish_reason, ("stop", "length"))

    @call("completion(stream=True)", "pieces make a text; a finish_reason at the end")
    def test_stream(self) -> None:
        chunks = list(litellm.completion(messages=HELLO, max_tokens=30, stream=True, **OPENAI))
        self.check_text("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        self.assertIn(chunks[-1].choices[0].finish_reason, ("stop", "length"))

    @call("completion, hosted_vllm/", "text")
    def test_hosted_vllm(self) -> None:
        answer = litellm.completion(f"hosted_vllm/{MODEL}", HELLO, api_base=OPENAI_URL, max_tokens=30)
        self.check_text(answer.choices[0].message.content)

    @call("completion, anthropic/", "text")
    def test_anthropic(self) -> None:
        answer = litellm.completion(f"anthropic/{MODEL}", HELLO, api_base=URL, api_key="-", max_tokens=30)
        self.check_text(answer.choices[0].message.content)

    @call("completion, ollama_chat/", "text")
    def test_ollama(self) -> None:
        answer = litellm.completion(f"ollama_chat/{MODEL}", HELLO, api_base=URL, max_tokens=30)
        self.check_text(answer.choices[0].message.content)

    @call("text_completion", "text")
    def test_text_completion(self) -> None:
        answer = litellm.text_completion(
            "Once upon a time", f"text-completion-openai/{MODEL}", api_base=OPENAI_URL, api_key="-", max_tokens=20
        )
        self.check_text(answer.choices[0].text)

    @call("completion(response_format=Model)", "the object that pydantic parsed")
    def test_response_format(self) -> None:
        answer = litellm.completion(messages=QUESTION, response_format=City, **OPENAI)
        City.model_validate_json(answer.choices[0].message.content)

    @call("completion(tools), auto and required", "a text or calls; then calls whose arguments fit the schema")
    def test_tools(self) -> None:
        asked: Any = {"messages": QUESTION, "tools": [WEATHER_TOOL], "max_tokens": 100, **OPENAI}
        message = litellm.completion(**asked).choices[0].message
        calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        self.check_call_or_text(message.content, calls)
        forced = litellm.completion(tool_choice="required", **asked).choices[0].message
        for found in forced.tool_calls:
            self.check_weather(found.function.name, found.function.arguments)

    @call("responses", "text")
    def test_responses(self) -> None:
        answer = litellm.responses(input="Say hello.", max_output_tokens=30, **OPENAI)
        self.check_text(answer.output[0].content[0].text)
