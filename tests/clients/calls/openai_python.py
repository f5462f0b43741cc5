"""The openai package for Python."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, WEATHER_SCHEMA, WEATHER_TOOL, ClientCalls, call

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
RESPONSES_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}


class City(BaseModel):
    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]
    population: int = Field(ge=1, le=99_999_999)


class get_weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]


class OpenAIPython(ClientCalls):
    client = "openai (Python)"

    def setUp(self) -> None:
        super().setUp()
        self.openai = OpenAI(base_url=OPENAI_URL, api_key="-")

    @call("models.list, models.retrieve", "the served model's id in both")
    def test_models(self) -> None:
        self.assertEqual([model.id for model in self.openai.models.list()], [MODEL])
        self.assertEqual(self.openai.models.retrieve(MODEL).id, MODEL)

    @call("chat.completions.create", "text, finish_reason, usage adds up")
    def test_chat(self) -> None:
        answer = self.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=60)
        (choice,) = answer.choices
        self.check_text(choice.message.content)
        self.assertIn(choice.finish_reason, ("stop", "length"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertEqual(choice.finish_reason == "length", answer.usage.completion_tokens == 60)

    @call("chat.completions.create(stream=True)", "greedy pieces are the whole answer's text; one finish_reason; usage")
    def test_stream(self) -> None:
        asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 40, "temperature": 0}
        whole = self.openai.chat.completions.create(**asked)
        chunks = list(self.openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        self.assertEqual("".join(c.delta.content or "" for c in choices), whole.choices[0].message.content)
        reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
        self.assertEqual(reasons, [whole.choices[0].finish_reason])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)

    @call("three AsyncOpenAI chats at once", "three texts")
    async def test_async(self) -> None:
        async with AsyncOpenAI(base_url=OPENAI_URL, api_key="-") as client:
            asked = [client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20) for _ in range(3)]
            for answer in await asyncio.gather(*asked):
                self.check_text(answer.choices[0].message.content)

    @call("completions.create", "text; echo with logprobs gives the prompt's tokens back")
    def test_completions(self) -> None:
        answer = self.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=10)
        self.check_text(answer.choices[0].text)
        echoed = self.openai.completions.create(model=MODEL, prompt="One two", max_tokens=1, echo=True, logprobs=1)
        logprobs = echoed.choices[0].logprobs
        self.assertTrue(echoed.choices[0].text.startswith("One two"))
        self.assertEqual("".join(logprobs.tokens), echoed.choices[0].text)
        self.assertTrue(all(value <= 0 for value in logprobs.token_logprobs[1:]))

    @call("chat.completions.stream (helper)", "the helper's final message has the streamed text")
    def test_stream_helper(self) -> None:
        asked: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "stop": ["\n", "."]}
        with self.openai.chat.completions.stream(**asked) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion().choices[0]
        self.check_text(text)
        self.assertEqual((final.message.content, final.finish_reason), (text, "stop"))

    @call("turn 2 with the message object", "text after the server's own message was sent back")
    def test_second_turn(self) -> None:
        first = self.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20).choices[0].message
        self._check_turn([*HELLO, first, *HELLO])

    @call("turn 2 with message.model_dump()", "text after the server's own message was sent back")
    def test_second_turn_dump(self) -> None:
        first = self.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20).choices[0].message
        self._check_turn([*HELLO, first.model_dump(), *HELLO])

    def _check_turn(self, messages: Any) -> None:
        answer = self.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=20)
        self.check_text(answer.choices[0].message.content)

    @call("chat.completions.parse(response_format=Model)", "the object that pydantic parsed")
    def test_parse(self) -> None:
        messages: Any = [{"role": "user", "content": "Tell me about Paris as JSON."}]
        answer = self.openai.chat.completions.parse(model=MODEL, messages=messages, response_format=City)
        self.assertIsInstance(answer.choices[0].message.parsed, City)
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    @call('response_format={"type": "json_object"}', "a JSON object, or a prefix of one at the token limit")
    def test_json_object(self) -> None:
        answer = self.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": 'Answer only with the JSON object {"ok": true}'}],
            response_format={"type": "json_object"},
            max_tokens=100,
            temperature=0,
        )
        (choice,) = answer.choices
        self.assertTrue(choice.message.content.startswith("{"))
        if choice.finish_reason == "stop":
            self.assertIsInstance(json.loads(choice.message.content), dict)

    @call("tools, tool_choice auto", "a text, or calls of the tool with JSON arguments")
    def test_tools_auto(self) -> None:
        answer = self._weather()
        calls = [(c.function.name, c.function.arguments) for c in answer.choices[0].message.tool_calls or ()]
        self.check_call_or_text(answer.choices[0].message.content, calls)
        self.assertEqual(answer.choices[0].finish_reason == "tool_calls", bool(calls))

    @call("tools, tool_choice required", "calls whose arguments fit the schema; finish_reason tool_calls")
    def test_tools_required(self) -> None:
        choice = self._weather(tool_choice="required").choices[0]
        self.assertEqual(choice.finish_reason, "tool_calls")
        for tool_call in choice.message.tool_calls:
            self.check_weather(tool_call.function.name, tool_call.function.arguments)

    @call("tools, tool_choice of a function, streamed", "the pieces of the arguments fit the schema")
    def test_tools_streamed(self) -> None:
        chosen: Any = {"type": "function", "function": {"name": "get_weather"}}
        calls: dict[int, list[str]] = {}
        for chunk in self._weather(tool_choice=chosen, stream=True):
            for piece in chunk.choices[0].delta.tool_calls or ():
                name, arguments = calls.setdefault(piece.index, ["", ""])
                calls[piece.index] = [name + (piece.function.name or ""), arguments + (piece.function.arguments or "")]
        self.assertEqual(len(calls), 1)
        self.check_weather(*calls[0])

    @call("tool results sent back", "text or a call after a forced call and its result")
    def test_tool_result(self) -> None:
        first = self._weather(tool_choice="required", parallel_tool_calls=False).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny, 20 degrees"}
        question = {"role": "user", "content": WEATHER_QUESTION}
        answer = self._weather(messages=[question, first, result]).choices[0].message
        calls = [(c.function.name, c.function.arguments) for c in answer.tool_calls or ()]
        self.check_call_or_text(answer.content, calls)

    @call("chat.completions.parse(tools=[pydantic_function_tool])", "parsed arguments of a required strict call")
    def test_parse_tools(self) -> None:
        messages: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        tools = [pydantic_function_tool(get_weather)]
        answer = self.openai.chat.completions.parse(
            model=MODEL, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        (found,) = answer.choices[0].message.tool_calls
        self.assertIsInstance(found.function.parsed_arguments, get_weather)

    def _weather(self, **more: Any) -> Any:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": WEATHER_QUESTION}], "max_tokens": 100}
        return self.openai.chat.completions.create(model=MODEL, tools=[WEATHER_TOOL], **{**asked, **more})


class OpenAIPythonResponses(ClientCalls):
    client = "openai (Python)"

    def setUp(self) -> None:
        super().setUp()
        self.openai = OpenAI(base_url=OPENAI_URL, api_key="-")

    @call("responses.create", "output_text, status and usage; a second turn by previous_response_id")
    def test_create(self) -> None:
        first = self.openai.responses.create(model=MODEL, input="Say hello.", max_output_tokens=40)
        self.check_text(first.output_text)
        self.assertIn(first.status, ("completed", "incomplete"))
        second = self.openai.responses.create(
            model=MODEL, input="And again.", previous_response_id=first.id, max_output_tokens=40
        )
        self.check_text(second.output_text)
        self.assertGreater(second.usage.input_tokens, first.usage.input_tokens)

    @call("responses.create(stream=True)", "deltas are the text of the last event's response")
    def test_stream(self) -> None:
        events = list(self.openai.responses.create(model=MODEL, input="Say hello.", stream=True, max_output_tokens=40))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        self.assertIn(events[-1].type, ("response.completed", "response.incomplete"))
        self.check_text(text)
        self.assertEqual(events[-1].response.output_text, text)

    @call("responses.stream (helper)", "the helper's final response has the streamed text")
    def test_stream_helper(self) -> None:
        with self.openai.responses.stream(model=MODEL, input="Say hello.", temperature=0) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        self.check_text(text)
        self.assertEqual(stream.get_final_response().output_text, text)

    @call("responses.parse(text_format=Model)", "the object that pydantic parsed")
    def test_parse(self) -> None:
        answer = self.openai.responses.parse(model=MODEL, input="Tell me about Paris.", text_format=City)
        self.assertIsInstance(answer.output_parsed, City)

    @call("responses.create(tools), required; result sent back", "arguments fit the schema; then text or a call")
    def test_tools(self) -> None:
        first = self.openai.responses.create(
            model=MODEL, input=WEATHER_QUESTION, tools=[RESPONSES_TOOL], tool_choice="required"
        )
        calls = [item for item in first.output if item.type == "function_call"]
        for item in calls:
            self.check_weather(item.name, item.arguments)
        results: Any = [{"type": "function_call_output", "call_id": c.call_id, "output": "Sunny"} for c in calls]
        history: Any = [{"role": "user", "content": WEATHER_QUESTION}, *first.output, *results]
        second = self.openai.responses.create(model=MODEL, input=history, tools=[RESPONSES_TOOL], max_output_tokens=60)
        again = [(item.name, item.arguments) for item in second.output if item.type == "function_call"]
        self.check_call_or_text(second.output_text, again)
