"""llama-index-llms-openai-like."""

from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy", "Norway"]


def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


TOOL = FunctionTool.from_defaults(get_weather)


class LlamaIndex(ClientCalls):
    client = "llama-index openai-like"

    def _model(self, **more: Any) -> OpenAILike:
        options: dict[str, Any] = {"is_chat_model": True, "max_tokens": 60, "context_window": 4096, **more}
        return OpenAILike(model=MODEL, api_base=OPENAI_URL, api_key="-", **options)

    @call("complete", "text")
    def test_complete(self) -> None:
        self.check_text(self._model(is_chat_model=False).complete("Once upon a time").text)

    @call("chat, stream_chat", "text; pieces make a text")
    def test_chat(self) -> None:
        messages = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="Say hello.")]
        self.check_text(self._model().chat(messages).message.content)
        self.check_text("".join(piece.delta or "" for piece in self._model().stream_chat(messages)))

    @call("as_structured_llm, function calling model", "the object that pydantic parsed")
    def test_structured(self) -> None:
        model = self._model(is_function_calling_model=True, max_tokens=200).as_structured_llm(City)
        self.assertIsInstance(model.complete("Tell me about Paris.").raw, City)

    @call("as_structured_llm, should_use_structured_outputs", "the object that pydantic parsed")
    def test_structured_outputs(self) -> None:
        model = self._model(should_use_structured_outputs=True, max_tokens=200).as_structured_llm(City)
        self.assertIsInstance(model.complete("Tell me about Paris.").raw, City)

    @call("as_structured_llm, not function calling", "accepted; the text is the model's, so its parse may fail")
    def test_structured_text(self) -> None:
        model = self._model(is_function_calling_model=False).as_structured_llm(City)
        try:
            self.assertIsInstance(model.complete("Tell me about Paris.").raw, City)
        except ValueError as error:
            self.assertIn("json", str(error).lower())

    @call("chat_with_tools", "a text, or calls of the tool")
    def test_tools(self) -> None:
        model = self._model(is_function_calling_model=True)
        answer = model.chat_with_tools([TOOL], user_msg=WEATHER_QUESTION)
        calls = model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
        self.check_call_or_text(answer.message.content, [(c.tool_name, c.tool_kwargs) for c in calls])

    @call("predict_and_call(tool_required=True)", "the function ran with a city of the schema")
    def test_required(self) -> None:
        model = self._model(is_function_calling_model=True, max_tokens=200)
        answer = model.predict_and_call([TOOL], user_msg=WEATHER_QUESTION, tool_required=True)
        self.check_weather(answer.sources[0].tool_name, answer.sources[0].raw_input["kwargs"], is_open=True)
