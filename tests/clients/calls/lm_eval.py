"""lm-evaluation-harness, the command line program, on a task of four questions that is written beside its output."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.clients.harness import MODEL, OPENAI_URL, ClientCalls, call

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "banana"], "label": 0},
    {"question": "Two plus two is", "choices": ["car", "four"], "label": 1},
    {"question": "The sky is", "choices": ["blue", "soup"], "label": 0},
    {"question": "Snow is", "choices": ["loud", "white"], "label": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
output_type: {kind}
"""
CHOICE = TASK + 'doc_to_choice: "{{{{choices}}}}"\ndoc_to_target: label\nmetric_list: [{{metric: acc}}]\n'
GENERATE = (
    TASK
    + 'doc_to_target: "{{{{choices[label]}}}}"\nmetric_list: [{{metric: exact_match}}]\n'
    + 'generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false}}\n'
)


class LMEval(ClientCalls):
    client = "lm-eval"

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def _run(self, model: str, url: str, task: str, kind: str, *more: str) -> Any:
        """Evaluates one task; returns its results and the samples."""
        rows = self.folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        (self.folder / "tiny.yaml").write_text(task.format(name="tiny", rows=rows, kind=kind), encoding="utf-8")
        output = self.folder / "output"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", "tiny"]
        command += ["--model_args", f"model={MODEL},base_url={OPENAI_URL}/{url}", "--include_path", str(self.folder)]
        command += ["--output_path", str(output), "--log_samples", *more]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 0, done.stderr[-600:])
        (results,) = output.rglob("results_*.json")
        (samples,) = output.rglob("samples_*.jsonl")
        lines = samples.read_text(encoding="utf-8").splitlines()
        return json.loads(results.read_text(encoding="utf-8"))["results"]["tiny"], [json.loads(line) for line in lines]

    @call("local-completions, multiple_choice (log-likelihoods)", "accuracy of at least 3 of 4")
    def test_loglikelihood(self) -> None:
        results, samples = self._run("local-completions", "completions", CHOICE, "multiple_choice")
        self.assertEqual(len(samples), len(ROWS))
        self.assertGreaterEqual(results["acc,none"], 0.75)

    @call("local-completions, generate_until", "four texts without the stop string")
    def test_generate(self) -> None:
        self._check_texts(self._run("local-completions", "completions", GENERATE, "generate_until")[1])

    @call("local-chat-completions, generate_until", "four texts")
    def test_chat(self) -> None:
        answers = self._run(
            "local-chat-completions", "chat/completions", GENERATE, "generate_until", "--apply_chat_template"
        )
        self._check_texts(answers[1])

    def _check_texts(self, samples: Any) -> None:
        texts = [sample["resps"][0][0] for sample in samples]
        self.assertEqual(len(texts), len(ROWS))
        for text in texts:
            self.check_text(text)
            self.assertNotIn("\n", text)
