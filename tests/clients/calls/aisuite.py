"""aisuite."""

from __future__ import annotations

from typing import Any

import aisuite

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, WEATHER_TOOL, ClientCalls, call

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]


class AISuite(ClientCalls):
    client = "aisuite"

    def setUp(self) -> None:
        super().setUp()
        self.ai = aisuite.Client({"openai": {"api_key": "-", "base_url": OPENAI_URL}})

    @call("chat.completions.create; turn 2", "texts")
    def test_chat(self) -> None:
        asked: Any = {"model": f"openai:{MODEL}", "max_tokens": 40}
        first = self.ai.chat.completions.create(messages=HELLO, **asked).choices[0].message
        self.check_text(first.content)
        again = self.ai.chat.completions.create(messages=[*HELLO, first, *HELLO], **asked)
        self.check_text(again.choices[0].message.content)

    @call("chat.completions.create(tools), required", "arguments fit the schema")
    def test_tools(self) -> None:
        question: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        asked: Any = {"model": f"openai:{MODEL}", "max_tokens": 100, "tool_choice": "required"}
        answer = self.ai.chat.completions.create(messages=question, tools=[WEATHER_TOOL], **asked)
        for found in answer.choices[0].message.tool_calls:
            self.check_weather(found.function.name, found.function.arguments)
