"""guidellm, the command line program, on three chats of a file that is written beside its output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.clients.harness import MODEL, URL, ClientCalls, call

PROMPTS = ("Once upon a time", "The sky is", "Say hello.")
TIMEOUT_S = 240


class GuideLLM(ClientCalls):
    client = "guidellm"

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def _run(self, backend: str) -> Any:
        """The report of three requests, one after the other."""
        prompts, report = self.folder / "prompts.jsonl", self.folder / "report.json"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"]
        command += ["--backend", f"kind=openai_http,target={URL},model={MODEL},max_tokens=20{backend}"]
        command += ["--profile", "kind=synchronous", "--data", f"kind=json_file,path={prompts}"]
        command += ["--constraint", "kind=max_requests,count=3", "--constraint", "kind=max_errors,count=1"]
        command += ["--output", f"kind=json,path={report}"]
        environment = {**os.environ, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        self.assertEqual(done.returncode, 0, done.stderr[-600:])
        return json.loads(report.read_text(encoding="utf-8"))["benchmarks"][0]

    def _check(self, benchmark: Any) -> None:
        """Three requests succeeded, with a text and the usage that the server counted."""
        requests = benchmark["requests"]
        self.assertEqual([request["info"]["error"] for request in requests["errored"]], [])
        self.assertEqual(len(requests["successful"]), 3)
        for request in requests["successful"]:
            self.check_text(request["output"])
            self.assertTrue(0 < request["output_metrics"]["text_tokens"] <= 20)

    @call("run, openai_http (chat completions, streamed)", "3 of 3 requests with text and token counts")
    def test_chat(self) -> None:
        self._check(self._run(""))

    @call("run, openai_http, request_format=/v1/completions", "3 of 3 requests with text and token counts")
    def test_completions(self) -> None:
        self._check(self._run(",request_format=/v1/completions"))
