"""smolagents."""

from __future__ import annotations

from typing import Any, Literal

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage, MessageRole

from tests.clients.harness import MODEL, OPENAI_URL, WEATHER_QUESTION, ClientCalls, call


@tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"]) -> str:
    """The weather of a city.

    Args:
        city: the city's name
    """
    return f"Sunny in {city}"


class Smolagents(ClientCalls):
    client = "smolagents"

    def setUp(self) -> None:
        super().setUp()
        self.model = OpenAIModel(MODEL, api_base=OPENAI_URL, api_key="-", max_tokens=100)

    @call("OpenAIModel, generate and generate_stream", "text; pieces make a text")
    def test_model(self) -> None:
        messages = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "Say hello."}])]
        self.check_text(self.model.generate(messages).content)
        self.check_text("".join(piece.content or "" for piece in self.model.generate_stream(messages)))

    @call("CodeAgent", "an answer after one step; the model's code may be wrong")
    def test_code_agent(self) -> None:
        agent = CodeAgent(tools=[], model=self.model, max_steps=1)
        self._check_run(agent, "What is 1 + 1?")

    @call("ToolCallingAgent (tools, tool_choice required)", "the step has calls of known tools")
    def test_tool_agent(self) -> None:
        agent = ToolCallingAgent(tools=[get_weather], model=self.model, max_steps=1)
        self._check_run(agent, WEATHER_QUESTION)
        calls = agent.memory.steps[1].tool_calls
        self.assertTrue(calls)
        self.assertLessEqual({found.name for found in calls}, {"get_weather", "final_answer"})

    def _check_run(self, agent: Any, task: str) -> None:
        """The run asked the model and got an answer; no step failed in the request."""
        agent.run(task)
        steps = agent.memory.steps[1:]
        self.assertTrue(steps[0].model_output_message, "the step has no answer of the model")
        self.assertNotIn("AgentGenerationError", {type(getattr(step, "error", None)).__name__ for step in steps})
