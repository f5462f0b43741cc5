// Claude Code itself, with a prompt that fits the model: its own has more than 12,000 tokens with its tools.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { call, checkText, model, url } from "./harness.mjs";

const name = "Claude Code (the program)";
const run = promisify(execFile);
const packageName = `@anthropic-ai/claude-code-${process.platform}-${process.arch}`;

/** The last message of `claude -p`, in an empty folder with a configuration of its own. */
async function ask(...more) {
  const folder = mkdtempSync(join(tmpdir(), "claude-code-"));
  const program = join(dirname(createRequire(import.meta.url).resolve(`${packageName}/package.json`)), "claude");
  const env = {
    PATH: process.env.PATH,
    HOME: folder,
    ANTHROPIC_BASE_URL: url,
    ANTHROPIC_API_KEY: "-",
    ANTHROPIC_MODEL: model,
    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
    CLAUDE_CODE_MAX_OUTPUT_TOKENS: "120",
  };
  const options = ["-p", "Say hello.", "--system-prompt", "Be short.", "--output-format", "json", ...more];
  try {
    const promise = run(program, options, { cwd: folder, env });
    promise.child.stdin.end();
    const { stdout } = await promise.catch((error) => (error.stdout ? error : Promise.reject(error)));
    return JSON.parse(stdout);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Tokens came, and nothing failed but that the small model may not have ended its answer. */
function check(answer) {
  assert.ok(!answer.is_error || answer.api_error === "max_output_tokens", answer.result);
  checkText(answer.result);
  assert.ok(answer.usage.output_tokens > 0);
}

call(name, "claude -p, no tools", "a text or the token limit, counted tokens", async () =>
  check(await ask("--tools", "")));
call(name, "claude -p, the tool Read", "a text or the token limit, counted tokens", async () =>
  check(await ask("--tools", "Read", "--max-turns", "2")));
