"""llm, the command line program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.clients.harness import MODEL, OPENAI_URL, ClientCalls, call

MODELS = f"""
- model_id: chat
  model_name: {MODEL}
  api_base: {OPENAI_URL}
  supports_schema: true
  supports_tools: true
- model_id: completion
  model_name: {MODEL}
  api_base: {OPENAI_URL}
  completion: true
"""


class LLM(ClientCalls):
    client = "llm"

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "extra-openai-models.yaml").write_text(MODELS, encoding="utf-8")

    def _llm(self, *arguments: str) -> str:
        program = Path(sys.executable).with_name("llm")
        environment: Any = {**os.environ, "LLM_USER_PATH": str(self.folder), "OPENAI_API_KEY": "-"}
        done = subprocess.run(
            [str(program), *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        self.assertEqual(done.returncode, 0, done.stderr[-500:])
        return done.stdout

    @call("prompt (streams); -c continues", "texts")
    def test_prompt(self) -> None:
        self.check_text(self._llm("-m", "chat", "-o", "max_tokens", "40", "Say hello."))
        self.check_text(self._llm("-c", "-o", "max_tokens", "40", "Again."))

    @call("-s SYSTEM --no-stream", "text")
    def test_system(self) -> None:
        self.check_text(self._llm("-m", "chat", "-s", "Be short.", "--no-stream", "-o", "max_tokens", "40", "Hello"))

    @call("completion model", "text")
    def test_completion(self) -> None:
        self.check_text(self._llm("-m", "completion", "-o", "max_tokens", "20", "Once upon a time"))

    @call("--schema", "a JSON object of the schema")
    def test_schema(self) -> None:
        schema = {
            "type": "object",
            "properties": {"country": {"enum": ["France", "Italy"]}, "capital": {"type": "boolean"}},
            "required": ["country", "capital"],
            "additionalProperties": False,
        }
        found = json.loads(self._llm("-m", "chat", "--schema", json.dumps(schema), "Where is Paris?"))
        self.assertIn(found["country"], ("France", "Italy"))
        self.assertIsInstance(found["capital"], bool)

    @call("-T llm_version (a tool, choice left to the model)", "text after at most 2 rounds")
    def test_tool(self) -> None:
        arguments = ("-T", "llm_version", "--chain-limit", "3", "-o", "max_tokens", "60")
        self.check_text(self._llm("-m", "chat", *arguments, "Say hello."))
