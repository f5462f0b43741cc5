// node main.mjs RESULTS: the calls of all JavaScript clients.
import "./ai_sdk.mjs";
import "./openai_js.mjs";
import "./langchain_js.mjs";
import "./anthropic_js.mjs";
import "./claude_code.mjs";
import "./ollama_js.mjs";
import { runAll } from "./harness.mjs";

process.exit(Math.min(await runAll(process.argv[2]), 100));
